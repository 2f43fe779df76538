//! What the command lines of the stages share: common flags, configuration files, threads, exit statuses.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, Fault, Result};
use crate::ops::{Isa, force_isa, isa};
use crate::progress::note;
use crate::transforms::Level;

/// Flags that every command which writes an output directory takes.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Common options")]
pub struct CommonArgs {
    /// Number of worker threads; the results do not depend on it [default: all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,

    /// Print the summary as JSON on standard output
    #[arg(long)]
    pub json: bool,

    /// Show no progress on standard error
    #[arg(long)]
    pub quiet: bool,

    /// Start again, deleting what an earlier run of this stage left in the output directory
    #[arg(long)]
    pub overwrite: bool,
}

/// Flags that every command which computes networks takes.
#[derive(Debug, Clone, Copy, Default, clap::Args)]
#[command(next_help_heading = "Common options")]
pub struct ComputeArgs {
    /// Instruction set to compute networks with [default: the best one that the machine has]
    ///
    /// Results are the same, bit for bit, whatever the number of threads, but not between instruction sets: wider vectors sum
    /// in another order, and the last bits round differently. Naming one reproduces what another machine computed with it.
    /// Classifiers of features (k-NN, linear probes) always use the best one.
    #[arg(long, value_name = "SET")]
    pub isa: Option<Isa>,
}

impl ComputeArgs {
    /// Makes this process compute as asked; call it before any work begins.
    ///
    /// # Errors
    /// As [`force_isa`].
    pub fn apply(self) -> Result<()> {
        let Some(isa) = self.isa else { return Ok(()) };
        force_isa(isa)?;
        Level::limit(isa);
        Ok(())
    }
}

/// Tells a person what is about to compute: the instruction set, and the threads of the pool that this is called in.
pub fn note_cpu() {
    let threads = rayon::current_num_threads();
    note(&format!("CPU: {}, {threads} thread{}", isa(), if threads == 1 { "" } else { "s" }));
}

/// Runs a stage's command and turns its result into an exit status: 0 done, 1 failed, 2 wrong usage.
///
/// An error is one line on standard error, with its advice on a second line.
pub fn run_main(command: impl FnOnce() -> Result<()>) -> ExitCode {
    survive_file_size_limit();
    match command() {
        Ok(()) => ExitCode::SUCCESS,
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        // the rank that failed tells
        Err(error @ Error::Elsewhere { .. }) => ExitCode::from(error.exit_status()),
        Err(error) => {
            note(&format!("error: {error}"));
            if let Some(hint) = error.hint() {
                note(&format!("hint: {hint}"));
            }
            ExitCode::from(error.exit_status())
        }
    }
}

/// Makes a file that grows over the limit of `ulimit -f` an error of writing, with a sentence, as a full disk is; by default it
/// ends the process.
fn survive_file_size_limit() {
    #[cfg(unix)]
    {
        let unread = std::sync::Arc::default();
        // without the handler the process ends as it would have
        drop(signal_hook::flag::register(libc::SIGXFSZ, unread));
    }
}

/// Writes text to standard output.
///
/// # Errors
/// [`Error::Io`]; a closed pipe counts as success in [`run_main`].
pub fn print(text: &str) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{}", text.trim_end())
        .and_then(|()| stdout.flush())
        .map_err(Error::io("write to", "standard output"))
}

/// Writes a value as JSON to standard output.
///
/// # Errors
/// As [`print()`].
pub fn print_json(value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(|e| Error::invalid(format!("no JSON form: {e}"), ""))?;
    print(&text)
}

/// Runs `work` on a pool of `threads` threads, or on all cores.
///
/// # Errors
/// What `work` returns; [`Error::Invalid`] when the system refuses the threads.
pub fn with_threads<T: Send>(threads: Option<u16>, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads.map_or(0, usize::from))
        .build()
        .map_err(|e| Error::invalid(format!("cannot start worker threads: {e}"), "use a smaller `--threads`"))?;
    pool.install(work)
}

