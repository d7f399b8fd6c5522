//! `resize`, from the arguments as typed.

use std::path::PathBuf;

use super::super::args::ResizeArgs;
use super::super::number;
use super::extract::{budget, by_name, dtype, split};
use super::{open, overwrite};
use crate::{ExecOptions, OpenOptions, RankRule, ReadMode, ResizeOptions, Result};

#[derive(Debug)]
pub(in super::super) struct ResizeJob {
    pub source: PathBuf,
    pub output: PathBuf,
    pub open: OpenOptions,
    pub options: ResizeOptions,
}

pub(super) fn resize(args: ResizeArgs) -> Result<ResizeJob> {
    let options = ResizeOptions {
        rank: rule(&args)?,
        loader: args.loader,
        split: split(args.split),
        dtype: args.dtype.map(dtype),
        to: by_name(args.to, &args.output),
        overwrite: overwrite(args.overwrite),
        exec: ExecOptions { threads: args.threads, ..Default::default() },
        ..Default::default()
    };
    Ok(ResizeJob { source: args.source, output: args.output, open: open(&args.open, ReadMode::Read)?, options })
}

/// Exactly one of them is given.
fn rule(args: &ResizeArgs) -> Result<RankRule> {
    if let Some(text) = &args.energy {
        return Ok(RankRule::Energy(number::finite(text, "share of the energy")?));
    }
    if let Some(text) = &args.error {
        return Ok(RankRule::Error(number::finite(text, "relative error")?));
    }
    match (&args.budget, args.rank) {
        (Some(text), _) => budget(text),
        (None, rank) => Ok(RankRule::Fixed(rank.map_or(16, std::num::NonZero::get))),
    }
}
