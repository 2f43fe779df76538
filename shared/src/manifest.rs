//! Manifests: what a finished directory holds, how it was made, and from what.
//!
//! `manifest.json` is the last file that a stage writes into its output directory; without it the directory is unfinished.
//! Its **fingerprint** hashes everything that decides the contents (format version, stage, resolved config, seed, counts, the
//! hashes of the files, the fingerprints of the inputs) and nothing that does not (paths, program version). A stage that
//! reads a directory records its fingerprint as an input of its own manifest, so that manifests chain and a wrong pairing is
//! refused before any work is done.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, Fault, Result};
use crate::io::{FileEntry, hash_file, write_json};

/// The file that marks a directory as finished.
pub const MANIFEST_FILE: &str = "manifest.json";

/// The file that marks a directory as being written in parts: see [`crate::output::PartDir`].
pub(crate) const PARTS_FILE: &str = "parts.json";

/// Version of the layouts of manifests and of the files they describe.
pub const FORMAT_VERSION: u32 = 1;

/// The stages, and the name each bears in its manifests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// Packs images into a shard set.
    DataPrep,
    /// Computes the teacher's embeddings of a shard set.
    TeacherEmbed,
    /// Trains a student.
    StudentTrain,
    /// Extracts features with a student.
    StudentEval,
}

impl Stage {
    /// The binary's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::DataPrep => "data-prep",
            Self::TeacherEmbed => "teacher-embed",
            Self::StudentTrain => "student-train",
            Self::StudentEval => "student-eval",
        }
    }

    /// What its output directory is called in messages.
    pub fn output_name(self) -> &'static str {
        match self {
            Self::DataPrep => "shard set",
            Self::TeacherEmbed => "embedding set",
            Self::StudentTrain => "run",
            Self::StudentEval => "feature set",
        }
    }
}

/// An artefact that a stage read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Input {
    /// What it was to the stage: "shards", "embeddings", "weights".
    pub role: String,
    /// Where it was then; for people, not part of any fingerprint.
    pub path: String,
    /// The fingerprint of its manifest, or the hash of the file where it has none.
    pub fingerprint: String,
}

/// What decides the contents of an output directory: two runs with equal identities write the same bytes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// [`FORMAT_VERSION`] of the program that wrote it.
    pub format_version: u32,
    /// Who wrote it.
    pub stage: Stage,
    /// The resolved configuration, without output paths, thread counts and other things that change no byte.
    pub config: Value,
    /// The seed of everything random.
    pub seed: u64,
    /// What was read.
    pub inputs: Vec<Input>,
}

impl Identity {
    /// An identity of the current format version.
    ///
    /// # Errors
    /// [`Error::Invalid`] when `config` has no JSON form.
    pub fn new(stage: Stage, config: &impl Serialize, seed: u64, inputs: Vec<Input>) -> Result<Self> {
        let config = serde_json::to_value(config)
            .map_err(|e| Error::invalid(format!("the configuration has no JSON form: {e}"), ""))?;
        Ok(Self { format_version: FORMAT_VERSION, stage, config, seed, inputs })
    }

    /// The first difference to another identity, as (what, here, there), all differing settings at once; input paths do not
    /// count.
    pub fn difference(&self, other: &Self) -> Option<(String, String, String)> {
        let differs = |what: &str, a: String, b: String| (a != b).then(|| (what.to_string(), a, b));
        differs("format version", self.format_version.to_string(), other.format_version.to_string())
            .or_else(|| differs("stage", self.stage.name().into(), other.stage.name().into()))
            .or_else(|| {
                let differences = config_differences("", &self.config, &other.config);
                let column =
                    |index: usize| differences.iter().map(|d| d[index].as_str()).collect::<Vec<_>>().join(", ");
                (!differences.is_empty()).then(|| (column(0), column(1), column(2)))
            })
            .or_else(|| differs("seed", self.seed.to_string(), other.seed.to_string()))
            .or_else(|| {
                let list = |inputs: &[Input]| {
                    inputs.iter().map(|i| (i.role.clone(), i.fingerprint.clone())).collect::<BTreeMap<_, _>>()
                };
                let (a, b) = (list(&self.inputs), list(&other.inputs));
                let roles: Vec<&String> = a.keys().chain(b.keys()).collect();
                roles.into_iter().find_map(|role| {
                    let text =
                        |map: &BTreeMap<String, String>| map.get(role).map_or("none".into(), |f| short(f).into());
                    differs(&format!("input `{role}`"), text(&a), text(&b))
                })
            })
    }
}

