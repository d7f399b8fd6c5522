//! Carries out a [`Plan`](crate::plan::Plan): reads, computes and writes tile by tile on all cores, with memory that depends on the
//! number of threads and on the tile, not on the files. Knows no dialect, and accepts nothing but a plan.

mod block;
mod budget;
mod compare;
mod crew;
mod load;
mod measure;
mod run;
mod spread;
mod tasks;

pub(crate) use block::compute;
pub(crate) use budget::{fitted, memory};
pub(crate) use compare::{Alternative, Comparison, Lay, on_threads};
pub(crate) use load::{check_finite, count_nonfinite, float_of, read_factors};
pub(crate) use measure::Figures;
#[cfg(test)]
pub(crate) use measure::Miss;
pub use run::{ExecOptions, Progress};
pub(crate) use run::{Outcome, interrupted, run};
