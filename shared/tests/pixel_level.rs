//! The instruction set of the pixel kernels, chosen for the whole process: a test of its own.

use shared::cli::ComputeArgs;
use shared::ops::Isa;
use shared::transforms::Level;

#[test]
fn the_flag_limits_the_default_level() {
    assert_eq!(Level::default(), Level::best());
    for (isa, name) in [(Isa::Portable, "scalar"), (Isa::Avx2, "avx2"), (Isa::Avx512, "avx512")] {
        if Isa::available().contains(&isa) {
            ComputeArgs { isa: Some(isa) }.apply().expect("the machine has it");
            assert_eq!(Level::default().name(), name);
        }
    }
    // a limit above what the machine has changes nothing
    Level::limit(Isa::Avx512);
    assert_eq!(Level::default(), Level::best());
    Level::limit(Isa::Portable);
    assert_eq!(Level::default(), Level::SCALAR);
}
