//! Distillation: what a step learns from the teacher's cached embeddings.
//!
//! ```text
//! sum over terms and views of weight * term(student, teacher)
//! ```
//! A term compares the student's embeddings of a global view with the teacher's of the same; `simreg` compares what a predictor
//! makes of the student's features. The weights are of means over the batch, so no term depends on its size or its pieces.

mod predictor;
mod teacher_queue;

use std::collections::BTreeMap;
use std::ops::Range;

use candle_core::Tensor;
use shared::distributed::World;
use shared::losses::{distillation, rkd_angle, rkd_distance, seed};
use shared::models::Outputs;
use shared::run::Losses;
use shared::tensor_file::TensorFile;
use shared::{Error, Result};

use self::predictor::Predictor;
use self::teacher_queue::TeacherQueue;
use crate::config::{Config, DistillTerm, DistillViews, WeightedTerm};
use crate::method::Counters;
use crate::part::Part;
use crate::step::Batch;
use crate::trainable::Trainable;

/// The terms of the loss that a teacher adds, with their state.
#[derive(Debug)]
pub struct Distillation {
    terms: BTreeMap<DistillTerm, WeightedTerm>,
    /// Samples that share batch-norm statistics, and have relations with each other.
    group: usize,
    /// Of the term `seed`.
    queue: Option<TeacherQueue>,
    /// Of the term `simreg`.
    predictor: Option<Predictor>,
}

impl Distillation {
    /// The state before the first step; none without a teacher.
    ///
    /// # Errors
    /// Only if a tensor operation fails.
    pub fn new(config: &Config) -> Result<Option<Self>> {
        let Some(distillation) = &config.distillation else { return Ok(None) };
        let width = config.embedding_dim;
        let queue = distillation.seed.map(|seed| TeacherQueue::new(seed, width, config.seed)).transpose()?;
        let terms = distillation.terms.clone();
        let features = config.student.feature_width();
        let predictor = terms
            .contains_key(&DistillTerm::SimReg)
            .then(|| Predictor::new(features, width, config.seed))
            .transpose()?;
        Ok(Some(Self { terms, group: config.batch_size / config.bn_groups, queue, predictor }))
    }

    /// Networks of its own that learn.
    pub fn trainables(&self) -> Vec<Trainable> {
        self.predictor.iter().map(Predictor::trainable).collect()
    }

    /// Whether it has anything to say of a global view, 0 (the query's) or 1 (the key's).
    pub fn wants(&self, view: usize) -> bool {
        self.terms.values().any(|term| acts_on(term.views, view))
    }

    /// Its loss on some rows of a global view, whole batch-norm groups.
    ///
    /// # Errors
    /// [`Error::Shape`] when the teacher's embeddings are of another shape.
    pub fn part(&self, view: usize, outputs: &Outputs, batch: &Batch, rows: &Range<usize>) -> Result<Part> {
        let teacher = targets(batch, view, rows)?;
        let groups = rows.len() / self.group;
        let mut total: Option<Tensor> = None;
        let mut terms = Vec::new();
        for (&term, WeightedTerm { weight, .. }) in self.terms.iter().filter(|(_, term)| acts_on(term.views, view)) {
            let embeddings = &outputs.embeddings;
            let value = match term {
                DistillTerm::Mse => distillation(embeddings, &teacher)?,
                DistillTerm::RkdDistance => rkd_distance(embeddings, &teacher, groups)?,
                DistillTerm::RkdAngle => rkd_angle(embeddings, &teacher, groups)?,
                DistillTerm::Seed => {
                    let queue = self.queue.as_ref().ok_or_else(|| Error::invalid("`seed` has no queue", ""))?;
                    let SeedTemperatures { student, teacher: theirs } = queue.temperatures();
                    seed(embeddings, &teacher, queue.rows(), student, theirs)?
                }
                DistillTerm::SimReg => {
                    let predictor = self.predictor.as_ref();
                    let predictor = predictor.ok_or_else(|| Error::invalid("`simreg` has no predictor", ""))?;
                    distillation(&predictor.predict(&outputs.features, groups)?, &teacher)?
                }
            };
            let weighted = (&value * *weight)?;
            total = Some(match total {
                Some(total) => (total + weighted)?,
                None => weighted,
            });
            terms.push((term_name(term, view), value));
        }
        let loss = total.ok_or_else(|| Error::invalid(format!("no term of the teacher acts on view {view}"), ""))?;
        Ok(Part { loss, terms })
    }

    /// What is left to do once the parameters have moved: the teacher's embeddings of all ranks enter the queue.
    ///
    /// # Errors
    /// [`Error::Shape`] when the teacher's embeddings are of another shape.
    pub fn after_step(&mut self, batch: &Batch, world: &World) -> Result<()> {
        let Some(queue) = &mut self.queue else { return Ok(()) };
        let Some(term) = self.terms.get(&DistillTerm::Seed) else { return Ok(()) };
        for view in (0..2).filter(|&view| acts_on(term.views, view)) {
            queue.enqueue(&world.all_gather(&targets(batch, view, &(0..batch.sample_ids.len()))?)?)?;
        }
        Ok(())
    }