/// Every key that differs, as (key, here, there).
fn config_differences(prefix: &str, a: &Value, b: &Value) -> Vec<[String; 3]> {
    match (a, b) {
        (Value::Object(a), Value::Object(b)) => a
            .keys()
            .chain(b.keys().filter(|key| !a.contains_key(*key)))
            .flat_map(|key| {
                let name = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
                config_differences(&name, a.get(key).unwrap_or(&Value::Null), b.get(key).unwrap_or(&Value::Null))
            })
            .collect(),
        (a, b) if a != b => vec![[format!("`{prefix}`"), a.to_string(), b.to_string()]],
        _ => Vec::new(),
    }
}

/// The first twelve digits of a hash, enough for people to compare.
pub fn short(fingerprint: &str) -> &str {
    fingerprint.get(..12).unwrap_or(fingerprint)
}

/// The record of a finished output directory.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Hash of everything below but `program_version` and the inputs' paths.
    pub fingerprint: String,
    /// Version of the program that wrote it.
    pub program_version: String,
    /// What decided the contents.
    pub identity: Identity,
    /// How many of what: "samples", "views", "shards", "rejects".
    pub counts: BTreeMap<String, u64>,
    /// The stage's own summary: class names, recognised architecture, final losses.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub details: Value,
    /// Every file of the directory but this one.
    pub files: Vec<FileEntry>,
}

impl Manifest {
    /// Completes a manifest: sorts the files and computes the fingerprint.
    pub fn new(identity: Identity, counts: BTreeMap<String, u64>, details: Value, mut files: Vec<FileEntry>) -> Self {
        files.sort_by(|a, b| a.path.cmp(&b.path));
        let mut manifest = Self {
            fingerprint: String::new(),
            program_version: env!("CARGO_PKG_VERSION").into(),
            identity,
            counts,
            details,
            files,
        };
        manifest.fingerprint = manifest.compute_fingerprint();
        manifest
    }

    /// Reads the manifest of a finished directory that `stage` wrote.
    ///
    /// # Errors
    /// [`Error::Missing`] when there is no such directory or it is unfinished, [`Error::Damaged`] when the manifest was changed
    /// or is of another format version, [`Error::Chain`] when another stage wrote it.
    pub fn read(directory: impl AsRef<Path>, stage: Stage) -> Result<Self> {
        let directory = directory.as_ref();
        let what = stage.output_name();
        if !directory.is_dir() {
            let hint = format!("make it with `{}`, or check the path", stage.name());
            return Err(Error::Missing { what, path: directory.into(), hint });
        }
        let path = directory.join(MANIFEST_FILE);
        if !path.exists() {
            let hint = if directory.join(PARTS_FILE).exists() {
                format!("write all its parts, then close it with `{} finish`", stage.name())
            } else {
                format!("run the same `{}` command again to finish it", stage.name())
            };
            let what = "an unfinished or foreign directory: its manifest";
            return Err(Error::Missing { what, path, hint });
        }
        let manifest = Self::read_any(&path)?;
        if manifest.identity.stage != stage {
            return Err(Error::Chain {
                what: "kind".into(),
                path: directory.into(),
                expected: format!("a {what} made by `{}`", stage.name()),
                found: format!("a {}", manifest.identity.stage.output_name()),
                hint: format!("give the output of `{}`", stage.name()),
            });
        }
        Ok(manifest)
    }

