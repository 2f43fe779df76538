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
    /// When and where the work began, for the mean rate.
    began: Mutex<(Instant, u64)>,
    /// When the last plain line was written, and at which position; none on a terminal or when quiet.
    last_line: Option<Mutex<(Instant, Option<u64>)>>,
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
        let last_line = (!quiet && !terminal).then(|| Mutex::new((Instant::now(), None)));
        Self { label, unit, bar, began: Mutex::new((Instant::now(), 0)), last_line }
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
        if let Ok(mut began) = self.began.lock() {
            *began = (Instant::now(), position);
        }
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
        self.line_after(Duration::ZERO);
        self.bar.finish();
    }

    fn line_if_due(&self) {
        self.line_after(LINE_INTERVAL);
    }

    /// Writes a plain line when the last one is older than `interval` and told of another position.
    fn line_after(&self, interval: Duration) {
        let Some(Ok(mut last)) = self.last_line.as_ref().map(Mutex::lock) else { return };
        let position = self.bar.position();
        if last.0.elapsed() >= interval && last.1 != Some(position) {
            *last = (Instant::now(), Some(position));
            note(&self.line(position));
        }
    }

    fn line(&self, done: u64) -> String {
        let total = self.bar.length().unwrap_or(0);
        let (began, from) = self.began.lock().map_or((Instant::now(), done), |began| *began);
        let rate = done.saturating_sub(from) as f64 / began.elapsed().as_secs_f64().max(1e-9);
        let left = if done < total && rate > 0.0 {
            format!(", {} left", time_text(total.saturating_sub(done) as f64 / rate))
        } else {
            String::new()
        };
        let message = self.bar.message();
        let separator = if message.is_empty() { "" } else { "  " };
        format!("{}: {done}/{total} {} ({rate:.1}/s{left}){separator}{message}", self.label, self.unit)
    }
}

/// A time for people: `42 s`, `3 min 20 s`, `5 h 03 min`, `2 d 04 h`.
pub fn time_text(seconds: f64) -> String {
    let seconds = seconds.max(0.0).round() as u64;
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, _) => format!("{minutes} min {:02} s", seconds % 60),
        (0, ..) => format!("{hours} h {:02} min", minutes % 60),
        _ => format!("{days} d {:02} h", hours % 24),
    }
}

/// Writes one line to standard error; a closed standard error is not worth failing for.
pub fn note(text: &str) {
    drop(writeln!(std::io::stderr(), "{text}"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_two_units() {
        let cases = [
            (0.4, "0 s"),
            (59.6, "1 min 00 s"),
            (200.0, "3 min 20 s"),
            (18180.0, "5 h 03 min"),
            (187_200.0, "2 d 04 h"),
        ];
        for (seconds, text) in cases {
            assert_eq!(time_text(seconds), text);
        }
    }

    #[test]
    fn line_tells_position_rate_and_message() {
        let progress = Progress::new("embedding", "images", 10, true);
        progress.start_at(4);
        progress.inc(2);
        progress.message("shard 1");
        let line = progress.line(6);
        assert!(line.starts_with("embedding: 6/10 images (") && line.ends_with("s left)  shard 1"), "{line}");
        assert!(!progress.line(10).contains("left"));
    }
}
