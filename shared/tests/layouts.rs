//! Every layout of a shard set from the outside: what was stored comes back, views are redrawn, and each damage is named.
#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail loudly")]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use safetensors::tensor::Dtype;
use shared::data_loader::normalized_batch;
use shared::manifest::{Identity, Manifest, Stage};
use shared::rng::KeyedRng;
use shared::shard::{
    Codec, PackingOrder, SampleViews, ShardConfig, ShardSet, ShardWriter, Store, StoredJpeg, ViewReader, encode_jpeg,
    shard_file_name,
};
use shared::tensor_file::{GrowingTensorFile, TensorFile, TensorSpec};
use shared::transforms::decode::decode;
use shared::transforms::normalize::Normalization;
use shared::transforms::recipe::LocalViews;
use shared::transforms::{Recipe, RgbImage, Scratch, View};
use shared::{Error, Fault, Result};

const VIEWS: usize = 3;
const SIZE: usize = 16;
const LOCAL_SIZE: usize = 8;
const SEED: u64 = 4;
const LAYOUTS: [(Store, Codec); 4] = [
    (Store::Views, Codec::Raw),
    (Store::Views, Codec::Jpeg),
    (Store::Source, Codec::Raw),
    (Store::Source, Codec::Jpeg),
];

/// Two global views by turns would need more blocks: here one, with two small views for each.
fn multi_crop() -> Recipe {
    let mut recipe = Recipe::moco_v2();
    let view = recipe.global[0].clone();
    recipe.local = Some(LocalViews { size: LOCAL_SIZE, view: vec![view.clone(), view] });
    recipe
}

fn config(recipe: Recipe, store: Store, codec: Codec) -> ShardConfig {
    ShardConfig {
        recipe,
        views: VIEWS,
        size: SIZE,
        store,
        codec,
        order: PackingOrder::Random,
        shard_samples: 3,
        decoder: "none".into(),
        short_side: (store == Store::Source).then_some(0),
        jpeg: (codec == Codec::Jpeg).then(|| StoredJpeg::new(90)),
    }
}

/// A picture of its own for each sample; no two have the same size.
fn image(id: u64) -> RgbImage {
    let (height, width) = (20 + id as usize % 11, 41 - id as usize % 13);
    let mut rng = KeyedRng::new("test layouts", 0, &[id]);
    let value = |i: usize| ((i / 3 / width) * 5 + (i / 3 % width) * 2 + 50 * (i % 3)) % 200;
    let pixels = (0..height * width * 3).map(|i| (value(i) + rng.below(9)) as u8).collect();
    RgbImage::new(height, width, pixels).unwrap()
}

fn all_views(config: &ShardConfig) -> Vec<(View, usize)> {
    let locals = (0..config.recipe.local_views(VIEWS)).map(|w| (View::Local(w), LOCAL_SIZE));
    (0..VIEWS).map(|v| (View::Global(v), SIZE)).chain(locals).collect()
}

/// What is left of a picture in a JPEG, by the decoder of source images.
fn through_jpeg(pixels: &[u8], (height, width): (usize, usize)) -> RgbImage {
    let mut file = Vec::new();
    encode_jpeg(pixels, (height, width), 90, &mut file).unwrap();
    decode(&file).unwrap()
}

/// The pixels that a view of a sample must have when it is drawn from `image`.
fn expected(config: &ShardConfig, image: &RgbImage, id: u64, view: View, size: usize) -> Vec<u8> {
    let params = config.recipe.draw(SEED, id, view, image.height(), image.width());
    let mut pixels = vec![0; size * size * 3];
    config.recipe.apply(view, image, &params, size, &mut Scratch::default(), &mut pixels).unwrap();
    pixels
}

