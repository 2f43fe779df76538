//! ImageNet (ILSVRC 2012) in its official archives: a tar of class tars for training, a flat tar and the development kit for
//! validation.
//!
//! # Source
//! <https://www.image-net.org/challenges/LSVRC/2012/2012-downloads.php>; the kit's `readme.txt` describes `meta.mat` and the ground
//! truth.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use flate2::read::GzDecoder;
use shared::{Error, Fault, Result};

use super::builder::{Builder, is_image};
use super::folders::label_by_directory;
use super::tar_index::{Member, for_each_member, open};
use super::{Archive, Place, Split, matlab};

const TRAIN: &str = "ILSVRC2012_img_train.tar";
const VAL: &str = "ILSVRC2012_img_val.tar";
const TEST: &str = "ILSVRC2012_img_test_v10102019.tar";
const KIT: &str = "ILSVRC2012_devkit_t12";
const GROUND_TRUTH: &str = "data/ILSVRC2012_validation_ground_truth.txt";
const META: &str = "data/meta.mat";

/// Synsets up to this number are classes, those above are their hypernyms.
const CLASSES: i64 = 1000;

/// The kit has 2.5 MB; its parts are not larger than this when unpacked.
const LARGEST_KIT_FILE: u64 = 64 << 20;

/// Whether a file has the name of an official archive.
pub(super) fn is_archive(path: &Path) -> bool {
    path.file_name().is_some_and(|name| [TRAIN, VAL, TEST].iter().any(|known| name == *known))
}

/// Whether a directory holds official archives.
pub(super) fn has_archives(directory: &Path) -> bool {
    [TRAIN, VAL].iter().any(|name| directory.join(name).is_file())
}

/// Lists the samples of a directory with official archives, or of one of them.
pub(super) fn list(input: &Path, split: Option<Split>) -> Result<Builder> {
    let (directory, own) = if input.is_dir() {
        (input, None)
    } else {
        let own = [(TRAIN, Split::Train), (VAL, Split::Val), (TEST, Split::Test)];
        let own = own.into_iter().find(|(name, _)| input.ends_with(name)).map(|(_, split)| split);
        (input.parent().unwrap_or(Path::new(".")), own)
    };
    match split.or(own).unwrap_or(Split::Train) {
        Split::Train => list_train(&existing(directory, TRAIN)?),
        Split::Val => list_val(&existing(directory, VAL)?, directory),
        Split::Test => {
            Err(Error::usage("the test images of ImageNet have no labels and no archive that is read here: use `val`"))
        }
    }
}

fn existing(directory: &Path, name: &str) -> Result<PathBuf> {
    let path = directory.join(name);
    if path.is_file() {
        return Ok(path);
    }
    let hint =
        format!("put it beside the others, or choose another part by `--split` (train needs {TRAIN}, val {VAL})");
    Err(Error::Missing { what: "archive", path, hint })
}

/// Reads the headers of the class tars inside the archive; an image is a range of the outer file.
fn list_train(path: &Path) -> Result<Builder> {
    let (file, end) = open(path)?;
    let mut builder = Builder::default();
    let archive = builder.add_archive(Archive::Plain(path.to_path_buf()));
    let mut class_tars = Vec::new();
    let damage = for_each_member(&file, (0, end), |member| class_tars.push(member));
    if let Err(reason) = damage {
        builder.refuse(TRAIN, reason);
    }
    for tar in class_tars {
        let class = base_name(&tar.name).strip_suffix(".tar");
        let (Some(class), None) = (class, &tar.fault) else {
            let reason =
                tar.fault.unwrap_or_else(|| "it is no class: the archive must hold a tar for each class".into());
            builder.refuse(&tar.name, reason);
            continue;
        };
        builder.classes.push(class.to_string());
        let range = (tar.offset, tar.offset + tar.bytes);
        let damage = for_each_member(&file, range, |member| {
            let name = format!("{class}/{}", base_name(&member.name));
            add(&mut builder, &name, archive, member);
        });
        if let Err(reason) = damage {
            builder.refuse(&tar.name, reason);
        }
    }
    builder.classes.sort_unstable();
    builder.classes.dedup();
    label_by_directory(&mut builder);
    Ok(builder)
}

fn list_val(path: &Path, directory: &Path) -> Result<Builder> {
    let kit = Kit::read(directory)?;
    let (file, end) = open(path)?;
    let mut builder = Builder::default();
    let archive = builder.add_archive(Archive::Plain(path.to_path_buf()));
    builder.classes = kit.classes();
    let damage = for_each_member(&file, (0, end), |member| {
        let base = base_name(&member.name).to_string();
        match kit.class_of(&base) {
            Ok(class) => add(&mut builder, &format!("{class}/{base}"), archive, member),
            Err(reason) if is_image(&base) => builder.refuse(&base, reason),
            Err(_) => {}
        }
    });
    if let Err(reason) = damage {
        builder.refuse(VAL, reason);
    }
    label_by_directory(&mut builder);
    Ok(builder)
}

