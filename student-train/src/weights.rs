//! Weights made elsewhere: a checkpoint of timm, torchvision or this project, or a finished run, and the backbone in it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use shared::io::hash_file;
use shared::manifest::Input;
use shared::models::{Arch, Encoder, HeadConfig, names_and_shapes};
use shared::run::Run;
use shared::transforms::normalize::Normalization;
use shared::weights::names::{LeftOver, Method, Recognised, fit, recognise};
use shared::weights::{Checkpoint, Entry};
use shared::{Error, Result};

/// What the names of prototypes begin with, which stand beside the head in checkpoints of `SwAV` and belong to no encoder.
const PROTOTYPES: &str = "prototypes";

/// A checkpoint that holds a whole backbone; its numbers are read when they are asked for.
#[derive(Debug)]
pub struct Weights {
    path: PathBuf,
    run: Option<Run>,
    checkpoint: Checkpoint,
    fitted: Recognised,
}

impl Weights {
    /// Opens a file, or the last checkpoint of a finished run, and finds the backbone in it: that of `student`, or the
    /// one that the names and shapes tell.
    ///
    /// # Errors
    /// [`Error::Invalid`] when there is no known network, another one than `student`, or not all of it;
    /// [`Error::Damaged`] when a run's checkpoint was changed; as [`Checkpoint::open_at`] and [`Run::open`].
    pub fn open(path: &Path, student: Option<Arch>, state_key: Option<&str>) -> Result<Self> {
        let run = path.is_dir().then(|| Run::open(path)).transpose()?;
        let file = match &run {
            Some(run) => {
                run.check_hash(&run.details().checkpoint)?;
                run.directory().join(&run.details().checkpoint)
            }
            None => path.to_path_buf(),
        };
        let checkpoint = Checkpoint::open_at(file, state_key)?;
        let fitted = find_backbone(&checkpoint, path, student)?;
        Ok(Self { path: path.to_path_buf(), run, checkpoint, fitted })
    }

    /// The architecture of the backbone.
    pub fn arch(&self) -> Arch {
        self.fitted.arch
    }

    /// The checkpoint.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// What stands before every name of the backbone in the checkpoint; may be empty.
    pub fn prefix(&self) -> &str {
        &self.fitted.prefix
    }

    /// How the pixels were normalised that the weights were made for: as the file says, or as is usual for the architecture; a run
    /// always uses ImageNet's mean and deviation.
    pub fn pixel_normalization(&self) -> Normalization {
        if self.run.is_some() {
            return Normalization::default();
        }
        Normalization::recorded(self.checkpoint.metadata()).unwrap_or_else(|| self.arch().pixel_normalization())
    }

    /// Tensors that are no part of the backbone: a classifier, a head, another network.
    pub fn left_over(&self) -> &[LeftOver] {
        &self.fitted.left_over
    }

    /// Tensors that nothing accounts for.
    pub fn unexpected(&self) -> &[String] {
        &self.fitted.unexpected
    }

