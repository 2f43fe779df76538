//! Every layout that can be packed: the same bytes whatever happens, views redrawn exactly, and other views of one source set.

mod fixtures;

use std::fs;
use std::path::{Path, PathBuf};

use data_prep::args::{BenchArgs, InspectArgs, PackOptions, RedrawArgs, VerifyArgs};
use data_prep::bench::bench;
use data_prep::inspect::inspect;
use data_prep::pack::pack;
use data_prep::redraw::redraw;
use data_prep::source::SourceOptions;
use data_prep::verify::verify;
use fixtures::{Outcome, config, contents, copy, cut, photos};
use shared::cli::CommonArgs;
use shared::io::{write_atomic, write_json};
use shared::manifest::{MANIFEST_FILE, Manifest, Stage};
use shared::shard::{Codec, ShardSet, Store, ViewReader};
use shared::transforms::View;
use shared::transforms::decode;
use shared::{Error, Fault};

const MULTI_CROP: &str = "name = 'two-and-small'\n[[global]]\n[global.crop]\nkind = 'random-resized'\nscale = [0.3, 1.0]\n\
                          [global.flip]\nprobability = 0.5\n[local]\nsize = 8\n[[local.view]]\n[local.view.crop]\n\
                          kind = 'random-resized'\nscale = [0.05, 0.3]\n";

fn layouts() -> impl Iterator<Item = (Store, Codec)> {
    [Store::Views, Store::Source].into_iter().flat_map(|store| [Codec::Raw, Codec::Jpeg].map(|codec| (store, codec)))
}

fn of_layout(store: Store, codec: Codec) -> impl Fn(&mut PackOptions) {
    move |options| {
        (options.store, options.codec) = (Some(store), Some(codec));
        if store == Store::Source {
            options.short_side = Some("24".parse().expect("a number"));
        }
    }
}

fn original(options: &mut PackOptions) {
    (options.store, options.short_side) = (Some(Store::Source), Some("original".parse().expect("a word")));
}

fn verify_args(shards: &Path, source: Option<&Path>) -> VerifyArgs {
    VerifyArgs {
        shards: shards.into(),
        source: source.map(Into::into),
        options: SourceOptions::default(),
        samples: 100,
        quiet: true,
        json: false,
    }
}

fn redraw_args(shards: &Path, recipe: &str, output: &Path) -> RedrawArgs {
    RedrawArgs {
        shards: shards.into(),
        recipe: recipe.into(),
        views: None,
        size: Some(16),
        seed: None,
        output: output.into(),
        common: CommonArgs { quiet: true, ..CommonArgs::default() },
    }
}

/// All views of a set, by sample.
fn views_of(set: &ShardSet) -> Outcome<Vec<(u64, Vec<u8>)>> {
    let mut reader = ViewReader::default();
    let mut samples = Vec::new();
    for index in 0..set.len() {
        let mut pixels = Vec::new();
        let views = (0..set.views()).map(View::Global).chain((0..set.local_views()).map(View::Local));
        for view in views {
            pixels.extend_from_slice(reader.read(set, index, view)?);
        }
        samples.push((set.sample_id(index), pixels));
    }
    Ok(samples)
}

#[test]
fn every_layout_is_the_same_at_any_number_of_threads_and_after_a_kill() -> Outcome {
    let root = tempfile::tempdir()?;
    let input = root.path().join("in");
    photos(&input, &[("cat", 5), ("dog", 6)])?;
    cut(&input.join("dog/001.jpg"))?;
    for (number, (store, codec)) in layouts().enumerate() {
        let at = |name: &str| root.path().join(format!("{number}-{name}"));
        let straight = config(&input, &at("straight"), of_layout(store, codec));
        assert_eq!(pack(&straight)?.samples, 10);
        let mut threads = config(&input, &at("threads"), of_layout(store, codec));
        threads.threads = 5;
        pack(&threads)?;
        assert!(contents(&at("straight"))? == contents(&at("threads"))?, "{store:?} {codec:?}");

        let resumed = copy(&at("straight"), &at("resumed"))?;
        let manifest = Manifest::read(&resumed, Stage::DataPrep)?;
        fs::remove_file(resumed.join(MANIFEST_FILE))?;
        fs::remove_file(resumed.join("shard-00001.safetensors"))?;
        write_json(resumed.join("unfinished.json"), &manifest.identity)?;
        assert_eq!(pack(&config(&input, &resumed, of_layout(store, codec)))?.kept_shards, 3);
        assert!(contents(&at("straight"))? == contents(&resumed)?, "{store:?} {codec:?}");

        let checked = verify(&verify_args(&resumed, Some(&input)))?;
        assert_eq!((checked.samples, checked.compared_samples), (10, 10));
    }
    Ok(())
}

