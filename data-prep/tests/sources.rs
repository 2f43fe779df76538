//! Inputs of every format: found by looking, named whatever the packaging, read in place.

mod fixtures;

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use data_prep::pack::pack;
use data_prep::source::{InputFormat, Listing, Payload, Reader, Sample, SourceOptions, Split};
use fixtures::{Outcome, config, contents, photos};
use flate2::Compression;
use flate2::write::GzEncoder;
use shared::io::write_atomic;
use shared::manifest::{Manifest, Stage};
use shared::shard::sample_id;
use shared::transforms::{RgbImage, decode};

fn made(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/sources").join(name)
}

fn open(input: &Path) -> Listing {
    Listing::open(input, &SourceOptions::default()).expect("a sound input")
}

fn part(split: Split) -> SourceOptions {
    SourceOptions { split: Some(split), ..SourceOptions::default() }
}

fn names(listing: &Listing) -> Vec<(&str, i64)> {
    listing.samples.iter().map(|sample| (&*sample.name, sample.label)).collect()
}

/// The picture that `make.py` gives for a number.
fn picture(number: usize) -> RgbImage {
    let pixels = (0..7 * 9 * 3).map(|i| ((i / 27) * 31 + (i / 3 % 9) * 17 + (i % 3) * 59 + number * 73) as u8);
    RgbImage::new(7, 9, pixels.collect()).expect("the size is right")
}

fn load(listing: &Listing, sample: &Sample, reader: &mut Reader) -> Result<RgbImage, String> {
    match reader.load(listing, sample)? {
        Payload::Encoded(bytes) => decode::decode(bytes).map_err(|fault| fault.to_string()),
        Payload::Pixels(image) => Ok(image),
    }
}

fn add(tar: &mut tar::Builder<Vec<u8>>, name: &str, bytes: &[u8]) -> Outcome {
    let mut header = tar::Header::new_gnu();
    header.set_size(bytes.len() as u64);
    header.set_mode(0o644);
    header.set_cksum();
    Ok(tar.append_data(&mut header, name, bytes)?)
}

/// The same images as class folders, as official archives and as Kaggle's folders; the three classes have the kit's names.
fn imagenet(root: &Path) -> Outcome {
    let classes = ["n01440764", "n01751748", "n02119789"];
    let numbers_of_kit = [2, 3, 1];
    let (folders, official, kaggle) = (root.join("folders"), root.join("official"), root.join("kaggle"));
    let images = kaggle.join("ILSVRC/Data/CLS-LOC");
    photos(&root.join("loose"), &[("a", 8), ("b", 6), ("c", 5)])?;
    fs::create_dir_all(&official)?;
    fs::create_dir_all(images.join("val"))?;
    let class_tars = root.join("class-tars");
    fs::create_dir_all(&class_tars)?;
    let (mut train, mut val) = (tar::Builder::new(Vec::new()), tar::Builder::new(Vec::new()));
    let (mut truth, mut solution) = (Vec::new(), vec!["ImageId,PredictionString\n".to_string()]);
    for (class, folder) in classes.into_iter().zip(["a", "b", "c"]) {
        let mut class_tar = tar::Builder::new(Vec::new());
        let mut files: Vec<PathBuf> = fs::read_dir(root.join("loose").join(folder))?
            .map(|entry| entry.map(|e| e.path()))
            .collect::<Result<_, _>>()?;
        files.sort();
        for (i, file) in files.iter().enumerate() {
            let bytes = fs::read(file)?;
            let write = |directory: PathBuf, name: &str| -> Outcome {
                fs::create_dir_all(&directory)?;
                write_atomic(directory.join(name), &bytes)?;
                Ok(())
            };
            if i % 4 == 1 {
                truth.push(numbers_of_kit[classes.iter().position(|c| *c == class).expect("a class")]);
                let name = format!("ILSVRC2012_val_{:08}", truth.len());
                solution.push(format!("{name},{class} 85 1 499 272 \n"));
                write(folders.join("val").join(class), &format!("{name}.JPEG"))?;
                write(images.join("val"), &format!("{name}.JPEG"))?;
                add(&mut val, &format!("{name}.JPEG"), &bytes)?;
            } else {
                let name = format!("{class}_{i}.JPEG");
                write(folders.join("train").join(class), &name)?;
                write(images.join("train").join(class), &name)?;
                add(&mut class_tar, &name, &bytes)?;
            }
        }
        let class_tar = class_tar.into_inner()?;
        write_atomic(class_tars.join(format!("{class}.tar")), &class_tar)?;
        add(&mut train, &format!("{class}.tar"), &class_tar)?;
    }
    let truth = truth.into_iter().map(|number| number.to_string()).collect::<Vec<_>>().join("\n");
    write_atomic(official.join("ILSVRC2012_img_train.tar"), &train.into_inner()?)?;
    write_atomic(official.join("ILSVRC2012_img_val.tar"), &val.into_inner()?)?;
    write_atomic(
        official.join("ILSVRC2012_devkit_t12.tar.gz"),
        &kit(&truth, &fs::read(made("meta_compressed.mat"))?)?,
    )?;
    write_atomic(kaggle.join("LOC_val_solution.csv"), solution.concat().as_bytes())?;
    write_atomic(
        kaggle.join("LOC_synset_mapping.txt"),
        b"n02119789 kit fox\nn01440764 tench, Tinca tinca\nn01751748 sea snake\n",
    )?;
    Ok(())
}

