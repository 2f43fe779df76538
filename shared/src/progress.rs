//! What a person watches while a stage runs: a bar with rate and time left on a terminal, plain lines in a log.
//!
//! Everything here goes to standard error, and the clock is read for showing only, never for results.

use std::io::{IsTerminal as _, Write as _};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// How often a log without a terminal gets a line.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// Progress through a known amount of work.
#[derive(Debug)]
pub struct Progress {
    label: String,
    unit: &'static str,
    bar: ProgressBar,
    /// When the last plain line was written; none on a terminal or when quiet.
    last_line: Option<Mutex<Instant>>,
}

impl Progress {
    /// Starts showing `total` units of work; `quiet` shows nothing.
    pub fn new(label: impl Into<String>, unit: &'static str, total: u64, quiet: bool) -> Self {
        let label = label.into();
        let terminal = std::io::stderr().is_terminal();
        let target = if quiet || !terminal { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
        let bar = ProgressBar::with_draw_target(Some(total), target);
        let template = "{prefix:>12} [{bar:30}] {human_pos}/{human_len} UNIT ({per_sec}, {eta} left) {wide_msg}";
        if let Ok(style) = ProgressStyle::with_template(&template.replace("UNIT", unit)) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_prefix(label.clone());
        let last_line = (!quiet && !terminal).then(|| Mutex::new(Instant::now()));
        Self { label, unit, bar, last_line }
    }

    /// Counts work done.
    pub fn inc(&self, amount: u64) {
        self.bar.inc(amount);
        self.line_if_due();
    }

    /// Sets the work done, for example after resuming; it does not count towards the rate.
    pub fn start_at(&self, position: u64) {
        self.bar.set_position(position);
        self.bar.reset_eta();
    }

    /// Shows a short text behind the numbers: the loss, the file at hand.
    pub fn message(&self, message: impl Into<String>) {
        self.bar.set_message(message.into());
    }

    /// Writes a line without disturbing the bar.
    pub fn note(&self, text: &str) {
        self.bar.suspend(|| note(text));
    }

    /// Ends the display, with a last line in a log.
    pub fn finish(&self) {
        if self.last_line.is_some() {
            self.line();
        }
        self.bar.finish();
    }

    fn line_if_due(&self) {
        let Some(last) = &self.last_line else { return };
        let Ok(mut last) = last.lock() else { return };
        if last.elapsed() >= LINE_INTERVAL {
            *last = Instant::now();
            self.line();
        }
    }

    fn line(&self) {
        let (done, total) = (self.bar.position(), self.bar.length().unwrap_or(0));
        let rate = self.bar.per_sec();
        let left = if done < total { format!(", {} s left", self.bar.eta().as_secs()) } else { String::new() };
        let message = self.bar.message();
        let separator = if message.is_empty() { "" } else { "  " };
        note(&format!("{}: {done}/{total} {} ({rate:.1}/s{left}){separator}{message}", self.label, self.unit));
    }
}

/// Writes one line to standard error; a closed standard error is not worth failing for.
pub fn note(text: &str) {
    drop(writeln!(std::io::stderr(), "{text}"));
}
