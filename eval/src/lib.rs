//! The last stage.

pub mod feature_rows;
pub mod knn;
pub mod linear_probe;
mod matrix;
