//! Headers that announce 60000 x 60000 pixels: refused at once, without memory for them. A test of its own, since it watches the
//! memory of the whole process.

use std::path::Path;
use std::time::{Duration, Instant};

use shared::transforms::decode::{decode, dimensions};

/// The most address space that this process ever had, in bytes; none where the system does not tell.
fn peak_address_space() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmPeak:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}

#[test]
fn headers_of_huge_pictures_are_refused_at_once() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/refused");
    let before = peak_address_space();
    let start = Instant::now();
    for name in
        ["bomb.png", "bomb.jpg", "bomb_progressive.jpg", "bomb.gif", "bomb.tif", "bomb.bmp", "bomb.webp", "bomb.ppm"]
    {
        let bytes = std::fs::read(folder.join(name)).expect("a golden file");
        let faults = [decode(&bytes).map(drop), dimensions(&bytes).map(drop)];
        for fault in faults {
            let fault = fault.expect_err(name).to_string();
            // a strip of a TIFF file tells its length, which does not fit these sides
            let reason = if name == "bomb.tif" { "inconsistent sizes" } else { "60000 x 60000 pixels are too many" };
            assert!(fault.contains(reason), "{name}: {fault}");
        }
    }
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    if let (Some(before), Some(after)) = (before, peak_address_space()) {
        assert!(after - before < 64 << 20, "{} bytes were set aside", after - before);
    }
}

#[test]
fn a_small_file_that_announces_much_is_refused() {
    // within the limit of pixels, but not to be had out of so few bytes
    let ppm = b"P5 16000 16000 255\n".to_vec();
    let fault = decode(&ppm).expect_err("nothing in it").to_string();
    assert!(fault.contains("16000 x 16000 pixels cannot be in 19 bytes"), "{fault}");
}