/// Lays the flags given on the command line over the keys of a TOML file.
///
/// `T` is the stage's options: every field an `Option` that is not serialised when it is none, kebab-case keys, unknown keys
/// denied.
///
/// # Errors
/// [`Error::Missing`] or [`Error::Io`] for the file, [`Error::Usage`] when it is no TOML, or has an unknown key or a bad value.
pub fn with_config_file<T: Serialize + DeserializeOwned>(file: Option<&Path>, flags: &T) -> Result<T> {
    let mut merged = match file {
        None => toml::Table::new(),
        Some(path) if !path.exists() => {
            let hint = "check the path given to `--config`".into();
            return Err(Error::Missing { what: "configuration file", path: path.into(), hint });
        }
        Some(path) => {
            let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
            let bad = |e: toml::de::Error| Error::usage(format!("`{}`: {}", path.display(), one_line(&e.to_string())));
            toml::from_str::<T>(&text).map_err(bad)?;
            text.parse().map_err(bad)?
        }
    };
    let flags = toml::Table::try_from(flags).map_err(|e| Error::usage(format!("flags have no TOML form: {e}")))?;
    merged.extend(flags);
    merged.try_into().map_err(|e| Error::usage(one_line(&e.to_string())))
}

/// Reads a TOML file written by this program.
///
/// # Errors
/// [`Error::Io`]; [`Error::Damaged`].
pub fn read_toml<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
    toml::from_str(&text).map_err(|e| Error::damaged(path, Fault::Syntax(one_line(&e.to_string()))))
}

/// A path that the user named must exist.
///
/// # Errors
/// [`Error::Missing`].
pub fn must_exist(what: &'static str, path: &Path) -> Result<PathBuf> {
    if path.exists() {
        return Ok(path.to_path_buf());
    }
    Err(Error::Missing { what, path: path.into(), hint: "check the path".into() })
}

/// A file that a command writes must not exist, unless it may be replaced.
///
/// # Errors
/// [`Error::Usage`].
pub fn may_write(output: &Path, overwrite: bool) -> Result<()> {
    if output.exists() && !overwrite {
        let message = format!("`{}` exists: choose another `--output`, or add `--overwrite`", output.display());
        return Err(Error::usage(message));
    }
    Ok(())
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
    #[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
    struct Options {
        #[serde(skip_serializing_if = "Option::is_none")]
        batch_size: Option<u32>,
        #[serde(skip_serializing_if = "Option::is_none")]
        lr: Option<f64>,
    }

    fn merged(text: &str, flags: &Options) -> Result<Options> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.toml");
        crate::io::write_atomic(&path, text.as_bytes()).unwrap();
        with_config_file(Some(&path), flags)
    }

    #[test]
    fn flags_win_over_the_file() {
        let flags = Options { batch_size: Some(8), lr: None };
        let options = merged("batch-size = 4\nlr = 0.5\n", &flags).unwrap();
        assert_eq!(options, Options { batch_size: Some(8), lr: Some(0.5) });
    }

    #[test]
    fn bad_files_are_usage_errors() {
        for text in ["batchsize = 4", "batch-size = \"x\"", "= ="] {
            let error = merged(text, &Options::default()).unwrap_err();
            assert_eq!(error.exit_status(), 2, "{error}");
            assert!(error.to_string().contains("c.toml"), "{error}");
            assert_eq!(error.to_string().lines().count(), 1);
        }
    }

    #[test]
    fn missing_file_is_named() {
        let error = with_config_file(Some(Path::new("no.toml")), &Options::default()).unwrap_err();
        assert!(error.to_string().contains("no.toml"));
    }

    #[test]
    fn threads_are_counted() {
        let counted = with_threads(Some(2), || Ok(rayon::current_num_threads())).unwrap();
        assert_eq!(counted, 2);
    }
}