    /// As an input of a stage: by the fingerprint of the run, or by the hash of the file.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn as_input(&self, role: &str) -> Result<Input> {
        if let Some(run) = &self.run {
            return Ok(run.manifest().as_input(role, &self.path));
        }
        let fingerprint = hash_file(&self.path)?.blake3;
        Ok(Input { role: role.into(), path: self.path.display().to_string(), fingerprint })
    }

    /// The backbone's parameters and buffers under their own names, f32. Counters of batches are absent where the
    /// checkpoint has none.
    ///
    /// # Errors
    /// [`Error::Damaged`] when numbers cannot be read; [`Error::Invalid`] when some are not finite.
    pub fn backbone(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut tensors = self.fitted.load(&self.checkpoint)?;
        tensors.extend(self.fitted.load_batch_counts(&self.checkpoint)?);
        self.refuse_what_is_not_finite(&tensors)?;
        Ok(tensors)
    }

    /// The projection head under its own names, f32.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the checkpoint has no head of exactly these widths, or numbers that are not finite;
    /// [`Error::Damaged`] when numbers cannot be read.
    pub fn head(&self, wanted: HeadConfig) -> Result<BTreeMap<String, Tensor>> {
        self.check_head(wanted)?;
        let mut tensors = BTreeMap::new();
        for (name, _) in self.head_names(wanted)? {
            tensors.insert(name.clone(), self.tensor(&name)?);
        }
        self.refuse_what_is_not_finite(&tensors)?;
        Ok(tensors)
    }

    /// Whether the checkpoint has a projection head of exactly these widths.
    ///
    /// # Errors
    /// [`Error::Invalid`] when it has none.
    pub fn check_head(&self, wanted: HeadConfig) -> Result<()> {
        let names = self.head_names(wanted)?;
        let fits = names.iter().all(|(name, shape)| self.shape_of(name) == Some(shape));
        let own = |entry: &&Entry| {
            let own = entry.name().strip_prefix(self.prefix());
            own.is_some_and(|name| !Encoder::is_backbone_tensor(name) && !name.starts_with(PROTOTYPES))
        };
        if fits && self.checkpoint.entries().iter().filter(own).count() == names.len() {
            return Ok(());
        }
        Err(Error::invalid(
            format!("`{}` has no projection head of {wanted}", self.path.display()),
            "leave `--init-head` out to draw a head, or give the head that it has by `--method`, `--head-hidden` and \
             `--embedding-dim`",
        ))
    }

    fn head_names(&self, head: HeadConfig) -> Result<Vec<(String, Vec<usize>)>> {
        let mut names = names_and_shapes(self.arch(), Some(head))?;
        names.retain(|(name, _)| !Encoder::is_backbone_tensor(name));
        Ok(names)
    }

    fn shape_of(&self, name: &str) -> Option<&[usize]> {
        let name = format!("{}{name}", self.prefix());
        self.checkpoint.entries().iter().find(|entry| entry.name() == name).map(Entry::shape)
    }

    fn tensor(&self, name: &str) -> Result<Tensor> {
        self.checkpoint.tensor(&format!("{}{name}", self.prefix()))
    }

    fn refuse_what_is_not_finite(&self, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
        for (name, tensor) in tensors {
            if tensor.flatten_all()?.to_vec1::<f32>()?.iter().any(|value| !value.is_finite()) {
                return Err(Error::invalid(
                    format!("`{}` holds numbers in `{name}` that are not finite", self.path.display()),
                    "take an earlier checkpoint: this training had diverged",
                ));
            }
        }
        Ok(())
    }
}

/// The backbone in a checkpoint; whatever follows it does not matter.
fn find_backbone(checkpoint: &Checkpoint, path: &Path, student: Option<Arch>) -> Result<Recognised> {
    let entries: Vec<(String, Vec<usize>)> =
        checkpoint.entries().iter().map(|entry| (entry.name().to_owned(), entry.shape().to_vec())).collect();
    let likeliest = recognise(&entries)?.into_iter().next();
    if likeliest.as_ref().is_some_and(|found| (found.method, found.arch) == (Method::MocoV3, Arch::VitSmallPatch16)) {
        return Err(Error::invalid(
            format!(
                "`{}` holds the ViT-Small of MoCo v3, whose 12 heads of attention are 6 here and in timm",
                path.display()
            ),
            "use it as a teacher: `teacher-embed embed --weights`",
        ));
    }
    let likeliest = likeliest.map(|found| found.arch);
    let Some(arch) = student.or(likeliest) else {
        return Err(Error::invalid(
            format!("`{}` holds no network that is known here", path.display()),
            "give `--state-key` if its weights are elsewhere in the file; `teacher-embed describe` lists what it holds",
        ));
    };
    let whole = |arch| -> Result<Result<Recognised, Recognised>> {
        let fitted = fit(&entries, arch, Some(Method::Backbone))?;
        Ok(if fitted.is_complete() && !fitted.has_further_layers() { Ok(fitted) } else { Err(fitted) })
    };
    match (whole(arch)?, likeliest) {
        (Ok(fitted), _) => Ok(fitted),
        (Err(_), Some(other)) if other != arch && whole(other)?.is_ok() => Err(Error::invalid(
            format!("`{}` holds the weights of {other}, not those of {arch}", path.display()),
            format!("give `--student {other}`, or weights of {arch}"),
        )),
        (Err(fitted), _) => Err(fitted.refusal(checkpoint)),
    }
}
