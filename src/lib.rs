//! LoRA adapters on disk: inspected, validated, converted, and merged into base checkpoints, exactly or refused by name.
//!
//! Data flows one way, and the modules are named after it:
//!
//! ```text
//! files -> io -> codec -> dialect -> Adapter ---+
//!                                               +-> plan -> exec -> io::publish -> files
//! files -> io -> codec -> Checkpoint -----------+             |
//!                                                             +-> report
//! ```
//!
//! An [`Adapter`] and a [`Checkpoint`] are valid by construction and cost no more than their headers. A [`Plan`] is the proof that
//! they fit, and everything that a merge will do; a merge of an unchecked pair cannot be written down.
//!
//! ```
//! # fn main() -> loratool::Result<()> {
//! # let root = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures");
//! let base = loratool::open_checkpoint(format!("{root}/models/llama-tiny"))?;
//! let adapter = loratool::open_adapter(format!("{root}/adapters/llama-qv-r8"))?;
//!
//! // Inspect: what is in the file, from its header alone.
//! let report = loratool::inspect_adapter(&adapter, &Default::default())?;
//! assert_eq!((report.targets.len(), report.targets[0].rank), (4, 8));
//!
//! // Walk the updates, a few rows at a time.
//! for target in adapter.targets() {
//!     let (rows, cols) = target.out_in();
//!     let first = loratool::delta_rows(target, 0..1)?;
//!     println!("{} ({rows}, {cols}): first value {:e}", target.tensor, first[0]);
//! }
//!
//! // Bind them, and merge one tensor: the bytes that a merge would write, in the base's dtype.
//! let plan = loratool::Plan::new(&base, &[loratool::Weighted::full(&adapter)], &Default::default(), &Default::default())?;
//! let bytes = loratool::merge_tensor(&plan, "model.layers.0.self_attn.q_proj.weight")?;
//! assert_eq!(bytes.len(), 64 * 64 * 2);
//! # Ok(())
//! # }
//! ```
#![deny(unsafe_code)]
#![warn(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, clippy::print_stderr)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking"))]

mod adapter;
mod checkpoint;
#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod cli;
mod codec;
mod dialect;
mod error;
#[cfg(feature = "eval")]
pub mod eval;
mod exec;
mod io;
mod kernel;
mod limits;
mod loader;
mod op;
mod open;
mod plan;
pub mod report;
pub mod rules;
mod tensor;

pub use adapter::{
    Adapter, AdapterParts, Axis, BaseIdentity, BiasDelta, Factor, Kind, Lineage, LineageInput, Orientation, Removed, Replacement,
    Rescaling, RowReplacement, Scaling, ScalingRule, Target,
};
pub use checkpoint::{Checkpoint, Companion, ModelConfig, Shard, Tie, TieReason};
pub use codec::safetensors::{SafetensorsFile, Strictness};
pub use codec::shards::ShardIndex;
pub use error::{Class, Diagnostic, Error, Place, Result};
pub use exec::{ExecOptions, Progress};
pub use io::{Durability, Overwrite, ReadMode};
pub use limits::Limits;
pub use loader::{Basis, Effect, Loader, LoaderRule};
pub use op::{
    ActStats, BakeOptions, Combination, CombineMethod, CombineOptions, CompareOptions, ConvertOptions, ConvertTo, ExtractOptions,
    InspectOptions, LayerWeight, MajoritySign, MergeOptions, Method, MethodNumbers, PartsPolicy, PeftCombination, PeftKind,
    RankRule, Recipe, RecipeAdapter, RecoverOptions, ResizeOptions, RestPolicy, Split, StagedRecipe, Stated, Unmerged, Values,
    VerifyOptions, bake, check_loaders, combine, compare, convert, delta_rows, dry_run, dry_run_each, dry_run_in_place, extract,
    inspect_adapter, inspect_checkpoint, linear_by_row, merge, merge_each, merge_in_place, merge_tensor, recompute_residual,
    recover, resize, spectrum, unmerge_by_log, unmerge_by_subtraction, validate_adapter, validate_checkpoint, verify,
    verify_digests,
};
pub use open::{OpenOptions, open_adapter, open_adapter_with, open_checkpoint, open_checkpoint_with};
pub use plan::{BindOptions, Binding, Ignored, OutputOptions, Plan, Renaming, Rounding, Weighted};
pub use tensor::{Dtype, MemorySource, Shape, TensorInfo, TensorSource};