fn kit(truth: &str, meta: &[u8]) -> Outcome<Vec<u8>> {
    let mut kit = tar::Builder::new(Vec::new());
    let data = "ILSVRC2012_devkit_t12/data";
    add(&mut kit, &format!("{data}/ILSVRC2012_validation_ground_truth.txt"), truth.as_bytes())?;
    add(&mut kit, &format!("{data}/meta.mat"), meta)?;
    let mut packed = GzEncoder::new(Vec::new(), Compression::fast());
    packed.write_all(&kit.into_inner()?)?;
    Ok(packed.finish()?)
}

#[test]
fn imagenet_gives_the_same_set_from_archives_kaggle_and_class_folders() -> Outcome {
    let root = tempfile::tempdir()?;
    imagenet(root.path())?;
    for (split, samples) in [(Split::Train, 14), (Split::Val, 5)] {
        let mut sets = Vec::new();
        for (input, format) in [
            ("folders", InputFormat::ClassFolders),
            ("official", InputFormat::Ilsvrc2012),
            ("kaggle", InputFormat::Kaggle),
            ("kaggle/ILSVRC/Data/CLS-LOC", InputFormat::Kaggle),
        ] {
            let input = root.path().join(input);
            assert_eq!(Listing::open(&input, &part(split))?.format, format);
            let output = root.path().join(format!("out-{}-{}", split.name(), sets.len()));
            assert_eq!(pack(&config(&input, &output, |o| o.source = part(split)))?.samples, samples);
            let fingerprint = Manifest::read(&output, Stage::DataPrep)?.fingerprint;
            let mut files = contents(&output)?;
            files.remove("manifest.json");
            sets.push((fingerprint, files));
        }
        assert!(sets.windows(2).all(|pair| pair[0] == pair[1]), "{split:?}");
    }
    let (tars, whole) = (open(&root.path().join("class-tars")), open(&root.path().join("official")));
    assert!(tars.format == InputFormat::Ilsvrc2012 && tars.as_input().fingerprint == whole.as_input().fingerprint);
    let val = Listing::open(&root.path().join("official"), &part(Split::Val))?;
    assert_eq!(&*val.samples[0].name, "n01440764/ILSVRC2012_val_00000001.JPEG");
    let file = root.path().join("official/ILSVRC2012_img_val.tar");
    assert_eq!(open(&file).samples, val.samples);
    Ok(())
}