fn stored(config: &ShardConfig, id: u64) -> SampleViews {
    let mut sample = SampleViews::default();
    let mut store = |pixels: &[u8], size: (usize, usize), local: bool| {
        let pieces = if local { &mut sample.local } else { &mut sample.global };
        let before = pieces.bytes.len();
        match config.codec {
            Codec::Raw => pieces.bytes.extend_from_slice(pixels),
            Codec::Jpeg => encode_jpeg(pixels, size, 90, &mut pieces.bytes).unwrap(),
        }
        pieces.lengths.push(pieces.bytes.len() - before);
    };
    let image = image(id);
    let source = (image.height(), image.width());
    if config.store == Store::Source {
        store(image.pixels(), source, false);
        sample.source_size = [source.0 as u32, source.1 as u32];
        return sample;
    }
    for (view, size) in all_views(config) {
        store(&expected(config, &image, id, view, size), (size, size), matches!(view, View::Local(_)));
    }
    for (view, _) in all_views(config) {
        let pieces = if matches!(view, View::Local(_)) { &mut sample.local } else { &mut sample.global };
        pieces.params.extend(config.recipe.draw(SEED, id, view, source.0, source.1).to_row());
    }
    sample
}

/// Two shards of 3 and 2 samples; both announced 3.
fn write_set(directory: &Path, config: &ShardConfig) -> Result<Manifest> {
    let details = config.details(Vec::new());
    let mut files = Vec::new();
    for (index, ids) in [vec![10u64, 11, 12], vec![13, 14]].iter().enumerate() {
        let mut writer = ShardWriter::with_layout(directory.join(shard_file_name(index)), 3, &details)?;
        for &id in ids {
            writer.push_sample(id, -1, &stored(config, id))?;
        }
        files.push(writer.finish()?);
    }
    let identity = Identity::new(Stage::DataPrep, config, SEED, Vec::new())?;
    let counts = BTreeMap::from([("samples".to_string(), 5)]);
    let manifest = Manifest::new(identity, counts, serde_json::to_value(details).unwrap(), files);
    manifest.write(directory)?;
    Ok(manifest)
}

/// A set, its settings and the directory that holds it.
fn set_of(recipe: Recipe, store: Store, codec: Codec) -> (ShardSet, ShardConfig, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let config = config(recipe, store, codec);
    write_set(directory.path(), &config).unwrap();
    (ShardSet::open(directory.path()).unwrap(), config, directory)
}

