//! Where ranks sit: the cores of a node, shared out among those that may use them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Collectives;
use crate::error::{Error, Result};

/// Where a rank sits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Seat {
    node: String,
    /// The cores that the system lets it use, by number.
    cores: Vec<usize>,
    /// How many of them at once: less than all where a container is limited.
    at_once: usize,
}

impl Seat {
    fn find() -> Self {
        let at_once = std::thread::available_parallelism().map_or(1, usize::from);
        let cores = allowed_cores().unwrap_or_else(|| (0..at_once).collect());
        Self { node: node_name(), cores, at_once }
    }
}

/// Threads for each rank: every core is shared out among the ranks that may use it.
///
/// Launchers differ in whether they bind ranks to cores of their own; this holds either way.
pub(super) fn threads(collectives: &dyn Collectives) -> Result<u16> {
    let broken = |e: serde_json::Error| Error::invalid(format!("cannot tell the cores of a rank: {e}"), "");
    let mine = serde_json::to_vec(&Seat::find()).map_err(broken)?;
    let seats = collectives.gather_bytes(&mine)?;
    let seats = seats.iter().map(|seat| serde_json::from_slice(seat)).collect::<Result<Vec<Seat>, _>>();
    Ok(share(&seats.map_err(broken)?, collectives.rank()))
}

fn share(seats: &[Seat], rank: usize) -> u16 {
    let mine = &seats[rank];
    let mut users = BTreeMap::<usize, usize>::new();
    for core in seats.iter().filter(|seat| seat.node == mine.node).flat_map(|seat| &seat.cores) {
        *users.entry(*core).or_default() += 1;
    }
    let cores: f64 = mine.cores.iter().map(|core| 1.0 / users.get(core).map_or(1.0, |&users| users as f64)).sum();
    let usable = (mine.at_once as f64 / mine.cores.len().max(1) as f64).min(1.0);
    // thirds do not sum up to whole numbers
    (cores * usable + 1e-6).floor().clamp(1.0, f64::from(u16::MAX)) as u16
}

#[cfg(target_os = "linux")]
fn allowed_cores() -> Option<Vec<usize>> {
    let set = rustix::thread::sched_getaffinity(None).ok()?;
    Some((0..rustix::thread::CpuSet::MAX_CPU).filter(|&core| set.is_set(core)).collect())
}

#[cfg(not(target_os = "linux"))]
fn allowed_cores() -> Option<Vec<usize>> {
    None
}

/// The name of this machine, for messages and to tell nodes apart.
pub(super) fn node_name() -> String {
    #[cfg(unix)]
    return rustix::system::uname().nodename().to_string_lossy().into_owned();
    #[cfg(not(unix))]
    return "this machine".into();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seat(node: &str, cores: impl IntoIterator<Item = usize>, at_once: usize) -> Seat {
        Seat { node: node.into(), cores: cores.into_iter().collect(), at_once }
    }

    fn shares(seats: &[Seat]) -> Vec<u16> {
        (0..seats.len()).map(|rank| share(seats, rank)).collect()
    }

    #[test]
    fn cores_are_shared_out_whether_ranks_are_bound_or_not() {
        assert_eq!(shares(&[seat("a", 0..8, 8), seat("a", 0..8, 8), seat("b", 0..8, 8)]), [4, 4, 8]);
        assert_eq!(shares(&[seat("a", 0..4, 4), seat("a", 4..8, 4)]), [4, 4]);
        assert_eq!(shares(&[seat("a", [3], 1), seat("a", [5], 1)]), [1, 1]);
        assert_eq!(shares(&vec![seat("a", 0..9, 9); 3]), [3, 3, 3]);
    }

    #[test]
    fn limits_of_containers_count_and_everyone_has_a_thread() {
        assert_eq!(shares(&vec![seat("a", 0..64, 8); 2]), [4, 4]);
        assert_eq!(shares(&vec![seat("a", 0..2, 2); 4]), [1; 4]);
    }

    #[test]
    fn this_process_sits_somewhere() {
        let seat = Seat::find();
        assert!(!seat.cores.is_empty() && seat.at_once >= 1 && !seat.node.is_empty());
    }
}
