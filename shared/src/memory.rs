//! How much memory this process has held: what a stage reports of itself, never part of a result.

/// The most memory that this process has held at once since it began, in bytes; none where the system does not tell.
///
/// It counts what lies in physical memory: the program, its libraries, and the pages of mapped files that were touched. Linux tells
/// it in `/proc/self/status`.
///
/// # Examples
/// ```
/// if let Some(bytes) = shared::memory::peak_memory_bytes() {
///     assert!(bytes > 100_000);
/// }
/// ```
pub fn peak_memory_bytes() -> Option<u64> {
    if !cfg!(target_os = "linux") {
        return None;
    }
    high_water_bytes(&std::fs::read_to_string("/proc/self/status").ok()?)
}

/// The line `VmHWM:    1234 kB` of a status file; the system's kB are 1024 bytes.
fn high_water_bytes(status: &str) -> Option<u64> {
    let value = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    value.trim().strip_suffix("kB")?.trim_end().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn high_water_mark_is_found_among_other_lines() {
        assert_eq!(
            high_water_bytes("Name:\tx\nVmPeak:\t 9 kB\nVmHWM:\t    1234 kB\nVmRSS:\t 7 kB\n"),
            Some(1234 * 1024)
        );
        for status in [
            "",
            "VmRSS:\t 7 kB\n",
            "VmHWM:\n",
            "VmHWM:\t x kB\n",
            "VmHWM:\t 7 MB\n",
            "VmHWM:\t 18446744073709551615 kB\n",
        ] {
            assert_eq!(high_water_bytes(status), None, "{status}");
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn peak_covers_memory_that_was_touched() {
        const BYTES: usize = 32 << 20;
        let touched = vec![1u8; BYTES];
        assert!(peak_memory_bytes().unwrap() > BYTES as u64);
        drop(std::hint::black_box(touched));
        assert!(peak_memory_bytes().unwrap() > BYTES as u64, "a peak stays when the memory is given back");
    }
}