#[test]
fn views_redrawn_from_originals_equal_stored_ones() -> Outcome {
    let root = tempfile::tempdir()?;
    let input = root.path().join("in");
    photos(&input, &[("a", 7), ("b", 4)])?;
    let file = root.path().join("multi.toml");
    write_atomic(&file, MULTI_CROP.as_bytes())?;
    for (number, recipe) in ["moco-v2", file.to_str().expect("UTF-8")].into_iter().enumerate() {
        let [views, source] = ["views", "source"].map(|name| root.path().join(format!("{name}-{number}")));
        let by = |options: &mut PackOptions| options.recipe = Some(recipe.into());
        pack(&config(&input, &views, by))?;
        pack(&config(&input, &source, |options| {
            by(options);
            original(options);
        }))?;
        let (views, source) = (ShardSet::open(&views)?, ShardSet::open(&source)?);
        assert_eq!((views.local_views(), source.local_views()), if number == 0 { (0, 0) } else { (2, 2) });
        assert!(views_of(&views)? == views_of(&source)?);
        for index in 0..views.len() {
            let view = View::Global(1);
            assert_eq!(views.view_params(index, view)?, source.view_params(index, view)?);
        }
    }
    Ok(())
}

#[test]
fn source_images_are_resized_by_their_short_side_and_never_enlarged() -> Outcome {
    let root = tempfile::tempdir()?;
    let (input, output) = (root.path().join("in"), root.path().join("out"));
    photos(&input, &[("a", 12)])?;
    pack(&config(&input, &output, of_layout(Store::Source, Codec::Raw)))?;
    let set = ShardSet::open(&output)?;
    let mut shrunk = 0;
    for entry in fs::read_dir(input.join("a"))? {
        let path = entry?.path();
        let name = format!("a/{}", path.file_name().expect("a name").to_string_lossy());
        let id = shared::shard::sample_id(&name);
        let index = (0..set.len()).find(|&index| set.sample_id(index) == id).expect("packed");
        let image = decode::read(&path)?;
        let (height, width) = (image.height(), image.width());
        let params = set.view_params(index, View::Global(0))?;
        let expected = if height.min(width) <= 24 {
            (height, width)
        } else if width <= height {
            (24 * height / width, 24)
        } else {
            (24, 24 * width / height)
        };
        shrunk += usize::from(expected != (height, width));
        assert_eq!((params[16] as usize, params[17] as usize), expected, "{name}");
    }
    assert!((1..12).contains(&shrunk), "{shrunk} of 12");
    Ok(())
}

