//! The arguments of `combine`.

use std::ffi::OsString;
use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, ValueEnum};

use super::{FactorDtype, OpenArgs, RankArgs, SplitArg, To, loader_parser};
use crate::{CombineMethod, Loader, PeftKind};

/// What a recipe says, so that it is not said beside it.
const RECIPE: [&str; 17] = [
    "prefix",
    "adapters",
    "method",
    "density",
    "epsilon",
    "outliers",
    "seed",
    "compat",
    "majority_sign",
    "weight",
    "parts",
    "allow_base_mismatch",
    "rule",
    "loader",
    "dtype",
    "split",
    "save_recipe",
];

/// Write several adapters as one
#[derive(Debug, Args)]
#[command(after_help = COMBINE_EXAMPLES)]
#[command(override_usage = "loratool combine [OPTIONS] <ADAPTER[:WEIGHT]>... -o <OUT>")]
#[command(group = clap::ArgGroup::new("rule").args(["rank", "energy", "error", "budget"]))]
pub(in super::super) struct CombineArgs {
    /// The adapters, each a folder or a .safetensors file, with the weight of each [default: 1]
    #[arg(value_name = "ADAPTER[:WEIGHT]", required_unless_present = "recipe")]
    pub adapters: Vec<OsString>,
    /// What to write: a container if the name ends in .safetensors, otherwise a PEFT folder
    #[arg(long, short, value_name = "OUT", required_unless_present = "dry_run")]
    pub output: Option<PathBuf>,
    /// The format to write [default: by the name of OUT]
    #[arg(long, value_enum)]
    pub to: Option<To>,
    /// Do what a recipe says instead of what adapters and options say
    #[arg(long, value_name = "FILE", conflicts_with_all = RECIPE)]
    pub recipe: Option<PathBuf>,
    /// Write down what is combined and how, with the content of each adapter, as a recipe
    #[arg(long, value_name = "FILE", conflicts_with = "dry_run")]
    pub save_recipe: Option<PathBuf>,
    /// Replace the output if it exists, in one step, once the new one is complete
    #[arg(long)]
    pub overwrite: bool,
    /// Compute everything, say what it would lose, and write nothing
    #[arg(long)]
    pub dry_run: bool,
    #[command(flatten)]
    pub method: MethodArgs,
    /// As PEFT's add_weighted_adapter does it: peft:linear, peft:cat, peft:svd, … (see below)
    #[arg(long, value_name = "peft:TYPE", value_parser = peft_parser(), hide_possible_values = true, conflicts_with = "method", help_heading = "How adapters are combined")]
    pub compat: Option<PeftKind>,
    /// What decides a sign in those of PEFT's types that elect one
    #[arg(long, value_enum, requires = "compat", help_heading = "How adapters are combined")]
    pub majority_sign: Option<MajoritySignArg>,
    /// The weight of some targets, as a factor: a glob over parts of their names; of adapter N alone with N: in front; may be repeated
    #[arg(long, value_name = "[N:]GLOB=W", help_heading = "How adapters are combined", allow_hyphen_values = true)]
    pub weight: Vec<String>,
    /// Of the chance in dare-linear, dare-ties and della [default: 0]
    #[arg(long, value_name = "N", help_heading = "How adapters are combined")]
    pub seed: Option<u64>,
    /// What becomes of full tensors, rows, magnitudes and multipliers that have no sum
    #[arg(long, value_enum, default_value_t = PartsArg::Error, help_heading = "How adapters are combined")]
    pub parts: PartsArg,
    /// Rename targets that start with FROM so that they start with TO, where adapters of one model name it differently
    #[arg(long, value_name = "FROM=TO", help_heading = "How adapters are combined")]
    pub prefix: Option<String>,
    /// Combine adapters that name different bases by their digests
    #[arg(long, help_heading = "How adapters are combined")]
    pub allow_base_mismatch: bool,
    #[command(flatten)]
    pub rank: RankArgs,
    /// Bring all ranks up to the next size that this loader makes room for anyway (vllm: 8, 16, 32, 64, 128, 256, 320, 512)
    #[arg(long = "for", value_name = "LOADER", value_parser = loader_parser(), requires = "rule")]
    pub loader: Option<Loader>,
    /// The dtype of the factors [default: the adapters' if nothing is rounded, otherwise f32]
    #[arg(long, value_enum, help_heading = "What the factors are like")]
    pub dtype: Option<FactorDtype>,
    /// Which factor takes the singular values
    #[arg(long, value_enum, default_value_t = SplitArg::Sqrt, help_heading = "What the factors are like")]
    pub split: SplitArg,
    #[command(flatten)]
    pub open: OpenArgs,
    /// Threads to compute on [default: one per core]
    #[arg(long, value_name = "N", visible_alias = "cores", help_heading = "How it runs")]
    pub threads: Option<NonZeroUsize>,
}

