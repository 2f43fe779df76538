//! Packing, verifying and inspecting in process: the same bytes whatever happens, and every image accounted for.

mod fixtures;

use std::fs;
use std::path::Path;

use data_prep::args::{InspectArgs, PackOptions, VerifyArgs};
use data_prep::inspect::inspect;
use data_prep::pack::{Reject, pack};
use data_prep::plan::plan;
use data_prep::source::SourceOptions;
use data_prep::verify::{shard_config, verify};
use fixtures::{Outcome, config, contents, copy, cut, photos};
use shared::io::{write_atomic, write_json};
use shared::manifest::{MANIFEST_FILE, Manifest, Stage};
use shared::shard::{PackingOrder, ShardSet, sample_id};
use shared::transforms::{Level, Scratch, View, ViewParams, decode};
use shared::{Error, Fault};

fn rejects(directory: &Path) -> Vec<Reject> {
    let text = fs::read_to_string(directory.join("rejects.jsonl")).expect("a list of rejects");
    text.lines().map(|line| serde_json::from_str(line).expect("a reject")).collect()
}

fn verify_args(shards: &Path, source: Option<&Path>) -> VerifyArgs {
    let options = SourceOptions::default();
    VerifyArgs {
        shards: shards.into(),
        source: source.map(Into::into),
        options,
        samples: 100,
        quiet: true,
        json: false,
    }
}

/// Turns a finished set into what a killed run leaves: no manifest, no rejects, half a file, and without the named shards.
fn interrupt(directory: &Path, lost: &[&str]) -> Outcome {
    let manifest = Manifest::read(directory, Stage::DataPrep)?;
    fs::remove_file(directory.join(MANIFEST_FILE))?;
    fs::remove_file(directory.join("rejects.jsonl"))?;
    write_json(directory.join("unfinished.json"), &manifest.identity)?;
    write_atomic(directory.join(".tmp-half"), b"half a shard")?;
    for name in lost {
        fs::remove_file(directory.join(name))?;
    }
    Ok(())
}

#[test]
fn threads_and_instruction_sets_do_not_change_a_byte() -> Outcome {
    let root = tempfile::tempdir()?;
    photos(&root.path().join("in"), &[("cat", 5), ("dog", 6)])?;
    cut(&root.path().join("in/dog/001.jpg"))?;
    let mut all = Vec::new();
    let levels = Level::available();
    for (run, threads) in [1, 2, 4].into_iter().chain(levels.iter().map(|_| 2)).enumerate() {
        let output = root.path().join(format!("out-{run}"));
        let mut config = config(&root.path().join("in"), &output, |_| ());
        config.threads = threads;
        if let Some(&level) = run.checked_sub(3).and_then(|level| levels.get(level)) {
            config.level = level;
        }
        let summary = pack(&config)?;
        assert_eq!((summary.samples, summary.rejects, summary.shards), (10, 1, 4));
        all.push(contents(&output)?);
    }
    assert!(all.iter().all(|files| *files == all[0]));
    assert!(all[0].keys().any(|name| name == "shard-00003.safetensors"), "{:?}", all[0].keys());
    Ok(())
}

#[test]
fn stored_pixels_follow_from_the_stored_parameters() -> Outcome {
    let root = tempfile::tempdir()?;
    let (input, output) = (root.path().join("in"), root.path().join("out"));
    photos(&input, &[("cat", 4), ("dog", 3)])?;
    pack(&config(&input, &output, |_| ()))?;
    let set = ShardSet::open(&output)?;
    let recipe = shard_config(&set)?.recipe;
    assert_eq!(set.classes(), ["cat", "dog"]);
    let (mut scratch, mut found) = (Scratch::default(), 0);
    for (label, name) in (0i64..).zip(["cat", "dog"]) {
        for entry in fs::read_dir(input.join(name))? {
            let path = entry?.path();
            let relative = format!("{name}/{}", path.file_name().expect("a name").to_string_lossy());
            let image = decode::read(&path)?;
            for index in 0..set.len() {
                let (shard, row) = set.locate(index);
                let shard = &set.shards()[shard];
                if shard.sample_ids()[row] != sample_id(&relative) {
                    continue;
                }
                found += 1;
                assert_eq!(shard.labels()[row], label);
                for view in 0..2 {
                    let params = ViewParams::from_row(&shard.view_params(row, view)?)?;
                    let mut pixels = vec![0; 16 * 16 * 3];
                    recipe.apply(View::Global(view), &image, &params, 16, &mut scratch, &mut pixels)?;
                    assert!(pixels == set.pixels(index, view)?, "{relative} view {view}");
                }
            }
        }
    }
    assert_eq!(found, 7);
    Ok(())
}