fn add(builder: &mut Builder, name: &str, archive: u32, member: Member) {
    match member.fault {
        _ if !is_image(name) => {}
        Some(reason) => builder.refuse(name, reason),
        None => builder.push(name, -1, member.bytes, Place::Range { archive, offset: member.offset }),
    }
}

fn base_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or_default()
}

/// What the development kit says about the validation images.
struct Kit {
    /// Class names by `ILSVRC2012_ID` - 1.
    wnids: Vec<Option<String>>,
    /// `ILSVRC2012_ID` of each validation image.
    ids: Vec<i64>,
}

impl Kit {
    /// Reads the kit, packed or unpacked.
    fn read(directory: &Path) -> Result<Self> {
        let unpacked = directory.join(KIT);
        let (mut truth, mut meta) = (None, None);
        let mut path = unpacked.clone();
        if unpacked.is_dir() {
            for (name, found) in [(GROUND_TRUTH, &mut truth), (META, &mut meta)] {
                let file = File::open(unpacked.join(name)).map_err(Error::io("open", unpacked.join(name)))?;
                *found = Some(bounded(file, &unpacked.join(name))?);
            }
        } else {
            path = directory.join(format!("{KIT}.tar.gz"));
            if !path.is_file() {
                let hint = format!("the classes of the validation images are in it: put it beside {VAL}");
                return Err(Error::Missing { what: "development kit", path, hint });
            }
            let file = File::open(&path).map_err(Error::io("open", &path))?;
            let damaged = |e: std::io::Error| Error::damaged(&path, Fault::Syntax(e.to_string()));
            // the whole of it is bounded, so that headers are as well
            let mut archive = tar::Archive::new(GzDecoder::new(file).take(LARGEST_KIT_FILE));
            for entry in archive.entries().map_err(damaged)? {
                let entry = entry.map_err(damaged)?;
                let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
                if name.ends_with(GROUND_TRUTH) {
                    truth = Some(bounded(entry, &path)?);
                } else if name.ends_with(META) {
                    meta = Some(bounded(entry, &path)?);
                }
            }
        }
        let missing = |name: &str| Error::damaged(&path, Fault::Syntax(format!("it holds no `{name}`")));
        let truth = truth.ok_or_else(|| missing(GROUND_TRUTH))?;
        let meta = meta.ok_or_else(|| missing(META))?;
        Self::parse(&truth, &meta).map_err(|reason| Error::damaged(&path, Fault::Syntax(reason)))
    }

    fn parse(truth: &[u8], meta: &[u8]) -> Result<Self, String> {
        let mut wnids = Vec::new();
        for (id, wnid) in matlab::read_synsets(meta)? {
            if !(1..=CLASSES).contains(&id) {
                continue;
            }
            let index = id as usize - 1;
            if wnids.len() <= index {
                wnids.resize(index + 1, None);
            }
            if wnids[index].replace(wnid).is_some() {
                return Err(format!("`meta.mat` has two synsets of number {id}"));
            }
        }
        let text = String::from_utf8_lossy(truth);
        let parse = |(line, text): (usize, &str)| {
            text.trim().parse().map_err(|e| format!("line {} of the ground truth is no number: {e}", line + 1))
        };
        let ids = text.lines().enumerate().map(parse).collect::<Result<_, String>>()?;
        Ok(Self { wnids, ids })
    }

    fn classes(&self) -> Vec<String> {
        let mut classes: Vec<String> = self.wnids.iter().flatten().cloned().collect();
        classes.sort_unstable();
        classes.dedup();
        classes
    }

    /// The class of an image by the number at the end of its name, which counts the lines of the ground truth from 1.
    fn class_of(&self, name: &str) -> Result<&str, String> {
        let digits = name.rsplit_once('.').map(|(stem, _)| stem).and_then(|stem| stem.rsplit('_').next());
        let number: Option<usize> = digits.and_then(|digits| digits.parse().ok());
        let number = number.ok_or("its name has no number at the end, so its class is not known")?;
        let id = number.checked_sub(1).and_then(|index| self.ids.get(index));
        let id =
            *id.ok_or_else(|| format!("the ground truth has {} lines, none for image {number}", self.ids.len()))?;
        let wnid = usize::try_from(id - 1).ok().and_then(|index| self.wnids.get(index)).and_then(Option::as_deref);
        wnid.ok_or_else(|| format!("its class {id} is not in `meta.mat`"))
    }
}

fn bounded(file: impl Read, path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(LARGEST_KIT_FILE).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
    Ok(bytes)
}
