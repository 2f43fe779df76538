//! Splits and subsets: which of the listed samples are taken.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use shared::rng::KeyedRng;
use shared::{Error, Fault, Result};

use super::{Listing, Sample, SourceOptions, Split};

/// How many names an error tells.
const NAMED: usize = 3;

/// Keeps the samples of the split, then those of the subset.
pub(super) fn select(listing: &mut Listing, options: &SourceOptions) -> Result<()> {
    let seed = options.split_seed.unwrap_or(0);
    if let Some(share) = options.split_fraction {
        let aside = chosen("split", seed, share, 0, &listing.samples);
        keep(listing, &aside, options.split == Some(Split::Val));
    }
    if let Some(path) = &options.subset {
        let named = named(path, &listing.samples)?;
        keep(listing, &named, true);
    }
    if let Some(share) = options.subset_fraction {
        let taken = chosen("subset", seed, share, 1, &listing.samples);
        keep(listing, &taken, true);
    }
    if listing.samples.is_empty() {
        let what = format!("of `{}` no sample is left by the split and the subset", listing.input.display());
        return Err(Error::invalid(what, "take a larger share"));
    }
    Ok(())
}

fn keep(listing: &mut Listing, marked: &[bool], value: bool) {
    let mut marks = marked.iter();
    listing.samples.retain(|_| marks.next() == Some(&value));
}

/// Marks a share of each class, at least `least` samples of it: those whose hash by domain, seed and identity is smallest.
fn chosen(domain: &str, seed: u64, share: f64, least: usize, samples: &[Sample]) -> Vec<bool> {
    let key = |sample: &Sample| KeyedRng::new(domain, seed, &[sample.id]).next_u64();
    let mut ranked: Vec<(i64, u64, usize)> =
        samples.iter().enumerate().map(|(index, sample)| (sample.label, key(sample), index)).collect();
    ranked.sort_unstable();
    let mut marked = vec![false; samples.len()];
    for class in ranked.chunk_by(|a, b| a.0 == b.0) {
        let count = ((class.len() as f64 * share).round() as usize).clamp(least.min(class.len()), class.len());
        for (_, _, index) in &class[..count] {
            marked[*index] = true;
        }
    }
    marked
}

/// What was found for a line of a subset's list.
#[derive(Debug, Clone, Copy)]
enum Found {
    Nothing,
    /// The sample of that name.
    Whole(usize),
    /// The only sample whose name ends so.
    Last(usize),
    /// One of several whose names end so.
    Many,
}

/// Marks the samples that a text file names, by whole names or their last parts.
fn named(path: &Path, samples: &[Sample]) -> Result<Vec<bool>> {
    let text = fs::read(path).map_err(Error::io("read", path))?;
    let text = String::from_utf8(text).map_err(|e| Error::damaged(path, Fault::Syntax(e.to_string())))?;
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let mut wanted: HashMap<&str, Found> = lines.iter().map(|line| (*line, Found::Nothing)).collect();
    for (index, sample) in samples.iter().enumerate() {
        if let Some(found) = wanted.get_mut(&*sample.name) {
            *found = Found::Whole(index);
        }
        if let Some((_, last)) = sample.name.rsplit_once('/')
            && let Some(found) = wanted.get_mut(last)
        {
            *found = match *found {
                Found::Nothing => Found::Last(index),
                Found::Whole(whole) => Found::Whole(whole),
                Found::Last(_) | Found::Many => Found::Many,
            };
        }
    }
    let mut marked = vec![false; samples.len()];
    let (mut missing, mut ambiguous) = (Vec::new(), Vec::new());
    for line in lines {
        match wanted.get(line) {
            Some(Found::Whole(index) | Found::Last(index)) => marked[*index] = true,
            Some(Found::Many) => ambiguous.push(line),
            Some(Found::Nothing) | None => missing.push(line),
        }
    }
    for (names, what, hint) in [
        (missing, "names no sample of the input", "check that the list belongs to the input and its split"),
        (ambiguous, "is the last part of several names", "write the names with their directories"),
    ] {
        if let Some((first, rest)) = names.split_first() {
            let more: String = rest.iter().take(NAMED - 1).map(|name| format!(", `{name}`")).collect();
            let count = names.len();
            let what = format!("of `{}`, {count} lines cannot be found: `{first}`{more} {what}", path.display());
            return Err(Error::invalid(what, hint));
        }
    }
    Ok(marked)
}