/// How updates are combined, and the numbers that it takes.
#[derive(Debug, Args)]
pub(in super::super) struct MethodArgs {
    /// What becomes of the updates
    #[arg(long, value_parser = PossibleValuesParser::new(CombineMethod::NAMES), default_value = "linear", hide_possible_values = true, help_heading = "How adapters are combined")]
    pub method: String,
    /// The share of values that is kept, for methods that drop some [default: 0.2 of ties, knots and core-space, 0.85 of breadcrumbs, else 0.5]
    #[arg(long, value_name = "SHARE", help_heading = "How adapters are combined", allow_hyphen_values = true)]
    pub density: Option<String>,
    /// By how much the chances of the largest and the smallest value of a row differ, in della [default: 0.2]
    #[arg(long, value_name = "SHARE", help_heading = "How adapters are combined", allow_hyphen_values = true)]
    pub epsilon: Option<String>,
    /// The share of the largest values that breadcrumbs drops [default: 0.01]
    #[arg(long, value_name = "SHARE", help_heading = "How adapters are combined", allow_hyphen_values = true)]
    pub outliers: Option<String>,
}

/// What decides a sign.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(in super::super) enum MajoritySignArg {
    /// The sum of the values
    Total,
    /// The sign that most have
    Frequency,
}

/// The types of PEFT by their names, of which the library has the list.
fn peft_parser() -> impl TypedValueParser<Value = PeftKind> {
    let names = PossibleValuesParser::new(PeftKind::ALL.map(PeftKind::name));
    names.map(|name| PeftKind::ALL.into_iter().find(|kind| kind.name() == name).unwrap_or(PeftKind::Linear))
}

/// What becomes of parts that have no sum.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(in super::super) enum PartsArg {
    /// Refuse them by name
    Error,
    /// That of the first adapter that has it
    First,
    /// Their mean by weight
    Average,
}

const COMBINE_EXAMPLES: &str = "\
Methods:
  linear           the sum of weight times update; exact, ranks add up
  cat              the same, and never with another rank
  svd              the same with the highest rank of the adapters
  slerp            two updates, on the arc between them
  ties             the largest values; a sign by majority, the mean of those
  magnitude-prune  the sum of the largest values
  dare-linear      the sum of what chance leaves, divided by the density
  dare-ties        what chance leaves, as by ties
  della            the same, with more chance for large values
  breadcrumbs      the sum without the largest and the smallest values
  knots            ties on the singular vectors of all updates together
  core-space       ties in the space that the factors span
  tsv              singular vectors of all, made orthonormal
  iso-c            the sum with equal singular values

Of PEFT: linear, cat, svd, ties, ties_svd, dare_linear, dare_linear_svd,
  dare_ties, dare_ties_svd, magnitude_prune, magnitude_prune_svd. Those without
  svd, but for cat, mix A with A and B with B, and are no sum of updates.

Examples:
  loratool combine ./a:0.7 ./b:-0.3 -o ./ab
  loratool combine ./a ./b --rank 16 -o ./ab
  loratool combine ./a ./b --weight 'layers.[0-7]=0.5' --weight '2:mlp=0' -o ./c
  subtract:  loratool combine ./a ./b:-1 -o ./difference
  negate:    loratool combine ./a:-1 -o ./opposite
  scale:     loratool combine ./a:0.5 -o ./half

Without a rule for ranks they add up. Updates are combined, never A with A and
B with B. What a rank costs is known and not estimated, and is said before
anything is written.";