#[test]
fn resumed_run_equals_a_straight_one() -> Outcome {
    let root = tempfile::tempdir()?;
    let input = root.path().join("in");
    photos(&input, &[("a", 7), ("b", 6)])?;
    cut(&input.join("a/002.jpg"))?;
    let straight = root.path().join("straight");
    pack(&config(&input, &straight, |_| ()))?;
    let cases: [&[&str]; 4] = [
        &[],
        &["shard-00000.safetensors"],
        &["shard-00001.safetensors", "shard-00004.safetensors"],
        &["shard-00000.safetensors", "shard-00001.safetensors", "shard-00002.safetensors", "shard-00003.safetensors"],
    ];
    for (i, lost) in cases.iter().enumerate() {
        let resumed = copy(&straight, &root.path().join(format!("resumed-{i}")))?;
        interrupt(&resumed, lost)?;
        let summary = pack(&config(&input, &resumed, |_| ()))?;
        assert_eq!(summary.kept_shards as usize, 5 - lost.len());
        assert!(contents(&straight)? == contents(&resumed)?, "case {i}");
    }
    Ok(())
}

#[test]
fn shard_that_is_not_what_it_should_be_is_made_again() -> Outcome {
    let root = tempfile::tempdir()?;
    let input = root.path().join("in");
    photos(&input, &[("a", 9)])?;
    let straight = root.path().join("straight");
    pack(&config(&input, &straight, |_| ()))?;
    let bytes = fs::read(straight.join("shard-00001.safetensors"))?;
    let mut other_pixel = bytes.clone();
    other_pixel[4096] ^= 1;
    let exchanged = fs::read(straight.join("shard-00002.safetensors"))?;
    for (i, wrong) in [&bytes[..bytes.len() - 1], &other_pixel, &exchanged, b"no shard"].into_iter().enumerate() {
        let resumed = copy(&straight, &root.path().join(format!("resumed-{i}")))?;
        interrupt(&resumed, &[])?;
        write_atomic(resumed.join("shard-00001.safetensors"), wrong)?;
        assert_eq!(pack(&config(&input, &resumed, |_| ()))?.kept_shards, 2, "case {i}");
        assert!(contents(&straight)? == contents(&resumed)?, "case {i}");
    }
    Ok(())
}

#[test]
fn finished_set_is_left_alone_and_other_settings_are_refused() -> Outcome {
    let root = tempfile::tempdir()?;
    let (input, output) = (root.path().join("in"), root.path().join("out"));
    photos(&input, &[("a", 4)])?;
    let first = pack(&config(&input, &output, |_| ()))?;
    let before = contents(&output)?;
    let again = pack(&config(&input, &output, |_| ()))?;
    assert!(again.already_finished && again.fingerprint == first.fingerprint);
    assert!(again.to_string().contains("already finished"), "{again}");
    for change in [|o: &mut PackOptions| o.seed = Some(1), |o: &mut PackOptions| o.views = Some(3)] {
        let error = pack(&config(&input, &output, change)).unwrap_err();
        assert!(matches!(&error, Error::Chain { .. }), "{error}");
    }
    photos(&input, &[("a", 5)])?;
    let error = pack(&config(&input, &output, |_| ())).unwrap_err();
    assert!(matches!(&error, Error::Chain { what, .. } if what.contains("images")), "{error}");
    assert!(before == contents(&output)?);
    Ok(())
}

