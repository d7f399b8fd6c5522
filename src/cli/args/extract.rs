//! The arguments of `extract`.

use std::num::{NonZeroU64, NonZeroUsize};
use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::{RankArgs, To};

/// Write the adapter that is closest to the difference of two checkpoints
#[derive(Debug, Args)]
#[command(after_help = EXTRACT_EXAMPLES)]
#[command(override_usage = "loratool extract [OPTIONS] [--base <BASE>] --tuned <TUNED> -o <OUT>\n           \
    <--rank <R>|--energy <SHARE>|--error <SHARE>|--budget <N>|--auto>")]
#[command(group = clap::ArgGroup::new("rule").required(true).args(["rank", "energy", "error", "budget", "auto"]))]
pub(in super::super) struct ExtractArgs {
    /// The tuned checkpoint: a folder or a .safetensors file
    #[arg(long, value_name = "TUNED")]
    pub tuned: PathBuf,
    /// The checkpoint that it was tuned from; without it, the weights themselves are factorised
    #[arg(long, value_name = "BASE")]
    pub base: Option<PathBuf>,
    /// What the adapter calls its base, such as a name on the Hub [default: BASE as it is given]
    #[arg(long, value_name = "NAME", requires = "base")]
    pub base_name: Option<String>,
    /// What to write: a container if the name ends in .safetensors, otherwise a PEFT folder
    #[arg(long, short, value_name = "OUT")]
    pub output: PathBuf,
    /// The format to write [default: by the name of OUT]
    #[arg(long, value_enum)]
    pub to: Option<To>,
    /// Replace the output if it exists, in one step, once the new one is complete
    #[arg(long)]
    pub overwrite: bool,
    #[command(flatten)]
    pub rank: RankArgs,
    /// Per target, what stands out of the noise that rounding to the dtype of TUNED has added
    #[arg(long, help_heading = "Rank: one of")]
    pub auto: bool,
    /// With a rule other than --rank: the highest rank of a target [default: 256]
    #[arg(long, value_name = "R", conflicts_with = "rank", help_heading = "Rank: one of")]
    pub max_rank: Option<NonZeroU64>,
    /// Only tensors in whose names this regular expression matches
    #[arg(long, value_name = "REGEX", help_heading = "Which tensors")]
    pub targets: Option<String>,
    /// No tensors in whose names this regular expression matches
    #[arg(long, value_name = "REGEX", help_heading = "Which tensors")]
    pub exclude: Option<String>,
    /// What becomes of changes without factors [default: left out up to 1 %]
    #[arg(long, value_enum, requires = "base", help_heading = "Which tensors")]
    pub rest: Option<RestArg>,
    /// What the layers' inputs are like, a tensor for each weight, (in) root mean squares or (in, n) a factor of their covariance: make the
    /// error of the outputs small instead
    #[arg(long, value_name = "FILE", help_heading = "What the factors are like")]
    pub act_stats: Option<PathBuf>,
    /// The dtype of the factors
    #[arg(long, value_enum, default_value_t = FactorDtype::F32, help_heading = "What the factors are like")]
    pub dtype: FactorDtype,
    /// Which factor takes the singular values
    #[arg(long, value_enum, default_value_t = SplitArg::Sqrt, help_heading = "What the factors are like")]
    pub split: SplitArg,
    /// How the singular components are found
    #[arg(long, value_enum, default_value_t = MethodArg::Auto, help_heading = "How it runs")]
    pub method: MethodArg,
    /// How far the error may be above the smallest possible one, as a share of it [default: 0.001]
    #[arg(long, value_name = "SHARE", allow_hyphen_values = true, help_heading = "How it runs")]
    pub tolerance: Option<String>,
    /// Of the random start: the same seed gives the same bytes
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "How it runs")]
    pub seed: u64,
    /// Threads to compute on [default: one per core]
    #[arg(long, value_name = "N", visible_alias = "cores", help_heading = "How it runs")]
    pub threads: Option<NonZeroUsize>,
    /// Map the input files into memory instead of reading them; no other program may shorten them meanwhile
    #[arg(long, help_heading = "How it runs")]
    pub mmap: bool,
    /// Use the portable kernels even where the machine has better ones
    #[arg(long, hide = true)]
    pub portable: bool,
}

const EXTRACT_EXAMPLES: &str = "\
Examples:
  loratool extract --base ./model --tuned ./tuned --rank 16 -o ./adapter
  loratool extract --base ./model --tuned ./tuned --auto -o ./adapter
  loratool extract --base ./model --tuned ./tuned --budget 20MB -o ./adapter
  loratool extract --base ./model --tuned ./tuned --rank 8 --targets 'q_proj|v_proj' --rest skip -o ./adapter
  loratool extract --tuned ./model --rank 64 -o low-rank.safetensors

The error that is printed is that of the factors as they are stored. The excess
is how far it is before they are rounded, by estimate, above the error of the
best factors of that rank. The same inputs, options and seed give the same bytes
on any number of threads, on machines with the same instruction set.";

/// What becomes of biases, norms, tied and resized weights, and the output head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(in super::super) enum RestArg {
    /// Left out, whatever they are
    Skip,
    /// Stored whole beside the factors
    Store,
    /// Refused
    Error,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(in super::super) enum FactorDtype {
    F32,
    Bf16,
    F16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(in super::super) enum SplitArg {
    /// Both, as square roots
    Sqrt,
    /// B; the rows of A are orthonormal
    B,
    /// A; the columns of B are orthonormal
    A,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(in super::super) enum MethodArg {
    /// By iteration, and exactly where that does not pay
    Auto,
    /// By a whole decomposition in f64, which takes a hundred times as long
    Exact,
}
