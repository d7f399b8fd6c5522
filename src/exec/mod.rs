//! Carries out a [`Plan`](crate::plan::Plan): reads, computes and writes tile by tile on all cores, with memory that depends on the
//! number of threads and on the tile, not on the files. Knows no dialect, and accepts nothing but a plan.

mod block;
mod load;
mod run;

pub(crate) use block::compute;
pub(crate) use load::{check_finite, count_nonfinite, read_factors};
pub use run::{ExecOptions, Progress};
pub(crate) use run::{Outcome, interrupted, memory, run};