#[test]
fn broken_images_are_named_and_the_rest_is_packed() -> Outcome {
    let root = tempfile::tempdir()?;
    let (input, output) = (root.path().join("in"), root.path().join("out"));
    photos(&input, &[("a", 6)])?;
    cut(&input.join("a/004.jpg"))?;
    write_atomic(input.join("a/zero.jpg"), b"")?;
    write_atomic(input.join("a/moving.gif"), b"GIF89a and so on")?;
    // shards of one sample: some are empty
    let change = |o: &mut PackOptions| (o.shard_samples, o.max_rejects) = (Some(1), Some("3".parse().unwrap()));
    let summary = pack(&config(&input, &output, change))?;
    assert_eq!((summary.samples, summary.rejects, summary.shards), (5, 3, 8));
    let rejects = rejects(&output);
    let paths: Vec<&str> = rejects.iter().map(|reject| reject.path.as_str()).collect();
    assert_eq!(paths, ["a/004.jpg", "a/moving.gif", "a/zero.jpg"]);
    assert!(rejects[0].reason.contains("cut off") && rejects[2].reason.contains("empty"), "{rejects:?}");
    let checked = verify(&verify_args(&output, Some(&input)))?;
    assert_eq!((checked.samples, checked.compared_samples), (5, 5));
    // and an interrupted run finds the same rejects again
    let resumed = copy(&output, &root.path().join("resumed"))?;
    interrupt(&resumed, &["shard-00002.safetensors"])?;
    pack(&config(&input, &resumed, change))?;
    assert!(contents(&output)? == contents(&resumed)?);
    Ok(())
}

#[test]
fn rejects_of_a_kept_shard_are_remembered_and_counted() -> Outcome {
    let root = tempfile::tempdir()?;
    let (input, output) = (root.path().join("in"), root.path().join("out"));
    photos(&input, &[("a", 6)])?;
    cut(&input.join("a/001.jpg"))?;
    let shard = "shard-00000.safetensors";
    let one_shard = |o: &mut PackOptions| o.shard_samples = Some(6);
    pack(&config(&input, &output, one_shard))?;
    let file = Manifest::read(&output, Stage::DataPrep)?.files.into_iter().find(|file| file.path == shard);
    interrupt(&output, &[])?;
    // a reason that decoding would never give: the picture was not decoded again
    let reject = Reject { path: "a/001.jpg".into(), reason: "remembered".into() };
    write_json(output.join(format!(".{shard}.json")), &serde_json::json!({"file": file, "rejects": [&reject]}))?;
    let none = |o: &mut PackOptions| (o.shard_samples, o.max_rejects) = (Some(6), Some("0".parse().unwrap()));
    let error = pack(&config(&input, &output, none)).unwrap_err();
    assert!(error.to_string().contains("1 of 6 images cannot be used, at most 0 may be"), "{error}");
    let summary = pack(&config(&input, &output, one_shard))?;
    assert_eq!((summary.kept_shards, summary.rejects), (1, 1));
    assert_eq!(rejects(&output), [reject]);
    assert!(!output.join(format!(".{shard}.json")).exists());
    Ok(())
}

#[test]
fn quasi_random_order_packs_the_same_samples_otherwise() -> Outcome {
    let root = tempfile::tempdir()?;
    let (input, random, quasi) = (root.path().join("in"), root.path().join("random"), root.path().join("quasi"));
    photos(&input, &[("a", 9), ("b", 8)])?;
    let change = |o: &mut PackOptions| o.order = Some(PackingOrder::Quasi);
    pack(&config(&input, &random, |_| ()))?;
    pack(&config(&input, &quasi, change))?;
    let ids = |path: &Path| -> Outcome<Vec<u64>> {
        let set = ShardSet::open(path)?;
        Ok((0..set.len()).map(|index| set.sample_id(index)).collect())
    };
    let (mut a, mut b) = (ids(&random)?, ids(&quasi)?);
    assert_ne!(a, b);
    a.sort_unstable();
    b.sort_unstable();
    assert_eq!(a, b);
    verify(&verify_args(&quasi, Some(&input)))?;
    let error = pack(&config(&input, &random, change)).unwrap_err();
    assert!(matches!(&error, Error::Chain { what, .. } if what == "`order`"), "{error}");
    Ok(())
}