    fn read_any(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).map_err(Error::io("read", path))?;
        let value: Value = serde_json::from_str(&text)
            .map_err(|e| Error::damaged(path, Fault::Syntax(format!("not a manifest: {e}"))))?;
        let version = value.pointer("/identity/format_version").and_then(Value::as_u64);
        if let Some(found) = version.and_then(|v| u32::try_from(v).ok()).filter(|&v| v != FORMAT_VERSION) {
            return Err(Error::damaged(path, Fault::Version { expected: FORMAT_VERSION, found }));
        }
        let manifest: Self = serde_json::from_value(value)
            .map_err(|e| Error::damaged(path, Fault::Syntax(format!("not a manifest: {e}"))))?;
        let computed = manifest.compute_fingerprint();
        if computed != manifest.fingerprint {
            let fault = Fault::Hash { expected: short(&manifest.fingerprint).into(), found: short(&computed).into() };
            return Err(Error::damaged(path, fault));
        }
        if let Some(file) = manifest.files.iter().find(|file| !is_plain_relative(&file.path)) {
            let fault = Fault::Value(format!("`{}` is not a path inside the directory", file.path));
            return Err(Error::damaged(path, fault));
        }
        Ok(manifest)
    }

    /// Writes `manifest.json`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write(&self, directory: &Path) -> Result<()> {
        write_json(directory.join(MANIFEST_FILE), self).map(drop)
    }

    /// Checks that every recorded file is there with its recorded length; reads no contents.
    ///
    /// # Errors
    /// [`Error::Missing`], or [`Error::Damaged`] with [`Fault::Length`].
    pub fn check_lengths(&self, directory: &Path) -> Result<()> {
        for file in &self.files {
            let path = directory.join(&file.path);
            let Ok(metadata) = fs::metadata(&path) else {
                let hint = "restore the file, or make the directory again with `--overwrite`".into();
                return Err(Error::Missing { what: "recorded file", path, hint });
            };
            if metadata.len() != file.bytes {
                return Err(Error::damaged(path, Fault::Length { expected: file.bytes, found: metadata.len() }));
            }
        }
        Ok(())
    }

    /// Reads every recorded file and compares its hash; `progress` is told the bytes of each finished file.
    ///
    /// # Errors
    /// As [`Manifest::check_lengths`], and [`Fault::Hash`].
    pub fn verify_files(&self, directory: &Path, mut progress: impl FnMut(u64)) -> Result<()> {
        self.check_lengths(directory)?;
        for file in &self.files {
            let path = directory.join(&file.path);
            let found = hash_file(&path)?;
            if found.blake3 != file.blake3 {
                let fault = Fault::Hash { expected: short(&file.blake3).into(), found: short(&found.blake3).into() };
                return Err(Error::damaged(path, fault));
            }
            progress(file.bytes);
        }
        Ok(())
    }

    /// This directory as an input of another stage.
    pub fn as_input(&self, role: &str, directory: &Path) -> Input {
        Input { role: role.into(), path: directory.display().to_string(), fingerprint: self.fingerprint.clone() }
    }

    /// The recorded input of a role.
    pub fn input(&self, role: &str) -> Option<&Input> {
        self.identity.inputs.iter().find(|input| input.role == role)
    }

    /// A count, 0 when it was not recorded.
    pub fn count(&self, name: &str) -> u64 {
        self.counts.get(name).copied().unwrap_or(0)
    }

    fn compute_fingerprint(&self) -> String {
        let mut identity = self.identity.clone();
        for input in &mut identity.inputs {
            input.path.clear();
        }
        // JSON of these types cannot fail: all keys are strings; object keys are sorted by serde_json's map.
        let hashed = serde_json::json!({
            "identity": identity, "counts": self.counts, "details": self.details, "files": self.files,
        });
        blake3::hash(hashed.to_string().as_bytes()).to_hex().to_string()
    }
}

