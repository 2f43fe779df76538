//! What a run starts from when it does not start from drawn weights: `--init`.
//!
//! The backbone of the query encoder takes the weights and batch-norm buffers of a checkpoint, the key encoder is a copy,
//! the head is drawn unless `--init-head` is given, momenta and queue start as ever. The weights are an input of the run
//! under the role [`INIT_ROLE`]: other weights are another run. Once a run has a checkpoint of its own, the file is not
//! needed any more: what was recorded of it under the same path then stands for it.

use std::path::Path;

use shared::manifest::{Input, Stage};
use shared::models::HeadConfig;
use shared::output::recorded_identity;
use shared::transforms::normalize::Normalization;
use shared::{Error, Result};

use crate::config::{Config, Plan};
use crate::step::TrainingState;
use crate::weights::Weights;

/// The role under which a run records the weights that it started from.
pub const INIT_ROLE: &str = "init";

/// The weights that a run starts from.
#[derive(Debug)]
pub struct Init {
    input: Input,
    /// The projection head to take as well.
    head: Option<HeadConfig>,
    /// None when the file is gone and only what was recorded of it is known.
    weights: Option<Weights>,
}

impl Init {
    /// Opens what `--init` names and checks that it fits the student. When it is gone, the record that the run's
    /// directory has of it is taken.
    ///
    /// # Errors
    /// As [`Weights::open`] and [`Weights::check_head`]; [`Error::Missing`] when the file is gone and was never recorded.
    pub fn find(plan: &Plan, config: &Config) -> Result<Option<Self>> {
        let Some(path) = &plan.init else { return Ok(None) };
        let head = config.init_head.then(|| config.head());
        if !path.exists() {
            let recorded = if plan.overwrite { None } else { recorded(&plan.output, path)? };
            let input = recorded.ok_or_else(|| missing(path, "check the path given to `--init`"))?;
            return Ok(Some(Self { input, head, weights: None }));
        }
        let weights = Weights::open(path, Some(config.student), None)?;
        head.map_or(Ok(()), |head| weights.check_head(head))?;
        Ok(Some(Self { input: weights.as_input(INIT_ROLE)?, head, weights: Some(weights) }))
    }

    /// The weights as an input of the run.
    pub fn input(&self) -> &Input {
        &self.input
    }

    /// Puts the weights into a student that has not begun to learn, and says what was done.
    ///
    /// # Errors
    /// [`Error::Missing`] when the file is gone; as [`Weights::backbone`] and [`Weights::head`].
    pub fn start(&self, state: &TrainingState) -> Result<String> {
        let Some(weights) = &self.weights else {
            let hint =
                "the run has no checkpoint of its own yet: bring the file back, or start again with `--overwrite`";
            return Err(missing(Path::new(&self.input.path), hint));
        };
        let mut tensors = weights.backbone()?;
        if let Some(head) = self.head {
            tensors.extend(weights.head(head)?);
        }
        state.start_from(&tensors)?;
        let (count, arch) = (tensors.len(), weights.arch());
        let head = if self.head.is_some() { "the head is taken too" } else { "the head is drawn" };
        let (theirs, ours) = (weights.pixel_normalization(), Normalization::default());
        let pixels = if theirs == ours {
            String::new()
        } else {
            format!("; they are made for pixels normalised as {}, a run normalises as {}", theirs.name(), ours.name())
        };
        Ok(format!("starting from {count} tensors of {arch} in `{}`; {head}{pixels}", self.input.path))
    }
}

/// What the directory of a run says of weights that it started from, if they were at `path`.
fn recorded(run: &Path, path: &Path) -> Result<Option<Input>> {
    let identity = recorded_identity(run, Stage::StudentTrain)?;
    let inputs = identity.map(|identity| identity.inputs).unwrap_or_default();
    Ok(inputs.into_iter().find(|input| input.role == INIT_ROLE && Path::new(&input.path) == path))
}

fn missing(path: &Path, hint: &str) -> Error {
    Error::Missing { what: "checkpoint", path: path.into(), hint: hint.into() }
}