#[test]
fn sound_folder_has_an_empty_list_of_rejects() -> Outcome {
    let root = tempfile::tempdir()?;
    let (input, output) = (root.path().join("in"), root.path().join("out"));
    photos(&input, &[("a", 2)])?;
    pack(&config(&input, &output, |_| ()))?;
    assert_eq!(rejects(&output), []);
    Ok(())
}

#[test]
fn too_many_rejects_fail_and_a_larger_limit_goes_on() -> Outcome {
    let root = tempfile::tempdir()?;
    let (input, output) = (root.path().join("in"), root.path().join("out"));
    photos(&input, &[("a", 6)])?;
    cut(&input.join("a/001.jpg"))?;
    cut(&input.join("a/005.jpg"))?;
    let error = pack(&config(&input, &output, |_| ())).unwrap_err();
    assert!(error.to_string().contains("2 of 6 images cannot be used, at most 1"), "{error}");
    assert!(error.hint().is_some_and(|hint| hint.contains("--max-rejects")));
    assert_eq!(rejects(&output).len(), 2);
    assert!(!output.join(MANIFEST_FILE).exists());
    let more = |o: &mut PackOptions| o.max_rejects = Some("50%".parse().unwrap());
    assert_eq!(pack(&config(&input, &output, more))?.samples, 4);
    for i in 0..6 {
        cut(&input.join(format!("a/{i:03}.{}", if i == 3 { "png" } else { "jpg" })))?;
    }
    let all = |o: &mut PackOptions| o.max_rejects = Some("100%".parse().unwrap());
    let error = pack(&config(&input, &root.path().join("none"), all)).unwrap_err();
    assert!(error.to_string().contains("none of the 6 images"), "{error}");
    Ok(())
}

#[test]
fn flat_folder_has_no_labels_and_eval_center_one_view() -> Outcome {
    let root = tempfile::tempdir()?;
    let output = root.path().join("out");
    photos(&root.path().join("in"), &[("a", 5)])?;
    let change = |o: &mut PackOptions| (o.recipe, o.views) = (Some("eval-center".into()), None);
    pack(&config(&root.path().join("in/a"), &output, change))?;
    let set = ShardSet::open(&output)?;
    assert_eq!((set.views(), set.len(), set.classes().len()), (1, 5, 0));
    assert!(set.shards().iter().all(|shard| shard.labels().iter().all(|&label| label == -1)));
    Ok(())
}

#[test]
fn verify_finds_what_is_wrong() -> Outcome {
    let root = tempfile::tempdir()?;
    let (input, good) = (root.path().join("in"), root.path().join("good"));
    photos(&input, &[("a", 7)])?;
    pack(&config(&input, &good, |_| ()))?;
    assert_eq!(verify(&verify_args(&good, Some(&input)))?.compared_samples, 7);

    let bad = copy(&good, &root.path().join("bad"))?;
    let shard = bad.join("shard-00001.safetensors");
    let mut bytes = fs::read(&shard)?;
    bytes[5000] ^= 1;
    write_atomic(&shard, &bytes)?;
    let error = verify(&verify_args(&bad, None)).unwrap_err();
    assert!(matches!(&error, Error::Damaged { fault: Fault::Hash { .. }, .. }), "{error}");
    cut(&shard)?;
    assert!(matches!(verify(&verify_args(&bad, None)).unwrap_err(), Error::Damaged { .. }));
    fs::remove_file(bad.join("rejects.jsonl"))?;
    assert!(verify(&verify_args(&bad, None)).is_err());

    // another image under the name of one that was packed
    fs::copy(input.join("a/000.jpg"), input.join("a/001.jpg"))?;
    let error = verify(&verify_args(&good, Some(&input))).unwrap_err();
    assert!(matches!(&error, Error::Chain { what, .. } if what.contains("a/001.jpg")), "{error}");
    fs::remove_file(input.join("a/001.jpg"))?;
    assert!(matches!(verify(&verify_args(&good, Some(&input))).unwrap_err(), Error::Chain { .. }));
    Ok(())
}

