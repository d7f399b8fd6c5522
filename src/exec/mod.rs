//! Carries out a [`Plan`](crate::plan::Plan): reads, computes and writes tile by tile on all cores, with memory that depends on the
//! number of threads and on the tile, not on the files. Knows no dialect, and accepts nothing but a plan.

mod block;
mod budget;
mod compare;
mod crew;
mod difference;
mod journal;
mod load;
mod measure;
mod mixed;
mod pool;
mod prove;
mod quantised;
mod recipe;
mod restore;
mod roll;
mod run;
mod scaled;
mod spread;
mod tasks;
mod undo;
mod weighted;
mod window;

pub(crate) use block::compute;
pub(crate) use budget::{Needs, fitted, memory};
pub use compare::on_threads;
pub(crate) use compare::{Alternative, Comparison, Lay};
pub(crate) use difference::{Difference, Weight, change_squared};
pub(crate) use journal::{Draft, FileRecord, Journal};
pub(crate) use load::{check_finite, count_nonfinite, float_of, overflowed, read_factors, values};
pub(crate) use measure::Figures;
#[cfg(test)]
pub(crate) use measure::Miss;
pub(crate) use prove::prove;
pub(crate) use recipe::{digests, sha256};
pub(crate) use restore::{Restored, restored};
pub(crate) use roll::{Rolled, Site, Start, roll_forward};
pub use run::{ExecOptions, Progress};
pub(crate) use run::{Finished, Keeping, Ledger, Outcome, Output, interrupted, run};
pub(crate) use undo::{UndoDraft, UndoLog};
pub(crate) use weighted::{Metric, Weighted};
pub(crate) use window::WINDOW;
