//! Dialects: what names and config fields mean. They know nothing of bytes, and nothing of each other.

pub(crate) mod container;
pub(crate) mod foreign;
pub(crate) mod peft;