#[test]
fn development_kit_is_read_packed_and_unpacked_and_missed_by_name() -> Outcome {
    let root = tempfile::tempdir()?;
    imagenet(root.path())?;
    let official = root.path().join("official");
    let val = Listing::open(&official, &part(Split::Val))?;
    fs::remove_file(official.join("ILSVRC2012_devkit_t12.tar.gz"))?;
    let error = Listing::open(&official, &part(Split::Val)).unwrap_err();
    assert!(error.to_string().contains("ILSVRC2012_devkit_t12.tar.gz") && error.exit_status() == 1, "{error}");
    let data = official.join("ILSVRC2012_devkit_t12/data");
    fs::create_dir_all(&data)?;
    write_atomic(data.join("ILSVRC2012_validation_ground_truth.txt"), b"2\n2\n3\n3\n1\n")?;
    // the other form in which scipy and MATLAB write
    fs::copy(made("meta.mat"), data.join("meta.mat"))?;
    assert_eq!(Listing::open(&official, &part(Split::Val))?.samples, val.samples);
    // prefixes of the file, and the file with bytes changed, end in an answer
    let meta = fs::read(made("meta.mat"))?;
    let path = data.join("meta.mat");
    let write =
        |bytes: &[u8]| fs::File::options().write(true).truncate(true).open(&path).and_then(|mut f| f.write_all(bytes));
    for length in (0..meta.len()).step_by(7) {
        write(&meta[..length])?;
        assert!(Listing::open(&official, &part(Split::Val)).is_err(), "{length} bytes");
    }
    for at in (128..meta.len()).step_by(3) {
        let mut changed = meta.clone();
        changed[at] ^= 0xff;
        write(&changed)?;
        drop(Listing::open(&official, &part(Split::Val)));
    }
    Ok(())
}

#[test]
fn images_that_no_table_names_are_rejects() -> Outcome {
    let root = tempfile::tempdir()?;
    imagenet(root.path())?;
    let val = root.path().join("kaggle/ILSVRC/Data/CLS-LOC/val");
    fs::rename(val.join("ILSVRC2012_val_00000002.JPEG"), val.join("unknown.JPEG"))?;
    let listing = Listing::open(&root.path().join("kaggle"), &part(Split::Val))?;
    let mut reader = Reader::default();
    let reasons: Vec<(&str, String)> = (listing.samples.iter())
        .filter_map(|sample| Some((&*sample.name, load(&listing, sample, &mut reader).err()?)))
        .collect();
    assert_eq!(reasons.len(), 2);
    assert!(
        reasons[0].0 == "n01440764/ILSVRC2012_val_00000002.JPEG" && reasons[0].1.contains("not there"),
        "{reasons:?}"
    );
    assert!(reasons[1].0 == "unknown.JPEG" && reasons[1].1.contains("does not name it"), "{reasons:?}");

    // an archive with one image more than the ground truth has lines
    let official = root.path().join("official");
    write_atomic(official.join("ILSVRC2012_devkit_t12.tar.gz"), &kit("2\n2\n3\n9\n", &fs::read(made("meta.mat"))?)?)?;
    let listing = Listing::open(&official, &part(Split::Val))?;
    let reason = |name: &str| {
        let sample = listing.samples.iter().find(|sample| &*sample.name == name).expect("it is listed");
        load(&listing, sample, &mut Reader::default()).unwrap_err()
    };
    assert!(reason("ILSVRC2012_val_00000004.JPEG").contains("class 9 is not in"));
    assert!(reason("ILSVRC2012_val_00000005.JPEG").contains("has 4 lines"));
    Ok(())
}

#[test]
fn webdataset_written_by_its_own_library_is_read_by_byte_range() -> Outcome {
    let listing = open(&made("webdataset.tar"));
    assert_eq!(listing.format, InputFormat::Webdataset);
    let expected = [
        ("some/0000.png", 0),
        ("some/0001.png", 2),
        ("some/0002.png", 4),
        ("some/0003.png", 6),
        ("some/0004.png", 1),
        ("some/0005.png", -1),
    ];
    assert_eq!(names(&listing), expected);
    assert_eq!(listing.classes, ["0", "1", "2", "3", "4", "5", "6"]);
    let mut reader = Reader::default();
    for (index, sample) in listing.samples.iter().enumerate().rev() {
        assert_eq!(load(&listing, sample, &mut reader)?, picture(60 + index), "{}", sample.name);
    }
    Ok(())
}