#[test]
fn other_parameters_and_another_decoder_are_found() -> Outcome {
    // A set whose manifest is consistent, but whose views were drawn by another seed.
    let root = tempfile::tempdir()?;
    let (input, output) = (root.path().join("in"), root.path().join("out"));
    photos(&input, &[("a", 3)])?;
    pack(&config(&input, &output, |_| ()))?;
    let manifest = Manifest::read(&output, Stage::DataPrep)?;
    let mut identity = manifest.identity.clone();
    identity.seed += 1;
    Manifest::new(identity, manifest.counts, manifest.details, manifest.files).write(&output)?;
    let error = verify(&verify_args(&output, None)).unwrap_err();
    assert!(error.to_string().contains("other parameters than its recipe draws"), "{error}");

    // and one that names another decoder
    let manifest = Manifest::read(&output, Stage::DataPrep)?;
    let mut identity = manifest.identity.clone();
    identity.seed -= 1;
    identity.config["decoder"] = "another 1.0".into();
    Manifest::new(identity, manifest.counts, manifest.details, manifest.files).write(&output)?;
    assert!(verify(&verify_args(&output, None)).is_ok());
    let error = verify(&verify_args(&output, Some(&input))).unwrap_err();
    assert!(matches!(&error, Error::Chain { what, .. } if what == "decoder"), "{error}");
    Ok(())
}

#[test]
fn contact_sheet_has_a_row_for_each_sample() -> Outcome {
    let root = tempfile::tempdir()?;
    let (input, output, grid) = (root.path().join("in"), root.path().join("out"), root.path().join("grid.png"));
    photos(&input, &[("a", 5), ("b", 2)])?;
    pack(&config(&input, &output, |o| o.views = Some(3)))?;
    let portrait = root.path().join("one.png");
    let mut args = InspectArgs {
        shards: output.clone(),
        grid: Some(grid.clone()),
        samples: 4,
        views: 2,
        sample: Some("b/001.jpg".into()),
        picture: Some(portrait.clone()),
        json: false,
    };
    let description = inspect(&args)?;
    assert_eq!(description.classes, [("a".to_string(), 5), ("b".to_string(), 2)]);
    let set = ShardSet::open(&output)?;
    let sample =
        (0..set.len()).find(|&index| set.sample_id(index) == sample_id("b/001.jpg")).ok_or("no such sample")?;
    for (path, rows, index) in [(&grid, 4, 0), (&portrait, 1, sample)] {
        let sheet = decode::read(path)?;
        let (row_px, column_px) = (16 + 5 * 14 + 8, 150 + 8);
        assert_eq!((sheet.height(), sheet.width()), (rows * row_px + 8, 2 * column_px + 8));
        for view in 0..2 {
            let left = 8 + view * column_px;
            let shown: Vec<u8> =
                (22..38).flat_map(|y| sheet.pixels()[(y * sheet.width() + left) * 3..][..48].to_vec()).collect();
            assert!(shown == set.pixels(index, view)?, "view {view} of {index}");
        }
    }
    for (text, found) in [("0", true), ("b/no.jpg", false), ("7", false)] {
        args.sample = Some(text.into());
        assert_eq!(inspect(&args).map_err(|e| e.exit_status()).is_ok(), found, "{text}");
    }
    args.sample = Some(format!("{:016x}", set.sample_id(3)));
    assert!(inspect(&args).is_ok());
    Ok(())
}

#[test]
fn plan_tells_the_real_size_and_writes_nothing() -> Outcome {
    let root = tempfile::tempdir()?;
    let (input, output) = (root.path().join("in"), root.path().join("out"));
    photos(&input, &[("a", 8)])?;
    let config = config(&input, &output, |_| ());
    let before = plan(&config)?;
    assert!(!output.exists());
    assert_eq!((before.samples, before.shards, before.classes), (8, 3, 1));
    assert!(before.samples_per_sec_per_thread > 0.0 && before.bytes_to_write == before.bytes);
    let real = pack(&config)?.bytes;
    assert!(real.abs_diff(before.bytes) <= 3 * 8192, "{real} {}", before.bytes);
    assert_eq!(plan(&config)?.bytes_to_write, 0);
    Ok(())
}