fn is_plain_relative(path: &str) -> bool {
    let path = Path::new(path);
    path.components().count() > 0 && path.components().all(|part| matches!(part, std::path::Component::Normal(_)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Manifest {
        let inputs = vec![Input { role: "shards".into(), path: "a".into(), fingerprint: "f".repeat(64) }];
        let config = serde_json::json!({"views": 2, "recipe": {"name": "moco-v2"}});
        let identity = Identity::new(Stage::TeacherEmbed, &config, 7, inputs).unwrap();
        Manifest::new(identity, BTreeMap::from([("samples".into(), 3)]), Value::Null, Vec::new())
    }

    fn damage(change: impl FnOnce(&mut Value)) -> Error {
        let dir = tempfile::tempdir().unwrap();
        let mut value = serde_json::to_value(example()).unwrap();
        change(&mut value);
        write_json(dir.path().join(MANIFEST_FILE), &value).unwrap();
        Manifest::read(dir.path(), Stage::TeacherEmbed).unwrap_err()
    }

    #[test]
    fn round_trip_and_path_independence() {
        let dir = tempfile::tempdir().unwrap();
        let mut manifest = example();
        manifest.write(dir.path()).unwrap();
        assert_eq!(Manifest::read(dir.path(), Stage::TeacherEmbed).unwrap(), manifest);
        manifest.identity.inputs[0].path = "elsewhere".into();
        assert_eq!(manifest.compute_fingerprint(), example().fingerprint);
    }

    #[test]
    fn floats_survive_the_round_trip() {
        // Losses of a run: 17 significant digits, which a parser that rounds carelessly changes.
        let losses: Vec<f64> = (1..2000).map(|i| (f64::from(i) * 0.7311).sin() * 10.0).collect();
        let dir = tempfile::tempdir().unwrap();
        let details = serde_json::json!({ "losses": losses, "last": losses[7] as f32 });
        Manifest::new(example().identity, BTreeMap::new(), details, Vec::new()).write(dir.path()).unwrap();
        Manifest::read(dir.path(), Stage::TeacherEmbed).unwrap();
    }

    #[test]
    fn changed_config_changes_the_hash() {
        let error = damage(|v| v["identity"]["config"]["views"] = 3.into());
        assert!(matches!(error, Error::Damaged { fault: Fault::Hash { .. }, .. }), "{error}");
    }

    #[test]
    fn other_version_is_named() {
        let error = damage(|v| v["identity"]["format_version"] = 99.into());
        assert!(matches!(error, Error::Damaged { fault: Fault::Version { found: 99, .. }, .. }), "{error}");
    }

    #[test]
    fn unknown_key_is_refused() {
        assert!(matches!(damage(|v| v["extra"] = 1.into()), Error::Damaged { fault: Fault::Syntax(_), .. }));
    }

    #[test]
    fn file_outside_the_directory_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = FileEntry { path: "../x".into(), bytes: 1, blake3: String::new() };
        let manifest = Manifest::new(example().identity, BTreeMap::new(), Value::Null, vec![file]);
        manifest.write(dir.path()).unwrap();
        let error = Manifest::read(dir.path(), Stage::TeacherEmbed).unwrap_err();
        assert!(matches!(error, Error::Damaged { fault: Fault::Value(_), .. }), "{error}");
    }

    #[test]
    fn other_stage_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        example().write(dir.path()).unwrap();
        let error = Manifest::read(dir.path(), Stage::DataPrep).unwrap_err();
        assert!(matches!(error, Error::Chain { .. }), "{error}");
    }

    #[test]
    fn missing_and_unfinished_directories_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let unfinished = Manifest::read(dir.path(), Stage::DataPrep).unwrap_err();
        assert!(unfinished.hint().unwrap().contains("finish"), "{unfinished}");
        assert!(Manifest::read(dir.path().join("no"), Stage::DataPrep).unwrap_err().to_string().contains("shard set"));
    }

    #[test]
    fn changed_file_is_found_by_length_or_hash() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data");
        let file = crate::io::write_atomic(&path, b"abc").unwrap();
        let manifest = Manifest::new(example().identity, BTreeMap::new(), Value::Null, vec![file]);
        manifest.verify_files(dir.path(), |_| ()).unwrap();
        crate::io::write_atomic(&path, b"abd").unwrap();
        manifest.check_lengths(dir.path()).unwrap();
        let error = manifest.verify_files(dir.path(), |_| ()).unwrap_err();
        assert!(matches!(error, Error::Damaged { fault: Fault::Hash { .. }, .. }), "{error}");
        crate::io::write_atomic(&path, b"ab").unwrap();
        let error = manifest.check_lengths(dir.path()).unwrap_err();
        assert!(matches!(error, Error::Damaged { fault: Fault::Length { .. }, .. }), "{error}");
        fs::remove_file(&path).unwrap();
        assert!(matches!(manifest.check_lengths(dir.path()).unwrap_err(), Error::Missing { .. }));
    }

    #[test]
    fn difference_names_the_config_key() {
        let (a, mut b) = (example().identity, example().identity);
        assert_eq!(a.difference(&b), None);
        b.config["recipe"]["name"] = "simclr".into();
        b.config["views"] = 3.into();
        let (what, here, there) = a.difference(&b).unwrap();
        assert_eq!(what, "`recipe.name`, `views`");
        assert_eq!((here.as_str(), there.as_str()), ("\"moco-v2\", 2", "\"simclr\", 3"));
    }
}