#[test]
fn one_source_set_gives_the_views_of_every_recipe() -> Outcome {
    let root = tempfile::tempdir()?;
    let (input, source) = (root.path().join("in"), root.path().join("sets/source"));
    photos(&input, &[("a", 7), ("b", 4)])?;
    pack(&config(&input, &source, original))?;
    for (recipe, views, seed) in [("eval-center", None, None), ("linear-train", Some(3), Some(8))] {
        let packed = root.path().join(format!("packed-{recipe}"));
        pack(&config(&input, &packed, |options| {
            (options.recipe, options.views, options.seed) = (Some(recipe.into()), views, seed);
        }))?;
        let redrawn = root.path().join(format!("sets/{recipe}"));
        let args = RedrawArgs { views, seed, ..redraw_args(&source, recipe, &redrawn) };
        let summary = redraw(&args)?;
        assert_eq!((summary.samples, summary.already_finished), (11, false));
        assert!(redraw(&args)?.already_finished);
        let (packed, set) = (ShardSet::open(&packed)?, ShardSet::open(&redrawn)?);
        // Another seed packs in another order.
        let [mut wanted, mut found] = [views_of(&packed)?, views_of(&set)?];
        wanted.sort();
        found.sort();
        assert!(wanted == found, "{recipe}");
        assert_eq!((set.classes(), set.views()), (packed.classes(), packed.views()));
        assert_ne!(set.manifest().fingerprint, set.files_manifest().fingerprint);

        assert_eq!(verify(&verify_args(&redrawn, Some(&input)))?.compared_samples, 11);
        let grid = root.path().join("grid.png");
        let args = InspectArgs {
            shards: redrawn.clone(),
            grid: Some(grid.clone()),
            samples: 2,
            views: 1,
            sample: Some("0".into()),
            picture: Some(root.path().join("one.png")),
            json: false,
        };
        let description = inspect(&args)?;
        assert_eq!((description.recipe.as_str(), description.store), (recipe, Store::Source));
        assert!(description.redraws.is_some() && description.bytes > 0 && grid.exists());
        assert!(description.to_string().contains("redrawn"), "{description}");

        // Views of a redrawn set are views of the same images.
        let again = root.path().join(format!("sets/{recipe}-again"));
        redraw(&redraw_args(&redrawn, "eval-center", &again))?;
        assert_eq!(ShardSet::open(&again)?.files_directory().canonicalize()?, source.canonicalize()?);
    }
    Ok(())
}

#[test]
fn redrawn_set_moves_with_its_images_and_misses_them_elsewhere() -> Outcome {
    let root = tempfile::tempdir()?;
    let (input, source) = (root.path().join("in"), root.path().join("sets/source"));
    photos(&input, &[("a", 5)])?;
    pack(&config(&input, &source, original))?;
    let set = root.path().join("sets/val");
    redraw(&redraw_args(&source, "eval-center", &set))?;
    let fingerprint = ShardSet::open(&set)?.manifest().fingerprint.clone();
    fs::rename(root.path().join("sets"), root.path().join("moved"))?;
    let (set, source) = (root.path().join("moved/val"), root.path().join("moved/source"));
    assert_eq!(ShardSet::open(&set)?.manifest().fingerprint, fingerprint);

    // changed
    photos(&input, &[("a", 6)])?;
    let away = root.path().join("away");
    fs::rename(&source, &away)?;
    pack(&config(&input, &source, original))?;
    let error = ShardSet::open(&set).unwrap_err();
    assert!(matches!(&error, Error::Chain { what, .. } if what.contains("source images")), "{error}");
    assert!(error.hint().is_some_and(|hint| hint.contains("redraw")));
    // gone
    fs::remove_dir_all(&source)?;
    assert!(matches!(ShardSet::open(&set).unwrap_err(), Error::Missing { .. }));
    // back, but with a shard cut short
    fs::rename(&away, &source)?;
    ShardSet::open(&set)?;
    cut(&source.join("shard-00001.safetensors"))?;
    assert!(matches!(ShardSet::open(&set).unwrap_err(), Error::Damaged { fault: Fault::Length { .. }, .. }));
    Ok(())
}

#[test]
fn ready_made_views_cannot_be_redrawn() -> Outcome {
    let root = tempfile::tempdir()?;
    let (input, views, source) = (root.path().join("in"), root.path().join("views"), root.path().join("source"));
    photos(&input, &[("a", 3)])?;
    pack(&config(&input, &views, |_| ()))?;
    let output = root.path().join("out");
    let error = redraw(&redraw_args(&views, "eval-center", &output)).unwrap_err();
    assert!(error.hint().is_some_and(|hint| hint.contains("--store source")), "{error}");
    pack(&config(&input, &source, original))?;
    let twice = RedrawArgs { views: Some(2), ..redraw_args(&source, "eval-center", &output) };
    assert_eq!(redraw(&twice).unwrap_err().exit_status(), 2);
    assert!(!output.exists());
    redraw(&redraw_args(&source, "eval-center", &output))?;
    let error = redraw(&redraw_args(&source, "linear-train", &output)).unwrap_err();
    assert!(matches!(&error, Error::Chain { .. }), "{error}");
    Ok(())
}

