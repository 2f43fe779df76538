//! A set packed in parts, in process: the same files as one packed whole, and every mix-up refused.

mod fixtures;

use std::fs;
use std::path::Path;

use data_prep::PackConfig;
use data_prep::args::{FinishArgs, PackOptions};
use data_prep::finish::finish;
use data_prep::pack::{PackSummary, pack};
use fixtures::{Outcome, config, contents, cut, photos};
use shared::Error;
use shared::output::Part;

fn part(config: PackConfig, number: usize, of: usize) -> shared::Result<PackSummary> {
    pack(&config.for_part(Some(Part::new(number, of)?))?)
}

fn finish_args(output: &Path, max_rejects: Option<&str>) -> FinishArgs {
    let max_rejects = max_rejects.map(|text| text.parse().unwrap());
    FinishArgs { output: output.into(), max_rejects, json: false, quiet: true }
}

fn close(output: &Path) -> shared::Result<PackSummary> {
    finish(&finish_args(output, None))
}

/// All names in a directory, hidden ones included.
fn names(directory: &Path) -> Outcome<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(directory)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

#[test]
fn parts_in_any_order_make_the_files_of_a_whole_set() -> Outcome {
    let root = tempfile::tempdir()?;
    let (input, whole) = (root.path().join("in"), root.path().join("whole"));
    photos(&input, &[("a", 12), ("b", 9)])?;
    cut(&input.join("b/001.jpg"))?;
    let straight = pack(&config(&input, &whole, |_| ()))?;
    // 7 shards: as 3 parts, as 1, and as more parts than there are shards; one part is run again each time
    let orders: [&[usize]; 4] = [&[1, 2, 3, 1], &[3, 1, 1, 2], &[1, 1], &[9, 1, 8, 2, 7, 3, 3, 6, 4, 5]];
    for (i, order) in orders.into_iter().enumerate() {
        let output = root.path().join(format!("parts-{i}"));
        let of = order.len() - 1;
        let mut seen = Vec::new();
        for &number in order {
            let summary = part(config(&input, &output, |_| ()), number, of)?;
            assert_eq!(summary.already_finished, seen.contains(&number), "{summary}");
            assert!(summary.to_string().starts_with(&format!("part {number} of {of} of `")), "{summary}");
            seen.push(number);
        }
        let closed = close(&output)?;
        assert!(!closed.already_finished);
        assert_eq!((closed.samples, closed.rejects, closed.shards), (20, 1, 7));
        assert_eq!((&closed.fingerprint, closed.bytes), (&straight.fingerprint, straight.bytes));
        assert!(contents(&output)? == contents(&whole)?, "{order:?}");
        assert_eq!(names(&output)?, names(&whole)?);
        let again = close(&output)?;
        assert!(again.already_finished && again.to_string().contains("is already finished"), "{again}");
        assert!(part(config(&input, &output, |_| ()), 1, of)?.already_finished);
    }
    assert!(close(&whole)?.already_finished);
    Ok(())
}

