//! The arithmetic: slices in, slices out. No files, no names, no dtype beyond the four floats, and
//! the codes of [`float8`].
//!
//! Everything is computed in f64 in a fixed order and rounded once, to nearest even, straight to the format of the weight. A
//! product of two f32 values is exact in f64 (24 + 24 significant bits of 53), so multiply-then-add and fused multiply-add give
//! the same bits, and so does every instruction set: the bytes of a merge do not depend on the machine (`spec/adapter-model.md`,
//!
//!
//! 16-bit weights go through f32 where an error bound shows that the bits are the same ([`single`]).
//!
//! Each kernel is written once as plain code over fixed-size blocks, which the compiler turns into vectors, and instantiated per
//! instruction set in [`dispatch`].

mod dispatch;
mod float;
pub(crate) mod float8;
pub(crate) mod fusion;
mod gram;
mod half;
pub(crate) mod lowrank;
mod magnitude;
mod place;
mod replay;
mod single;
mod stochastic;
mod thin;
mod tile;
mod vector;

pub(crate) use dispatch::{Isa, delta_tile, largest, update_tile};
pub(crate) use float::{Float, Value};
pub(crate) use gram::{product_inner, product_norm};
pub(crate) use magnitude::limit;
pub(crate) use place::place;
pub(crate) use replay::Step;
pub(crate) use stochastic::Dice;
pub(crate) use thin::add_thin;
pub(crate) use tile::{Narrower, Part, Rounding, Sums, Tile};