#[test]
fn tars_of_one_directory_are_told_apart_only_where_names_are_not_unique() -> Outcome {
    let root = tempfile::tempdir()?;
    let image = fs::read(made("webdataset.tar"))?;
    for name in ["train-0.tar", "train-1.tar", "val-0.tar"] {
        write_atomic(root.path().join(name), &image)?;
    }
    let listing = open(root.path());
    assert_eq!(listing.samples.len(), 12);
    assert_eq!(names(&listing)[6], ("train-1.tar/some/0000.png", 0));
    assert_eq!(listing.samples[6].id, sample_id("train-1.tar/some/0000.png"));
    let val = Listing::open(root.path(), &part(Split::Val))?;
    assert_eq!(names(&val)[0], ("some/0000.png", 0));
    let error = Listing::open(root.path(), &part(Split::Test)).unwrap_err();
    assert!(error.exit_status() == 2 && error.to_string().contains("--split train"), "{error}");
    Ok(())
}

#[test]
fn gnu_and_pax_archives_of_python_give_the_same_names() {
    let long = format!("{}/{}/{}.png", "d".repeat(120), "e".repeat(120), "f".repeat(80));
    for name in ["gnu.tar", "pax.tar"] {
        let listing = open(&made(name));
        let found: Vec<&str> = listing.samples.iter().map(|sample| &*sample.name).collect();
        assert_eq!(found, ["Plain.png", "café/中.png", &long, "hard.png", "plain.png", "soft.png"], "{name}");
        let mut reader = Reader::default();
        let results: Vec<_> = listing.samples.iter().map(|sample| load(&listing, sample, &mut reader)).collect();
        // names that differ in case are two samples
        for (index, number) in [(0, 76), (1, 73), (2, 72), (4, 70)] {
            assert_eq!(results[index], Ok(picture(number)), "{name} {index}");
        }
        for index in [3, 5] {
            let reason = results[index].as_ref().unwrap_err();
            assert!(reason.contains("a link to `plain.png`"), "{reason}");
        }
    }
}

#[test]
fn parquet_of_pyarrow_is_read_row_by_row_in_any_order() -> Outcome {
    let root = tempfile::tempdir()?;
    fs::create_dir(root.path().join("data"))?;
    for name in ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "validation-00000-of-00001.parquet"] {
        fs::copy(made(name), root.path().join("data").join(name))?;
    }
    let listing = open(root.path());
    assert_eq!((listing.format, listing.samples.len()), (InputFormat::Parquet, 40));
    assert_eq!(listing.classes, ["cat", "dog", "emu"]);
    assert_eq!(names(&listing)[31], ("animals/031.png", 1));
    let mut reader = Reader::default();
    for step in 0..120 {
        // 40 and 7 have no common divisor: every row, never the next one
        let index = step * 7 % 40;
        let sample = &listing.samples[index];
        assert_eq!(load(&listing, sample, &mut reader)?, picture(index), "{}", sample.name);
    }
    for (index, sample) in listing.samples.iter().enumerate() {
        assert_eq!(load(&listing, sample, &mut reader)?, picture(index), "{}", sample.name);
    }
    Ok(())
}

#[test]
fn parquet_rows_without_image_or_sound_label_are_rejects() {
    let listing = open(&made("validation-00000-of-00001.parquet"));
    let file = "validation-00000-of-00001.parquet";
    let found: Vec<String> = listing.samples.iter().map(|sample| sample.name.to_string()).collect();
    assert_eq!(found, [0, 1, 2, 3, 4].map(|row| format!("{file}/{row}")));
    let mut reader = Reader::default();
    let results: Vec<_> = listing.samples.iter().map(|sample| load(&listing, sample, &mut reader)).collect();
    assert_eq!((&results[0], &results[2]), (&Ok(picture(50)), &Ok(picture(51))));
    assert_eq!(listing.samples[2].label, -1);
    assert!(results[1].as_ref().is_err_and(|reason| reason.contains("holds no image")));
    assert!(results[3].as_ref().is_err_and(|reason| reason.contains("holds no image")));
    assert!(results[4].as_ref().unwrap_err().contains("label 7 is outside the 3 classes"));
}

