//! Chooses the kernels of a convolution by its shape.

use super::flow::{Conv, Finish, Incoming, Outgoing, Source, Wanted};
use super::norm::Statistics;
use super::{depthwise, direct, pointwise, winograd};

#[derive(Debug, PartialEq, Eq)]
enum Kind {
    Pointwise,
    Depthwise,
    Winograd,
    Direct,
}

fn kind(conv: &Conv) -> Kind {
    let geometry = conv.geometry;
    if geometry.depthwise {
        Kind::Depthwise
    } else if geometry.kernel == 1 && geometry.stride == 1 && geometry.leading_padding(conv.height) == 0 {
        Kind::Pointwise
    } else if winograd::applies(conv) {
        Kind::Winograd
    } else {
        Kind::Direct
    }
}

/// Whether a convolution is a matrix product over all pixels.
pub(super) fn is_pointwise(conv: &Conv) -> bool {
    matches!(kind(conv), Kind::Pointwise)
}

/// `out = conv(source)` finished as `finish` says; returns the groups' statistics when they are gathered.
pub(super) fn forward(
    conv: &Conv,
    source: &Source<'_>,
    weight: &[f32],
    out: &mut [f32],
    finish: Finish<'_>,
) -> Vec<Statistics> {
    match kind(conv) {
        Kind::Pointwise => pointwise::forward(conv, source, weight, out, finish),
        Kind::Depthwise => depthwise::forward(conv, source, weight, out, finish),
        Kind::Winograd => winograd::forward(conv, source, weight, out, finish),
        Kind::Direct => direct::forward(conv, source, weight, out, finish),
    }
}

/// Gradients of the weights and of the source.
pub(super) fn backward(
    conv: &Conv,
    source: &Source<'_>,
    weight: &[f32],
    incoming: &Incoming<'_>,
    wanted: Wanted<'_>,
) -> Outgoing {
    match kind(conv) {
        Kind::Pointwise => pointwise::backward(conv, source, weight, incoming, wanted),
        Kind::Depthwise => depthwise::backward(conv, source, weight, incoming, wanted),
        Kind::Winograd => winograd::backward(conv, source, weight, incoming, wanted),
        Kind::Direct => direct::backward(conv, source, weight, incoming, wanted),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::Geometry;

    #[test]
    fn kernels_are_chosen_by_the_shape_of_an_image() {
        for (geometry, height, width, expected) in [
            (Geometry::same(16, 24, 1, 1), 9, 9, Kind::Pointwise),
            (Geometry::same(16, 24, 1, 2), 9, 9, Kind::Direct),
            (Geometry::depthwise(16, 3, 1), 9, 9, Kind::Depthwise),
            (Geometry::same(16, 24, 3, 1), 4, 4, Kind::Winograd),
            (Geometry::same(16, 24, 3, 1), 7, 7, Kind::Winograd),
            (Geometry::same(16, 24, 3, 1), 2, 2, Kind::Direct),
            (Geometry::same(16, 24, 3, 1), 1, 20, Kind::Direct),
            (Geometry::same(3, 24, 3, 1), 56, 56, Kind::Direct),
            (Geometry::same(16, 24, 3, 2), 56, 56, Kind::Direct),
        ] {
            for batch in [1, 32] {
                assert_eq!(kind(&Conv { geometry, batch, groups: 1, height, width }), expected, "{geometry:?}");
            }
        }
    }
}
