//! How fast a training goes: lines of `timing.jsonl`, and what a call comes to.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use shared::memory::peak_memory_bytes;
use shared::ops::{Isa, isa};

use crate::spread::Spread;

/// A line of `timing.jsonl`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Timing {
    /// The epoch, counted from 0.
    pub epoch: u64,
    /// Steps done.
    pub step: u64,
    /// Since the line before it, or since this process began to train.
    pub seconds: f64,
    /// Samples per second in that time; each is seen in two views.
    pub images_per_second: f64,
    /// Share of that time in which the training waited for batches.
    pub data_wait_percent: f64,
    /// The most memory that this process has held at once since it began; none where the system does not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_memory_bytes: Option<u64>,
    /// The instruction set that computed.
    pub isa: Isa,
    /// Threads that computed.
    pub threads: usize,
    /// How far the embeddings of the line's step spread, see [`Spread`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub embedding_spread: Option<f32>,
    /// Mean cosine of the step's keys with the queue, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue_similarity: Option<f32>,
}

/// What a call came to.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Speed {
    /// From its first step to its last.
    pub seconds: f64,
    /// Samples per second in that time.
    pub images_per_second: f64,
    /// Share of that time in which the training waited for batches.
    pub data_wait_percent: f64,
}

/// Steps, time and waiting since a moment.
#[derive(Debug, Clone, Copy)]
pub struct Window {
    start: Instant,
    steps: u64,
    waited: Duration,
}

impl Window {
    /// Begins now.
    pub fn new() -> Self {
        Self { start: Instant::now(), steps: 0, waited: Duration::ZERO }
    }

    /// Counts a step; `waited` is how long its batch was not ready.
    pub fn step(&mut self, waited: Duration) {
        self.steps += 1;
        self.waited += waited;
    }

    /// Steps counted.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// What it came to until now.
    pub fn speed(&self, batch_size: usize) -> Speed {
        let seconds = self.start.elapsed().as_secs_f64().max(1e-9);
        Speed {
            seconds,
            images_per_second: self.steps as f64 * batch_size as f64 / seconds,
            data_wait_percent: 100.0 * self.waited.as_secs_f64() / seconds,
        }
    }

    /// Its line, written after `step`.
    pub fn timing(&self, epoch: u64, step: u64, batch_size: usize, spread: Option<Spread>) -> Timing {
        let Speed { seconds, images_per_second, data_wait_percent } = self.speed(batch_size);
        Timing {
            epoch,
            step,
            seconds,
            images_per_second,
            data_wait_percent,
            peak_memory_bytes: peak_memory_bytes(),
            isa: isa(),
            threads: rayon::current_num_threads(),
            embedding_spread: spread.map(|spread| spread.embeddings),
            queue_similarity: spread.and_then(|spread| spread.queue_similarity),
        }
    }
}

impl Default for Window {
    fn default() -> Self {
        Self::new()
    }
}