#[test]
fn parquet_column_of_bytes_needs_no_path_and_no_class_names() -> Outcome {
    let listing = open(&made("plain.parquet"));
    assert_eq!(names(&listing), [("plain.parquet/0", 5), ("plain.parquet/1", 0), ("plain.parquet/2", 2)]);
    assert_eq!(listing.classes.len(), 6);
    let mut reader = Reader::default();
    for (index, sample) in listing.samples.iter().enumerate() {
        assert_eq!(load(&listing, sample, &mut reader)?, picture(80 + index));
    }
    let error = Listing::open(&made("zstd.parquet"), &SourceOptions::default()).unwrap_err().to_string();
    assert!(error.contains("zstd.parquet") && error.contains("compressed by ZSTD"), "{error}");
    Ok(())
}

#[test]
fn cifar_pixels_are_taken_as_they_are() -> Outcome {
    let root = tempfile::tempdir()?;
    let record = |label: &[u8], seed: usize| -> Vec<u8> {
        label.iter().copied().chain((0..3072).map(|i| (i * 7 + i / 1024 * 5 + seed) as u8)).collect()
    };
    let ten = root.path().join("cifar-10-batches-bin");
    fs::create_dir(&ten)?;
    write_atomic(ten.join("batches.meta.txt"), b"airplane\nautomobile\nbird\n\n")?;
    write_atomic(ten.join("data_batch_1.bin"), &[record(&[2], 0), record(&[9], 1)].concat())?;
    write_atomic(ten.join("data_batch_2.bin"), &record(&[0], 2))?;
    write_atomic(ten.join("test_batch.bin"), &[record(&[1], 3), vec![0; 100]].concat())?;
    let listing = open(root.path());
    assert_eq!((listing.format, listing.classes.len()), (InputFormat::Cifar10, 3));
    assert_eq!(names(&listing), [("data_batch_1.bin/0", 2), ("data_batch_1.bin/1", -1), ("data_batch_2.bin/0", 0)]);
    let mut reader = Reader::default();
    let image = load(&listing, &listing.samples[2], &mut reader)?;
    for (x, y, c) in [(0, 0, 0), (31, 0, 1), (5, 30, 2)] {
        let at = c * 1024 + y * 32 + x;
        assert_eq!(image.pixels()[(y * 32 + x) * 3 + c], (at * 7 + at / 1024 * 5 + 2) as u8);
    }
    let reason = load(&listing, &listing.samples[1], &mut reader).unwrap_err();
    assert!(reason.contains("label 9 is outside the 3 classes"), "{reason}");
    let val = Listing::open(&ten, &part(Split::Val))?;
    assert_eq!(val.samples.len(), 2);
    assert_eq!(load(&val, &val.samples[1], &mut Reader::default()), Err("the file ends inside it".into()));

    let hundred = root.path().join("hundred");
    fs::create_dir(&hundred)?;
    write_atomic(hundred.join("fine_label_names.txt"), b"apple\nbear\n")?;
    write_atomic(hundred.join("train.bin"), &record(&[19, 1], 4))?;
    let listing = open(&hundred);
    assert_eq!((listing.format, names(&listing)[0]), (InputFormat::Cifar100, ("train.bin/0", 1)));
    let input = root.path().join("cifar-10-batches-bin");
    let summary = pack(&config(&input, &root.path().join("out"), |o| o.max_rejects = Some("1".parse().unwrap())))?;
    assert_eq!((summary.samples, summary.rejects), (2, 1));
    Ok(())
}

