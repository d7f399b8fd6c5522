//! `resize`, from the arguments as typed.

use std::path::PathBuf;

use super::super::args::ResizeArgs;
use super::extract::{by_name, dtype, split};
use super::rank::rule;
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
        // The arguments demand one.
        rank: rule(&args.rank)?.unwrap_or(RankRule::Fixed(16)),
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
