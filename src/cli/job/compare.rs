//! `compare`, from the arguments as typed.

use std::path::PathBuf;

use super::super::args::CompareArgs;
use super::super::render::plot;
use super::{bind, open};
use crate::{CompareOptions, ExecOptions, OpenOptions, ReadMode, Result};

#[derive(Debug)]
pub(in super::super) struct CompareJob {
    pub adapters: [PathBuf; 2],
    pub base: Option<PathBuf>,
    pub plot: Option<PathBuf>,
    /// Text lists every tensor.
    pub every_target: bool,
    pub open: OpenOptions,
    pub options: CompareOptions,
}

pub(super) fn compare(args: CompareArgs) -> Result<CompareJob> {
    args.plot.as_deref().map(plot::check).transpose()?;
    Ok(CompareJob {
        adapters: [args.one, args.other],
        base: args.base,
        plot: args.plot,
        every_target: args.tensors,
        open: open(&args.open, ReadMode::Read)?,
        options: CompareOptions {
            bind: bind(args.bind)?,
            exec: ExecOptions { threads: args.threads, ..Default::default() },
            ..Default::default()
        },
    })
}