#[test]
fn list_takes_numbers_or_names_as_labels() -> Outcome {
    let root = tempfile::tempdir()?;
    photos(&root.path().join("in"), &[("a b", 3)])?;
    let list = root.path().join("list.txt");
    write_atomic(&list, b"in/a b/000.jpg\t2\r\n\n./in/a b/001.jpg,0\nin/a b/002.jpg\n")?;
    let listing = open(&list);
    assert_eq!(listing.format, InputFormat::List);
    assert_eq!(names(&listing), [("in/a b/000.jpg", 2), ("in/a b/001.jpg", 0), ("in/a b/002.jpg", -1)]);
    assert_eq!(listing.classes, ["0", "1", "2"]);
    assert!(listing.samples.iter().all(|sample| load(&listing, sample, &mut Reader::default()).is_ok()));

    let elsewhere = root.path().join("elsewhere.csv");
    write_atomic(&elsewhere, b"a b/000.jpg,zebra\na b/001.jpg,ant\na b/no-such.jpg,ant\n")?;
    let options = SourceOptions { root: Some(root.path().join("in")), ..SourceOptions::default() };
    let listing = Listing::open(&elsewhere, &options)?;
    assert_eq!(listing.classes, ["ant", "zebra"]);
    assert_eq!(names(&listing), [("a b/000.jpg", 1), ("a b/001.jpg", 0), ("a b/no-such.jpg", 0)]);
    assert!(load(&listing, &listing.samples[2], &mut Reader::default()).unwrap_err().contains("cannot read it"));

    write_atomic(&list, b"in/a b/000.jpg 1\nin/a b/001.jpg cat\n")?;
    let error = Listing::open(&list, &SourceOptions::default()).unwrap_err();
    assert!(error.to_string().contains("line 1 has the label `1`, line 2 `cat`"), "{error}");
    write_atomic(&list, b"in/a b/000.jpg 1\nin/a b/001.jpg 5000000000\n")?;
    let listing = open(&list);
    assert!(load(&listing, &listing.samples[1], &mut Reader::default()).unwrap_err().contains("out of range"));
    let error = Listing::open(&root.path().join("in"), &options).unwrap_err();
    assert_eq!(error.exit_status(), 2);
    Ok(())
}

#[test]
fn named_format_wins_over_looking() -> Outcome {
    let root = tempfile::tempdir()?;
    photos(root.path(), &[("a", 2), ("b", 1)])?;
    let flat = SourceOptions { input_format: Some(InputFormat::Flat), ..SourceOptions::default() };
    let listing = Listing::open(root.path(), &flat)?;
    assert_eq!((listing.classes.len(), names(&listing)[2]), (0, ("b/000.jpg", -1)));
    fs::copy(made("webdataset.tar"), root.path().join("x.tar"))?;
    let error = Listing::open(root.path(), &SourceOptions::default()).unwrap_err();
    assert!(error.to_string().contains("two ways") && error.hint().is_some_and(|h| h.contains("--input-format")));
    assert_eq!(Listing::open(root.path(), &flat)?.samples.len(), 3);
    let tars = SourceOptions { input_format: Some(InputFormat::Webdataset), ..SourceOptions::default() };
    assert_eq!(Listing::open(root.path(), &tars)?.samples.len(), 6);
    Ok(())
}

