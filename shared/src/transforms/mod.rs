//! From an image file to the views of a sample: decoding, and augmentations with the bytes of torchvision + Pillow.
//!
//! Every augmentation comes in two halves: *drawing* its parameters from a [`KeyedRng`](crate::rng::KeyedRng), and *applying* them,
//! which is pure. [`Recipe`] puts them together: [`Recipe::draw`] gives [`ViewParams`], plain numbers that a shard stores beside the
//! pixels, and [`Recipe::apply`] makes the same pixels of them again, anywhere.
//!
//! A decoded image is interleaved RGB; the resize reads that and writes three [`Planes`], on which all later steps work in place.
//! Kernels are compiled for several instruction sets and picked at run time by [`Level`]; all give the same bytes. One [`Scratch`]
//! per worker holds all memory, so nothing is allocated once it is warm.

pub mod built_in;
pub mod color_jitter;
pub mod crop;
pub mod decode;
pub mod flip;
pub mod gaussian_blur;
pub mod grayscale;
mod image;
mod jpeg;
pub mod level;
#[cfg(feature = "libjpeg")]
mod libjpeg;
pub mod normalize;
pub mod recipe;
#[cfg(test)]
mod reference;
pub mod resize;
pub mod solarize;
mod view;
mod view_recipe;
mod weights;

pub use image::{Planes, RgbImage};
pub use level::Level;
pub use recipe::{Recipe, Scratch, View, ViewParams, ViewRecipe};
pub use resize::{Interpolation, PassOrder};