#[test]
fn parts_packed_at_the_same_time_make_the_files_of_a_whole_set() -> Outcome {
    let root = tempfile::tempdir()?;
    let (input, whole, output) = (root.path().join("in"), root.path().join("whole"), root.path().join("parts"));
    photos(&input, &[("a", 20)])?;
    pack(&config(&input, &whole, |_| ()))?;
    let packed: Vec<shared::Result<PackSummary>> = std::thread::scope(|scope| {
        // every part twice: of the two, one packs, and the other one is refused or comes after it
        let numbers = [1, 2, 3, 1, 2, 3];
        let threads = numbers.map(|number| {
            let (input, output) = (&input, &output);
            scope.spawn(move || part(config(input, output, |_| ()), number, 3))
        });
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for number in 1..=3 {
        let of_part = packed.iter().flatten().filter(|s| s.part.is_some_and(|part| part.number() == number));
        assert_eq!(of_part.filter(|summary| !summary.already_finished).count(), 1);
    }
    for error in packed.iter().filter_map(|result| result.as_ref().err()) {
        // "another process" in the moment before the other one has told its name
        assert!(error.to_string().contains("is being written by"), "{error}");
    }
    close(&output)?;
    assert!(contents(&output)? == contents(&whole)?);
    assert_eq!(names(&output)?, names(&whole)?);
    Ok(())
}

#[test]
fn lost_and_damaged_parts_are_named_and_made_again() -> Outcome {
    let root = tempfile::tempdir()?;
    let (input, whole, output) = (root.path().join("in"), root.path().join("whole"), root.path().join("parts"));
    photos(&input, &[("a", 20)])?;
    pack(&config(&input, &whole, |_| ()))?;
    for number in [1, 2, 4] {
        part(config(&input, &output, |_| ()), number, 4)?;
    }
    let error = close(&output).unwrap_err();
    assert!(error.to_string().contains("part 3 of 4 is missing"), "{error}");
    assert!(error.hint().is_some_and(|hint| hint.contains("`data-prep pack ... --part 3/4`")));
    part(config(&input, &output, |_| ()), 3, 4)?;
    cut(&output.join("shard-00001.safetensors"))?;
    let error = close(&output).unwrap_err();
    assert!(error.to_string().contains("part 2 of 4 is missing or unfinished"), "{error}");
    // the sound shard of that part is kept
    assert_eq!(part(config(&input, &output, |_| ()), 2, 4)?.kept_shards, 1);
    close(&output)?;
    assert!(contents(&output)? == contents(&whole)?);
    Ok(())
}

#[test]
fn rejects_of_all_parts_are_judged_together() -> Outcome {
    let root = tempfile::tempdir()?;
    let (input, whole, output) = (root.path().join("in"), root.path().join("whole"), root.path().join("parts"));
    photos(&input, &[("a", 12)])?;
    for number in [0, 2, 5, 8] {
        cut(&input.join(format!("a/{number:03}.jpg")))?;
    }
    let limit = |text: &'static str| move |o: &mut PackOptions| o.max_rejects = Some(text.parse().unwrap());
    let mut of_parts = Vec::new();
    for number in 1..=3 {
        of_parts.push(part(config(&input, &output, limit("3")), number, 3)?.rejects);
    }
    assert!(of_parts.iter().sum::<u64>() == 4 && of_parts.iter().all(|&rejects| rejects < 4), "{of_parts:?}");
    for _ in 0..2 {
        let error = finish(&finish_args(&output, Some("3"))).unwrap_err();
        assert!(error.to_string().contains("4 of 12 images cannot be used, at most 3 may be"), "{error}");
        assert_eq!(fs::read_to_string(output.join("rejects.jsonl"))?.lines().count(), 4);
    }
    finish(&finish_args(&output, Some("4")))?;
    pack(&config(&input, &whole, limit("4")))?;
    assert!(contents(&output)? == contents(&whole)?);

    // a part that has more than all parts may have stops before the others waste their time
    let early = root.path().join("early");
    let error = part(config(&input, &early, limit("1")), 1, 1).unwrap_err();
    assert!(error.to_string().contains("at most 1 of all 12 may be"), "{error}");
    Ok(())
}

#[test]
fn other_numbers_settings_and_whole_runs_are_refused() -> Outcome {
    let root = tempfile::tempdir()?;
    let (input, output) = (root.path().join("in"), root.path().join("parts"));
    photos(&input, &[("a", 8)])?;
    part(config(&input, &output, |_| ()), 1, 2)?;
    let before = contents(&output)?;
    let sentence = |result: shared::Result<PackSummary>| result.unwrap_err().to_string();
    let other = part(config(&input, &output, |_| ()), 1, 3);
    assert!(sentence(other).contains("in 2 parts, not in 3"));
    let other = part(config(&input, &output, |o| o.seed = Some(9)), 2, 2).unwrap_err();
    assert!(matches!(&other, Error::Chain { what, .. } if what == "seed"), "{other}");
    assert!(sentence(pack(&config(&input, &output, |_| ()))).contains("is being made in 2 parts"));
    assert!(before == contents(&output)?);
    let mut overwriting = config(&input, &output, |_| ());
    overwriting.overwrite = true;
    pack(&overwriting)?;
    assert!(close(&output)?.already_finished);
    assert!(matches!(close(&root.path().join("no")), Err(Error::Missing { .. })));
    Ok(())
}
