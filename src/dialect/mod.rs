//! Dialects: what names and config fields mean. They know nothing of bytes, and nothing of each other.
#![cfg_attr(not(test), warn(clippy::indexing_slicing, reason = "numbers from a file index nothing unchecked"))]

pub(crate) mod container;
pub(crate) mod foreign;
pub(crate) mod peft;
