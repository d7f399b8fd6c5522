//! The largest singular components of a matrix that is never held: read in sweeps, of which each gives the products with a thin matrix
//! both ways.

mod basis;
mod core;
mod difference;
mod dispatch;
mod factors;
mod found;
mod krylov;
mod noise;
mod product;
mod random;
mod sweep;

pub(crate) use basis::product;
pub(crate) use dispatch::{add_transposed_times, squares, subtract, times};
pub(crate) use factors::{Share, factors, fitted_to, outer};
pub(crate) use found::Found;
pub(crate) use krylov::{Failure, Goal, Sweeps, Want, iterate};
pub(crate) use noise::Noise;
pub(crate) use product::Triangle;
pub(crate) use random::signs;
pub(crate) use sweep::{Rows, STEP};