    /// Its tensors for a checkpoint, trainable networks included.
    ///
    /// # Errors
    /// Only if a tensor operation fails.
    pub fn to_tensors(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut tensors = BTreeMap::new();
        if let Some(queue) = &self.queue {
            tensors.extend(queue.to_tensors());
        }
        if let Some(predictor) = &self.predictor {
            tensors.extend(predictor.to_tensors()?);
        }
        Ok(tensors)
    }

    /// Its numbers for a checkpoint.
    pub fn counters(&self) -> Counters {
        self.queue.as_ref().map(TeacherQueue::counters).unwrap_or_default()
    }

    /// Takes its tensors and numbers from a checkpoint.
    ///
    /// # Errors
    /// [`Error::Damaged`] or [`Error::Invalid`] when something is missing or of another shape.
    pub fn load(&mut self, file: &TensorFile, counters: &Counters) -> Result<()> {
        if let Some(queue) = &mut self.queue {
            queue.load(file, counters)?;
        }
        self.predictor.as_ref().map_or(Ok(()), |predictor| predictor.load(file))
    }
}

/// The temperatures of both distributions of the term `seed`.
#[derive(Debug, Clone, Copy)]
struct SeedTemperatures {
    student: f64,
    teacher: f64,
}

fn acts_on(views: DistillViews, view: usize) -> bool {
    view == 0 || (view == 1 && views == DistillViews::Both)
}

/// What a term is called in the metrics: that of `DisCo` has the name of its paper's term.
fn term_name(term: DistillTerm, view: usize) -> String {
    if term == DistillTerm::Mse {
        return (if view == 0 { Losses::DISTILL_Q } else { Losses::DISTILL_K }).into();
    }
    format!("{}_{}", term.name().replace('-', "_"), if view == 0 { "q" } else { "k" })
}

/// The teacher's embeddings of some rows of a view.
fn targets(batch: &Batch, view: usize, rows: &Range<usize>) -> Result<Tensor> {
    let teacher = batch.teacher.as_ref().and_then(|teacher| teacher.get(view));
    let teacher = teacher.ok_or_else(|| Error::invalid("the batch has no embeddings of a teacher", ""))?;
    Ok(teacher.narrow(0, rows.start, rows.len())?)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use shared::models::Arch;
    use shared::run::Objective;

    use super::*;
    use crate::args::Options;
    use crate::method::Queue;

    fn rows(count: usize, width: usize, seed: u64) -> Tensor {
        Queue::random(count, width, seed).unwrap().keys().clone()
    }

    #[test]
    fn pieces_of_a_batch_give_the_terms_of_the_whole() {
        let options = Options {
            student: Some(Arch::VitTinyPatch16),
            batch_size: Some(8),
            bn_groups: Some(2),
            distill: Some("mse=32,rkd=1,seed=1,simreg=1@query".parse().unwrap()),
            seed_queue_size: Some(16),
            ..Options::default()
        };
        let config = Config::new(Objective::Distill, &options, Some(6)).unwrap();
        let mut distillation = Distillation::new(&config).unwrap().unwrap();
        let pixels = Tensor::zeros((8, 1, 1, 3), candle_core::DType::F32, &Device::Cpu).unwrap();
        let teacher = [rows(8, 6, 1), rows(8, 6, 2)];
        let (views, teacher) = ([pixels.clone(), pixels], Some(teacher));
        let batch = Batch {
            step: 0,
            epoch: 0,
            sample_ids: (0..8).collect(),
            views,
            locals: None,
            teacher,
            shuffled_keys: None,
        };
        let (features, embeddings) = (rows(8, 192, 3), rows(8, 6, 4));
        for (view, count) in [(0, 5), (1, 4)] {
            let part = |range: Range<usize>| {
                let of = |tensor: &Tensor| tensor.narrow(0, range.start, range.len()).unwrap();
                let outputs =
                    Outputs { features: of(&features), projections: of(&embeddings), embeddings: of(&embeddings) };
                let Part { loss, terms } = distillation.part(view, &outputs, &batch, &range).unwrap();
                let named = terms.into_iter().chain([("loss".to_owned(), loss)]);
                named.map(|(name, term)| (name, term.to_scalar::<f32>().unwrap())).collect::<BTreeMap<_, _>>()
            };
            let (whole, halves) = (part(0..8), [part(0..4), part(4..8)]);
            assert_eq!(whole.len(), count + 1);
            for (name, value) in &whole {
                let mean = f32::midpoint(halves[0][name], halves[1][name]);
                assert!((value - mean).abs() < 1e-5 * value.abs(), "{name}: {value} {mean}");
            }
        }
        let before = distillation.to_tensors().unwrap()["seed_queue"].to_vec2::<f32>().unwrap();
        distillation.after_step(&batch, &World::alone()).unwrap();
        let after = distillation.to_tensors().unwrap()["seed_queue"].to_vec2::<f32>().unwrap();
        assert!(before[0] != after[0] && distillation.counters()["seed_queue_pointer"] == 0);
        assert_eq!(after[8..], batch.teacher.as_ref().unwrap()[1].to_vec2::<f32>().unwrap());
    }
}
