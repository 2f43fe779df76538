//! Short names for runs: the last part of each path, and as many more parts as it takes to tell them apart.

use std::path::{Component, Path, PathBuf};

use shared::{Error, Result};

/// One name per path, all different.
///
/// # Errors
/// [`Error::Usage`] when a path is given twice.
pub(super) fn short_names(paths: &[PathBuf]) -> Result<Vec<String>> {
    let parts: Vec<Vec<String>> = paths.iter().map(|path| parts_of(path)).collect();
    let mut taken = vec![1; paths.len()];
    loop {
        let names: Vec<String> = parts.iter().zip(&taken).map(|(parts, &taken)| last(parts, taken)).collect();
        let clashes: Vec<usize> =
            (0..names.len()).filter(|&i| names.iter().filter(|name| **name == names[i]).count() > 1).collect();
        if clashes.is_empty() {
            return Ok(names);
        }
        let mut longer = false;
        for i in clashes {
            if taken[i] < parts[i].len() {
                taken[i] += 1;
                longer = true;
            } else if let Some(twin) = (0..parts.len()).find(|&j| j != i && parts[j] == parts[i]) {
                return Err(Error::usage(format!("`{}` is given twice", paths[i.min(twin)].display())));
            }
        }
        if !longer {
            return Ok((0..paths.len()).map(|i| paths[i].display().to_string()).collect());
        }
    }
}

fn last(parts: &[String], count: usize) -> String {
    parts[parts.len().saturating_sub(count)..].join("/")
}

fn parts_of(path: &Path) -> Vec<String> {
    // `.` and `runs/../a` have no name of their own; a path that does not exist keeps the parts it has.
    let whole = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    let text = |part: Component<'_>| match part {
        Component::Normal(name) => Some(name.to_string_lossy().into_owned()),
        _ => None,
    };
    whole.components().filter_map(text).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(paths: &[&str]) -> Vec<String> {
        short_names(&paths.iter().map(PathBuf::from).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn last_parts_are_enough_when_they_differ() {
        assert_eq!(names(&["/no/runs/a", "/no/runs/b/"]), ["a", "b"]);
    }

    #[test]
    fn parents_are_added_only_where_names_clash() {
        assert_eq!(names(&["/no/x/a", "/no/y/a", "/no/y/b"]), ["x/a", "y/a", "b"]);
        assert_eq!(names(&["/no/x/1/a", "/no/y/1/a"]), ["x/1/a", "y/1/a"]);
        assert_eq!(names(&["/a", "/no/a"]), ["a", "no/a"]);
    }

    #[test]
    fn a_run_given_twice_is_refused() {
        let error = short_names(&["/no/a".into(), "/no/b".into(), "/no/a/".into()]).unwrap_err();
        assert_eq!((error.exit_status(), error.to_string().as_str()), (2, "`/no/a` is given twice"));
    }
}
