//! The arguments of `compare`.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::Args;

use super::{BindArgs, OpenArgs};

/// Say how two adapters lie to each other, and what their sum would cost
#[derive(Debug, Args)]
#[command(after_help = COMPARE_EXAMPLES)]
pub(in super::super) struct CompareArgs {
    /// One adapter: a folder or a .safetensors file
    pub one: PathBuf,
    /// The other
    pub other: PathBuf,
    /// Also say how large the updates are beside the weights of this base, which are read for it
    #[arg(long, value_name = "BASE")]
    pub base: Option<PathBuf>,
    /// Draw which directions the two share, and what each rank costs, as .svg or .png
    #[arg(long, value_name = "FILE")]
    pub plot: Option<PathBuf>,
    /// List every tensor on its own
    #[arg(long)]
    pub tensors: bool,
    #[command(flatten)]
    pub open: OpenArgs,
    #[command(flatten)]
    pub bind: BindArgs,
    /// Threads to compute on [default: one per core]
    #[arg(long, value_name = "N", visible_alias = "cores", help_heading = "How it runs")]
    pub threads: Option<NonZeroUsize>,
}

const COMPARE_EXAMPLES: &str = "\
Examples:
  loratool compare ./french ./legal
  loratool compare ./french ./legal --base ./model --plot overlap.svg

Nothing is written but the picture. The same figures of a random adapter stand
beside those of the second one: what is no more than chance says nothing.";
