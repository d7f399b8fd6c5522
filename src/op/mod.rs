//! The verbs. Each takes what it works on as values (`&Checkpoint`, `&Adapter`), options with defaults, and gives a report.

mod account;
mod bake;
mod combine;
mod companions;
mod compare;
mod convert;
mod crew;
mod delta;
mod digests;
mod extract;
mod family;
mod identity;
mod in_place;
mod inspect;
mod judge;
mod lineage;
mod loaders;
mod merge;
mod method;
mod mixed;
mod overall;
mod plain;
mod rank;
mod recorded;
mod residual;
mod resize;
mod resume;
mod spectrum;
mod spool;
mod unmerge;
mod unmerged;
mod validate;
mod verdict;
mod verify;
mod write;

pub use bake::{BakeOptions, bake};
pub use combine::{
    Combination, CombineMethod, CombineOptions, LayerWeight, MajoritySign, MethodNumbers, PartsPolicy, PeftCombination, PeftKind,
    Recipe, RecipeAdapter, StagedRecipe, Stated, combine,
};
pub use compare::{CompareOptions, compare};
pub use convert::{ConvertOptions, ConvertTo, convert};
pub use delta::{delta_rows, merge_tensor};
pub use extract::{ActStats, ExtractOptions, Method, RestPolicy, Split, extract};
pub use in_place::{RecoverOptions, dry_run_in_place, merge_in_place, recover};
pub use inspect::{InspectOptions, inspect_adapter, inspect_checkpoint};
pub use loaders::check_loaders;
pub use merge::{MergeOptions, dry_run, dry_run_each, merge, merge_each};
pub use rank::RankRule;
pub use recorded::verify_digests;
pub use residual::recompute_residual;
pub use resize::{ResizeOptions, resize};
pub use spectrum::spectrum;
pub use unmerge::{unmerge_by_log, unmerge_by_subtraction};
pub use unmerged::{Unmerged, linear_by_row};
pub use validate::{Values, validate_adapter, validate_checkpoint};
pub use verify::{VerifyOptions, verify};
