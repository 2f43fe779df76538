//! Pictures of the report, PNG only: charts by `plotters` on a [`canvas::Canvas`], with an embedded typeface, so that a picture
//! is the same on every machine, fonts installed or not.
//!
//! Sizes are in units; the file has two pixels per unit, so that text stays sharp on dense screens.

pub(crate) mod bars;
pub(crate) mod canvas;
pub(crate) mod gallery;
pub(crate) mod lines;
pub(crate) mod palette;
pub(crate) mod scatter;
