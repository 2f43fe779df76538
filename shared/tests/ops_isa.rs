//! The blocks of the CPU engine against their twins with the instruction sets of the machine that `ops` does not run with: the choice
//! holds for a whole process, so that these tests have one of their own.

#[path = "ops/bits.rs"]
mod bits;
#[path = "ops/block.rs"]
mod block;
#[path = "ops/support.rs"]
mod support;
#[path = "ops/token_block.rs"]
mod token_block;
#[path = "ops/twins.rs"]
mod twins;

use shared::ops::{Isa, force_isa, isa};
use support::TestResult;

#[test]
fn every_instruction_set_agrees_with_the_reference() -> TestResult {
    let mut available = Isa::available();
    assert!(available.contains(&Isa::Portable));
    // The best is what all other tests run with.
    if available.len() > 1 {
        available.retain(|&chosen| chosen != isa());
    }
    for chosen in available {
        force_isa(chosen)?;
        assert_eq!(isa(), chosen);
        for test in [
            twins::convolutions_of_every_kind_at_odd_sizes,
            twins::every_activation_with_and_without_a_residual,
            twins::depthwise_convolutions_at_odd_sizes,
            twins::one_pixel,
            twins::small_and_thin_images,
            twins::sizes_that_are_cut_into_several_pieces,
            twins::residual_blocks,
            twins::inverted_residual_blocks,
            twins::pools_and_rows,
            twins::blocks_of_transformers,
            bits::all_gradients_have_the_same_bits_at_any_thread_count,
            bits::results_do_not_depend_on_whether_a_backward_pass_follows,
            bits::nan_is_never_lost,
            bits::nan_reaches_its_group_in_training,
            bits::nan_reaches_its_row_and_the_loss,
        ] {
            test().map_err(|error| format!("{chosen}: {error}"))?;
        }
    }
    Ok(())
}
