//! Models that run: forward passes of a base, of the base with adapters on the fly, and of the merged view, from the same files and without
//! writing one. candle computes; the blocks are written here, because candle's models keep their linear layers to themselves and
//! take nothing but finished weights: one copy of the weights for each adapter, and no choice of adapter by row. Feature `eval`.

mod act;
mod config;
mod data;
mod decoder;
mod encoder;
mod evaluate;
mod greedy;
mod layers;
mod measure;
mod metrics;
mod predict;
mod t5;
mod task;
mod text;
mod weights;

pub use config::Family;
pub use data::{Data, Row};
pub use decoder::Decoder;
pub use encoder::{Encoder, Head};
pub use evaluate::{Evaluated, evaluate};
pub use predict::predict;
pub use t5::T5;
pub use task::{AskOptions, Runner, Said, Task};
pub use text::Text;
pub use weights::{Base, View, Weights};

use crate::error::Error;
pub use crate::exec::on_threads;
use crate::rules;

/// What candle says, as one of our errors: shapes were checked before, so this is the model's doing.
fn computed(error: candle_core::Error) -> Error {
    // With RUST_BACKTRACE it brings a trace, which is for developers of candle.
    let text = error.to_string();
    Error::new(rules::COMPUTED, format!("the forward pass failed: {}", text.lines().next().unwrap_or_default()))
}
