//! The arguments of `resize`.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::Args;

use super::{FactorDtype, OpenArgs, RankArgs, SplitArg, To, loader_parser};
use crate::Loader;

/// Write an adapter with other ranks, as close to it as they allow
#[derive(Debug, Args)]
#[command(after_help = RESIZE_EXAMPLES)]
#[command(override_usage = "loratool resize [OPTIONS] <SOURCE> -o <OUT>\n           \
    <--rank <R>|--energy <SHARE>|--error <SHARE>|--budget <N>>")]
#[command(group = clap::ArgGroup::new("rule").required(true).args(["rank", "energy", "error", "budget"]))]
pub(in super::super) struct ResizeArgs {
    /// The adapter: a folder or a .safetensors file
    pub source: PathBuf,
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
    /// Bring all ranks up to the next size that this loader makes room for anyway (vllm: 8, 16, 32, 64, 128, 256, 320, 512)
    #[arg(long = "for", value_name = "LOADER", value_parser = loader_parser())]
    pub loader: Option<Loader>,
    /// The dtype of the factors [default: that of each target]
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

const RESIZE_EXAMPLES: &str = "\
Examples:
  loratool resize ./adapter --rank 16 -o ./small
  loratool resize ./adapter --error 0.05 -o ./small
  loratool resize ./adapter --error 0.05 --for vllm -o ./served
  loratool resize ./adapter --budget 20MB --dtype bf16 -o small.safetensors

The product of the factors is never formed, and the error that is printed is not
an estimate. alpha follows the rank, so that the scale stays what it was.";