#[test]
fn split_fraction_takes_the_stated_count_of_each_class_and_leaves_the_rest() -> Outcome {
    let root = tempfile::tempdir()?;
    photos(root.path(), &[("a", 10), ("b", 5), ("c", 1)])?;
    let options = |split, seed| SourceOptions {
        split: Some(split),
        split_fraction: Some(0.3),
        split_seed: Some(seed),
        ..SourceOptions::default()
    };
    let take = |split, seed| -> Outcome<Vec<(String, i64)>> {
        let listing = Listing::open(root.path(), &options(split, seed))?;
        assert_eq!(listing.classes, ["a", "b", "c"]);
        Ok(names(&listing).into_iter().map(|(name, label)| (name.to_string(), label)).collect())
    };
    let (train, val) = (take(Split::Train, 0)?, take(Split::Val, 0)?);
    // 3, 1.5 and 0.3
    let count = |samples: &[(String, i64)]| [0, 1, 2].map(|label| samples.iter().filter(|s| s.1 == label).count());
    assert_eq!((count(&val), count(&train)), ([3, 2, 0], [7, 3, 1]));
    let mut all = [train, val.clone()].concat();
    all.sort();
    let every = open(root.path());
    assert_eq!(all.iter().map(|(n, l)| (n.as_str(), *l)).collect::<Vec<_>>(), names(&every));
    assert_ne!(take(Split::Val, 1)?, val);
    assert_eq!(take(Split::Val, 0)?, val);
    // which samples are set aside depends on their names, not on what else is there
    fs::remove_dir_all(root.path().join("b"))?;
    let listing = Listing::open(root.path(), &options(Split::Val, 0))?;
    assert!(names(&listing).iter().all(|(name, _)| val.iter().any(|(other, _)| other == name)));
    // the default part of a split is the one for training
    let rest = SourceOptions { split_fraction: Some(0.3), ..SourceOptions::default() };
    assert_eq!(Listing::open(root.path(), &rest)?.samples.len(), 8);
    Ok(())
}

#[test]
fn subset_takes_what_the_file_names_after_the_split() -> Outcome {
    let root = tempfile::tempdir()?;
    imagenet(root.path())?;
    let list = root.path().join("1percent.txt");
    let subset = |text: &str| -> Result<Vec<String>, String> {
        write_atomic(&list, text.as_bytes()).expect("it can be written");
        let options = SourceOptions { subset: Some(list.clone()), ..SourceOptions::default() };
        let listing = Listing::open(&root.path().join("official"), &options).map_err(|e| e.to_string())?;
        Ok(listing.samples.iter().map(|sample| sample.name.to_string()).collect())
    };
    let found = subset("n02119789_0.JPEG\n\nn01440764/n01440764_2.JPEG\nn02119789_0.JPEG\n")?;
    assert_eq!(found, ["n01440764/n01440764_2.JPEG", "n02119789/n02119789_0.JPEG"]);
    let error = subset("n02119789_0.JPEG\na\nb\nc\nd\n").unwrap_err();
    assert!(error.contains("4 lines") && error.contains("`a`, `b`, `c` is the name of no sample"), "{error}");
    // an image of the other part
    assert!(subset("ILSVRC2012_val_00000001.JPEG\n").is_err());

    photos(&root.path().join("in"), &[("a", 4), ("b", 4)])?;
    let options = |list: &Path| SourceOptions { subset: Some(list.into()), ..SourceOptions::default() };
    write_atomic(&list, b"000.jpg\n")?;
    let error = Listing::open(&root.path().join("in"), &options(&list)).unwrap_err();
    assert!(error.to_string().contains("`000.jpg` is the last part of several names"), "{error}");
    Ok(())
}

#[test]
fn subset_fraction_is_a_share_of_each_class_but_at_least_one() -> Outcome {
    let root = tempfile::tempdir()?;
    photos(root.path(), &[("a", 12), ("b", 2)])?;
    let options = SourceOptions { subset_fraction: Some(0.1), ..SourceOptions::default() };
    let listing = Listing::open(root.path(), &options)?;
    assert_eq!(listing.samples.iter().map(|sample| sample.label).collect::<Vec<_>>(), [0, 1]);
    for (share, both) in [(0.0, false), (1.5, false), (f64::NAN, false), (0.5, true)] {
        let options = SourceOptions {
            subset_fraction: Some(share),
            subset: both.then(|| "list.txt".into()),
            ..SourceOptions::default()
        };
        assert_eq!(Listing::open(root.path(), &options).unwrap_err().exit_status(), 2);
    }
    let error = Listing::open(root.path(), &part(Split::Val)).unwrap_err();
    assert!(error.exit_status() == 2 && error.to_string().contains("--split-fraction"), "{error}");
    Ok(())
}