#[test]
fn every_layout_gives_every_view_and_its_parameters() -> Result<()> {
    for recipe in [Recipe::moco_v2(), multi_crop()] {
        for (store, codec) in LAYOUTS {
            let (set, config, _directory) = set_of(recipe.clone(), store, codec);
            assert_eq!((set.views(), set.local_views()), (VIEWS, config.recipe.local_views(VIEWS)));
            let mut reader = ViewReader::default();
            for index in 0..set.len() {
                let id = set.sample_id(index);
                let source = image(id);
                for (view, size) in all_views(&config) {
                    let drawn = config.recipe.draw(SEED, id, view, source.height(), source.width());
                    assert_eq!(set.view_params(index, view)?, drawn.to_row());
                    assert_eq!(set.view_size(view), (size, size));
                    let wanted = match (store, codec) {
                        (_, Codec::Raw) => expected(&config, &source, id, view, size),
                        (Store::Source, Codec::Jpeg) => {
                            let kept = through_jpeg(source.pixels(), (source.height(), source.width()));
                            expected(&config, &kept, id, view, size)
                        }
                        (Store::Views, Codec::Jpeg) => {
                            through_jpeg(&expected(&config, &source, id, view, size), (size, size)).into_pixels()
                        }
                    };
                    let found = reader.read(&set, index, view)?;
                    let error: f64 = found.iter().zip(&wanted).map(|(a, b)| f64::from(a.abs_diff(*b)).powi(2)).sum();
                    // The decoder of source images may be another one.
                    let limit = if codec == Codec::Raw { 0.0 } else { 4.0 };
                    assert!(found.len() == wanted.len() && (error / wanted.len() as f64).sqrt() <= limit, "{view:?}");
                    let plain = (store, codec) == LAYOUTS[0];
                    if let View::Global(v) = view {
                        assert_eq!(set.pixels(index, v).is_ok_and(|pixels| pixels == wanted), plain);
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn one_reader_serves_many_sets_in_any_order() -> Result<()> {
    let sets: Vec<_> = LAYOUTS.iter().map(|&(store, codec)| set_of(Recipe::moco_v2(), store, codec)).collect();
    let mut shared = ViewReader::default();
    let mut rng = KeyedRng::new("test layouts", 1, &[]);
    for _ in 0..200 {
        let (set, ..) = &sets[rng.below(4)];
        let (index, view) = (rng.below(set.len()), View::Global(rng.below(VIEWS)));
        let found = shared.read(set, index, view)?.to_vec();
        assert!(found == ViewReader::default().read(set, index, view)?);
    }
    Ok(())
}

#[test]
fn batches_are_equal_from_views_and_sources_at_any_number_of_threads() -> Result<()> {
    let (views, ..) = &set_of(Recipe::moco_v2(), Store::Views, Codec::Raw);
    let (source, ..) = &set_of(Recipe::moco_v2(), Store::Source, Codec::Raw);
    let rows: Vec<_> = (0..15).map(|i| (i * 7 % 5, i % 3)).collect();
    let values = |set: &ShardSet, threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let batch = pool.install(|| normalized_batch(set, &rows, Normalization::Imagenet)).unwrap();
        assert_eq!(batch.dims(), [15, SIZE, SIZE, 3]);
        batch.flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    let wanted = values(views, 1);
    for threads in [1, 2, 3, 8] {
        assert!(values(source, threads) == wanted);
    }
    for set in [views, source] {
        set.will_need(&rows)?;
        set.will_need(&[])?;
    }
    Ok(())
}

#[test]
fn pictures_start_on_a_page_and_files_are_plain() {
    for (store, codec) in LAYOUTS {
        let (_set, _config, directory) = set_of(multi_crop(), store, codec);
        for index in 0..2 {
            let path = directory.path().join(shard_file_name(index));
            let bytes = fs::read(&path).unwrap();
            assert_eq!(u64::from_le_bytes(bytes[..8].try_into().unwrap()) + 8, 4096);
            let file = TensorFile::open(&path).unwrap();
            let first = if (store, codec) == LAYOUTS[0] { "pixels" } else { "bytes" };
            assert_eq!(file.names()[0], first);
        }
        let names: Vec<_> = fs::read_dir(directory.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names.len(), 3, "{names:?}");
    }
}

#[test]
fn what_is_stored_is_told_from_anything_else() -> Result<()> {
    for (store, codec) in LAYOUTS {
        let (set, config, _directory) = set_of(multi_crop(), store, codec);
        let shard = &set.shards()[0];
        let sample = stored(&config, 11);
        assert_eq!(shard.difference(1, &sample)?, None);
        assert!(!shard.holds(0, &sample)? && !shard.holds(1, &SampleViews::default())?);
        let mut other = sample.clone();
        other.global.bytes[5] ^= 1;
        let what = if store == Store::Source { "source image" } else { "view 0" };
        assert_eq!(shard.difference(1, &other)?.as_deref(), Some(what));
        if store == Store::Views {
            let mut other = sample.clone();
            *other.local.params.last_mut().unwrap() += 1.0;
            assert_eq!(shard.difference(1, &other)?.as_deref(), Some("local view 5"));
        }
    }
    Ok(())
}

#[test]
fn writer_refuses_samples_of_another_layout() -> Result<()> {
    let directory = tempfile::tempdir().unwrap();
    for (store, codec) in LAYOUTS {
        let config = config(multi_crop(), store, codec);
        let sample = stored(&config, 10);
        let changes: [fn(&mut SampleViews); 5] = [
            |s| s.global.bytes.truncate(s.global.bytes.len() - 1),
            |s| s.global.lengths[0] += 1,
            |s| s.global.lengths.push(0),
            |s| s.local.lengths.truncate(1),
            |s| s.global.params.push(0.0),
        ];
        for (number, change) in changes.into_iter().enumerate() {
            if store == Store::Source && number > 2 {
                continue;
            }
            let mut wrong = sample.clone();
            change(&mut wrong);
            let mut writer = ShardWriter::with_layout(directory.path().join("s"), 1, &config.details(Vec::new()))?;
            let error = writer.push_sample(1, -1, &wrong).unwrap_err();
            assert!(matches!(error, Error::Shape { .. }), "{store:?} {codec:?} {number}: {error}");
        }
    }
    Ok(())
}

/// Type, shape and bytes of the tensors of a file, in order.
type Parts = Vec<(String, Dtype, Vec<usize>, Vec<u8>)>;

/// Changes the second shard, keeping the manifest's lengths honest so that the shard's own checks are reached.
fn damaged(store: Store, codec: Codec, change: impl FnOnce(&mut Parts)) -> Result<ShardSet> {
    let (_set, _config, directory) = set_of(Recipe::moco_v2(), store, codec);
    let path = directory.path().join(shard_file_name(1));
    let file = TensorFile::open(&path)?;
    let part = |name: String| {
        let (dtype, shape) = (file.dtype(&name).unwrap(), file.shape(&name).unwrap().to_vec());
        let bytes = file.bytes(&name).unwrap().to_vec();
        (name, dtype, shape, bytes)
    };
    let mut parts: Parts = file.names().into_iter().map(part).collect();
    change(&mut parts);
    let mut writer = GrowingTensorFile::create(&path)?;
    for part in &parts {
        writer.append(&part.3)?;
    }
    let specs: Vec<_> = parts.iter().map(|part| TensorSpec::new(&part.0, part.1, &part.2)).collect();
    let entry = writer.finish(&specs)?;
    let manifest = Manifest::read(directory.path(), Stage::DataPrep)?;
    let files = vec![manifest.files[0].clone(), entry];
    Manifest::new(manifest.identity, manifest.counts, manifest.details, files).write(directory.path())?;
    ShardSet::open(directory.path())
}

fn part<'a>(parts: &'a mut Parts, name: &str) -> &'a mut (String, Dtype, Vec<usize>, Vec<u8>) {
    parts.iter_mut().find(|part| part.0 == name).unwrap()
}

/// Writes a number into a tensor.
fn set_number(parts: &mut Parts, name: &str, at: usize, number: u64) {
    let (_, dtype, _, bytes) = part(parts, name);
    let width = dtype.bitsize() / 8;
    bytes[at * width..(at + 1) * width].copy_from_slice(&number.to_le_bytes()[..width]);
}

#[track_caller]
fn refused_for(store: Store, codec: Codec, words: &str, change: impl FnOnce(&mut Parts)) {
    match damaged(store, codec, change) {
        Err(Error::Damaged { path, fault }) => {
            assert!(fault.to_string().contains(words), "{fault}");
            assert!(path.ends_with(shard_file_name(1)));
        }
        other => panic!("not damage: {other:?}"),
    }
}

#[test]
fn lost_tensors_are_named() {
    for name in ["bytes", "offsets", "view_params"] {
        refused_for(Store::Views, Codec::Jpeg, name, |parts| parts.retain(|part| part.0 != name));
    }
    for name in ["bytes", "offsets", "sizes"] {
        refused_for(Store::Source, Codec::Raw, name, |parts| parts.retain(|part| part.0 != name));
    }
}

#[test]
fn offsets_must_begin_at_0() {
    for (store, codec) in &LAYOUTS[1..] {
        refused_for(*store, *codec, "`offsets` go from 1", |parts| set_number(parts, "offsets", 0, 1));
    }
}

#[test]
fn offsets_must_end_with_the_bytes() {
    refused_for(Store::Source, Codec::Raw, "`offsets` go from 0", |parts| {
        let (_, _, shape, bytes) = part(parts, "bytes");
        bytes.push(0);
        shape[0] += 1;
    });
    refused_for(Store::Views, Codec::Jpeg, "`offsets` go from 0", |parts| {
        set_number(parts, "offsets", 6, u64::MAX);
    });
}

#[test]
fn offsets_must_rise() {
    for (store, codec) in &LAYOUTS[1..] {
        refused_for(*store, *codec, "must rise", |parts| set_number(parts, "offsets", 1, 0));
        refused_for(*store, *codec, "must rise", |parts| set_number(parts, "offsets", 1, u64::MAX));
    }
}

#[test]
fn offsets_must_be_one_more_than_pictures() {
    refused_for(Store::Source, Codec::Jpeg, "`offsets` has shape", |parts| {
        let (_, _, shape, bytes) = part(parts, "offsets");
        bytes.truncate(16);
        shape[0] = 2;
    });
}

#[test]
fn offsets_and_sizes_must_have_their_types() {
    refused_for(Store::Source, Codec::Raw, "`offsets` holds", |parts| part(parts, "offsets").1 = Dtype::I64);
    refused_for(Store::Source, Codec::Raw, "`sizes` holds", |parts| part(parts, "sizes").1 = Dtype::I32);
    refused_for(Store::Views, Codec::Jpeg, "`bytes` holds", |parts| part(parts, "bytes").1 = Dtype::I8);
}

#[test]
fn sizes_must_agree_with_plain_bytes() {
    refused_for(Store::Source, Codec::Raw, "cannot have", |parts| set_number(parts, "sizes", 1, 5));
    refused_for(Store::Source, Codec::Raw, "`sizes` has shape", |parts| part(parts, "sizes").2 = vec![4]);
}

#[test]
fn sizes_must_be_possible() {
    for codec in [Codec::Raw, Codec::Jpeg] {
        for side in [0, u64::from(u32::MAX)] {
            refused_for(Store::Source, codec, "cannot have", |parts| set_number(parts, "sizes", 2, side));
        }
    }
}

#[test]
fn broken_jpegs_are_damage_of_their_sample() {
    for store in [Store::Views, Store::Source] {
        let set = damaged(store, Codec::Jpeg, |parts| {
            let bytes = &mut part(parts, "bytes").3;
            bytes[..40].fill(0);
        })
        .unwrap();
        let mut reader = ViewReader::default();
        let error = reader.read(&set, 3, View::Global(0)).unwrap_err();
        assert!(matches!(&error, Error::Damaged { .. }), "{error}");
        assert!(error.to_string().contains("sample 000000000000000d"), "{error}");
        // and the reader goes on with others
        assert!(reader.read(&set, 0, View::Global(1)).is_ok());
    }
    // A size that is not the picture's.
    let set = damaged(Store::Source, Codec::Jpeg, |parts| set_number(parts, "sizes", 0, 7)).unwrap();
    let error = ViewReader::default().read(&set, 3, View::Global(0)).unwrap_err();
    assert!(matches!(&error, Error::Damaged { .. }), "{error}");
}

#[test]
fn jpegs_for_another_decoder_are_refused() -> Result<()> {
    for store in [Store::Views, Store::Source] {
        let directory = tempfile::tempdir().unwrap();
        let mut config = config(Recipe::moco_v2(), store, Codec::Jpeg);
        config.jpeg.as_mut().unwrap().decoder = "another 1.0".into();
        write_set(directory.path(), &config)?;
        let error = ShardSet::open(directory.path()).unwrap_err();
        assert!(matches!(&error, Error::Chain { what, .. } if what == "decoder"), "{error}");
        assert!(error.to_string().contains("another 1.0"), "{error}");
    }
    Ok(())
}

#[test]
fn details_must_be_those_of_the_configuration() -> Result<()> {
    let directory = tempfile::tempdir().unwrap();
    let config = config(Recipe::moco_v2(), Store::Source, Codec::Raw);
    let manifest = write_set(directory.path(), &config)?;
    for change in [
        |value: &mut serde_json::Value| value["details"]["views"] = 9.into(),
        |value: &mut serde_json::Value| value["details"]["height"] = 0.into(),
        |value: &mut serde_json::Value| value["identity"]["config"]["recipe"]["global"] = serde_json::json!([]),
    ] {
        let mut value = serde_json::to_value(&manifest).unwrap();
        change(&mut value);
        let changed: Manifest = serde_json::from_value(value).unwrap();
        Manifest::new(changed.identity, changed.counts, changed.details, changed.files).write(directory.path())?;
        match ShardSet::open(directory.path()) {
            Err(Error::Damaged { fault: Fault::Value(_), .. }) => {}
            other => panic!("not refused: {other:?}"),
        }
    }
    Ok(())
}
