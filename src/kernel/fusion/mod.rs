//! Several updates of one matrix made into one, by methods that are more than a sum. All of them see the updates alone, and none the factors
//! that they happen to come in.

mod core;
pub(crate) mod peft;
mod prune;
mod relation;
mod select;
mod ties;
mod value;

pub(crate) use core::{Product, Term, core_space, iso_c, knots, tsv};
pub(crate) use prune::Keep;
pub(crate) use relation::{Relation, relation};
pub(crate) use select::{CANDIDATES, Reading};
pub(crate) use value::{ByValue, Drops, Tally, key};
