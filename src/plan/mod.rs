//! Everything that a merge will do, known before the first byte is written. Binding proves that each part of an adapter fits one
//! tensor of the base; the plan lays out every output file from that proof. Headers and shapes only: tensor bytes are read here but to
//! tell whether two copies of a tied weight are equal. Fields are private, and the executor accepts nothing else, so a merge of an
//! unchecked pair cannot be written down.

mod bind;
mod families;
mod fused;
mod layout;
mod options;
mod outline;
mod output;
mod pairs;
mod quantised;
mod rename;
mod shape;
mod tied;

pub use bind::{Binding, Ignored};
pub(crate) use families::in_memory;
pub use layout::Plan;
pub(crate) use layout::{Change, CopyRange, Head, Keeps, Norms, Origin, OutShard, OutTensor};
pub use options::{BindOptions, Weighted};
pub(crate) use output::Mixing;
pub use output::{OutputOptions, Rounding};
pub(crate) use pairs::{Choice, Layer, Pairs, Rest, Whole};
pub(crate) use quantised::{Quantised, Role, Scale};
pub use rename::Renaming;
pub(crate) use shape::{Along, Contribution, Gain, Over, Panel, experts_of, is_conv1d};