#[test]
fn verify_finds_a_jpeg_that_cannot_be_decoded() -> Outcome {
    // Hashes agree with a manifest that was made for the damage.
    let root = tempfile::tempdir()?;
    let (input, output) = (root.path().join("in"), root.path().join("out"));
    photos(&input, &[("a", 3)])?;
    for store in [Store::Views, Store::Source] {
        let mut again = config(&input, &output, of_layout(store, Codec::Jpeg));
        again.overwrite = true;
        pack(&again)?;
        let shard = output.join("shard-00000.safetensors");
        let mut bytes = fs::read(&shard)?;
        bytes[4096..4136].fill(0);
        let entry = write_atomic(&shard, &bytes)?;
        let manifest = Manifest::read(&output, Stage::DataPrep)?;
        let files =
            manifest.files.iter().map(|file| if file.path == entry.path { entry.clone() } else { file.clone() });
        let files = files.collect();
        Manifest::new(manifest.identity, manifest.counts, manifest.details, files).write(&output)?;
        let error = verify(&verify_args(&output, None)).unwrap_err();
        assert!(matches!(&error, Error::Damaged { .. }) && error.to_string().contains("JPEG"), "{error}");
    }
    Ok(())
}

#[test]
fn sizes_that_plans_expect_are_near_the_real_ones() -> Outcome {
    let root = tempfile::tempdir()?;
    let input = root.path().join("in");
    photos(&input, &[("a", 9)])?;
    for (number, (store, codec)) in layouts().enumerate() {
        let output = root.path().join(number.to_string());
        let request = config(&input, &output, of_layout(store, codec));
        let real = pack(&request)?.bytes;
        let set = ShardSet::open(&output)?;
        // Measured pixels make the estimate exact but for headers and the list of rejects.
        let pixels: usize = (0..3)
            .map(|shard| {
                let path = output.join(shared::shard::shard_file_name(shard));
                let file = shared::tensor_file::TensorFile::open(path)?;
                let name = if (store, codec) == (Store::Views, Codec::Raw) { "pixels" } else { "bytes" };
                Ok::<_, Error>(file.bytes(name)?.len())
            })
            .sum::<Result<_, _>>()?;
        let estimate = request.shards.sample_bytes_of(pixels as f64 / set.len() as f64) * set.len() as u64;
        assert!(real.abs_diff(estimate) <= 3 * 4200, "{store:?} {codec:?}: {real} {estimate}");
        assert!(request.shards.sample_bytes() > 0);
    }
    Ok(())
}

#[test]
fn bench_reads_every_layout_and_refuses_senseless_requests() -> Outcome {
    let root = tempfile::tempdir()?;
    let input = root.path().join("in");
    photos(&input, &[("a", 6)])?;
    let args = |shards: PathBuf| BenchArgs {
        shards,
        batch_size: None,
        seconds: 0.02,
        threads: Some(2),
        need: Some(1.0),
        json: false,
    };
    for (store, codec) in [(Store::Views, Codec::Raw), (Store::Views, Codec::Jpeg), (Store::Source, Codec::Raw)] {
        let output = root.path().join(format!("{store:?}-{codec:?}"));
        pack(&config(&input, &output, of_layout(store, codec)))?;
        let measured = bench(&args(output.clone()))?;
        assert_eq!((measured.batch_size, measured.views_read), (6, 2));
        assert_eq!(measured.readings.len(), if measured.can_drop_cache { 6 } else { 3 });
        assert!(measured.readings.iter().all(|reading| reading.samples_per_sec > 0.0 && reading.samples >= 6));
        assert!(measured.copy_bytes_per_sec > 0.0 && measured.to_string().contains("times the 1 that training takes"));
        let wrong: [&dyn Fn(&mut BenchArgs); 3] =
            [&|args| args.batch_size = Some(7), &|args| args.seconds = 0.0, &|args| args.need = Some(f64::NAN)];
        for change in wrong {
            let mut args = args(output.clone());
            change(&mut args);
            assert_eq!(bench(&args).map_err(|e| e.exit_status()).err(), Some(2));
        }
    }
    Ok(())
}
