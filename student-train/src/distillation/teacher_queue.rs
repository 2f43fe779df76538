//! The queue of the teacher's embeddings that the term `seed` compares with.

use std::collections::BTreeMap;

use candle_core::Tensor;
use shared::tensor_file::TensorFile;
use shared::{Error, Result};

use super::SeedTemperatures;
use crate::config::SeedConfig;
use crate::method::{Counters, Queue};

/// The name of the queue in a checkpoint.
const QUEUE_NAME: &str = "seed_queue";
/// Where the next embedding goes, in a checkpoint.
const QUEUE_POINTER: &str = "seed_queue_pointer";
/// Makes the seed of this queue's first rows another than that of other queues.
const SEED_OF_ROWS: u64 = 0x5EED;

/// Embeddings of past steps, random unit rows at first.
#[derive(Debug)]
pub(super) struct TeacherQueue {
    queue: Queue,
    temperatures: SeedTemperatures,
}

impl TeacherQueue {
    pub(super) fn new(config: SeedConfig, width: usize, seed: u64) -> Result<Self> {
        let temperatures = SeedTemperatures { student: config.temperature, teacher: config.teacher_temperature };
        Ok(Self { queue: Queue::random(config.queue_size, width, seed ^ SEED_OF_ROWS)?, temperatures })
    }

    pub(super) fn temperatures(&self) -> SeedTemperatures {
        self.temperatures
    }

    /// `(K, D)`.
    pub(super) fn rows(&self) -> &Tensor {
        self.queue.keys()
    }

    pub(super) fn enqueue(&mut self, embeddings: &Tensor) -> Result<()> {
        self.queue.enqueue(embeddings)
    }

    pub(super) fn to_tensors(&self) -> BTreeMap<String, Tensor> {
        BTreeMap::from([(QUEUE_NAME.into(), self.queue.keys().clone())])
    }

    pub(super) fn counters(&self) -> Counters {
        Counters::from([(QUEUE_POINTER.into(), self.queue.pointer() as u64)])
    }

    pub(super) fn load(&mut self, file: &TensorFile, counters: &Counters) -> Result<()> {
        let (size, width) = self.queue.keys().dims2()?;
        file.expect_shape(QUEUE_NAME, &[size, width], "[K, D]")?;
        let pointer = counters.get(QUEUE_POINTER).and_then(|&pointer| usize::try_from(pointer).ok());
        let pointer = pointer.ok_or_else(|| Error::invalid("the checkpoint has no `seed_queue_pointer`", ""))?;
        self.queue = Queue::from_keys(file.tensor(QUEUE_NAME)?, pointer)?;
        Ok(())
    }
}
