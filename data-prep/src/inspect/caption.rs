//! What was drawn for a view, in a few short lines for people.

use shared::transforms::ViewParams;
use shared::transforms::color_jitter::JitterStep;

/// Lines of a caption.
pub(super) const LINES: usize = 4;

/// The parameters of a view: its crop, its colours in the order in which they were changed, and the rest.
pub(super) fn caption(params: &ViewParams) -> [String; LINES] {
    let crop = params.crop;
    let mut place = format!("{} x {} at {}, {}", crop.width, crop.height, crop.left, crop.top);
    if params.flip {
        place += ", mirrored";
    }
    let [first, then] = params.jitter.map_or_else(Default::default, |jitter| {
        let parts = jitter.order.map(|step| {
            let factor = jitter.factors[step as usize];
            match step {
                JitterStep::Brightness => format!("bright {factor:.2}"),
                JitterStep::Contrast => format!("contr {factor:.2}"),
                JitterStep::Saturation => format!("satur {factor:.2}"),
                JitterStep::Hue => format!("hue {factor:+.2}"),
            }
        });
        [0, 2].map(|step| parts[step..step + 2].join(" "))
    });
    let mut rest = Vec::new();
    if params.grayscale {
        rest.push("grey".to_string());
    }
    if let Some(sigma) = params.blur_sigma {
        rest.push(format!("blur {sigma:.2} px"));
    }
    if let Some(threshold) = params.solarize_threshold {
        rest.push(format!("solarised from {threshold}"));
    }
    [place, first, then, rest.join(", ")]
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared::transforms::color_jitter::Jitter;
    use shared::transforms::crop::CropBox;

    #[test]
    fn captions_tell_everything_that_was_drawn() {
        let plain = ViewParams {
            source: (333, 500),
            crop: CropBox { top: 30, left: 124, height: 236, width: 192 },
            flip: false,
            jitter: None,
            grayscale: false,
            blur_sigma: None,
            solarize_threshold: None,
        };
        assert_eq!(caption(&plain), ["192 x 236 at 124, 30", "", "", ""]);
        let order = [JitterStep::Hue, JitterStep::Brightness, JitterStep::Saturation, JitterStep::Contrast];
        let all = ViewParams {
            flip: true,
            jitter: Some(Jitter { order, factors: [1.155, 0.64, 0.675, -0.027] }),
            grayscale: true,
            blur_sigma: Some(0.53),
            solarize_threshold: Some(128),
            ..plain
        };
        let [place, first, then, rest] = caption(&all);
        assert_eq!(place, "192 x 236 at 124, 30, mirrored");
        assert_eq!((first.as_str(), then.as_str()), ("hue -0.03 bright 1.15", "satur 0.68 contr 0.64"));
        assert_eq!(rest, "grey, blur 0.53 px, solarised from 128");
    }
}
