//! The scores of an evaluation, from counts, texts and logits to numbers with intervals. Nothing here runs a model or reads a
//! file, and every score is defined by a paper or a program that it is tested against.

pub(crate) mod bleu;
pub(crate) mod bootstrap;
pub(crate) mod chrf;
pub(crate) mod confusion;
pub(crate) mod divergence;
pub(crate) mod interval;
pub(crate) mod mcnemar;
pub(crate) mod share;
pub(crate) mod squad;
mod words;
