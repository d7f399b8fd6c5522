//! From a plan to files: reserve their space, carry out the tasks on all cores, add up what they found.

use std::fs::File;
use std::num::NonZeroUsize;
use std::path::PathBuf;

use super::budget::threads;
use super::crew::{Crew, Output};
use super::tasks::{Work, split};
use crate::error::{Error, Result};
use crate::io::{Durability, disk, write_error};
use crate::kernel::{Isa, Sums};
use crate::plan::{Head, OutShard, Plan};
use crate::rules;

/// How a plan is carried out. Nothing here changes a byte of the result.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ExecOptions {
    /// Threads. Default: one per core.
    pub threads: Option<NonZeroUsize>,
    /// Bytes of weights in one tile. Default 1 MiB, about one core's second-level cache.
    pub tile_bytes: usize,
    /// Bytes that the buffers of all threads may take. Tiles, and then threads, are made fewer to fit. Default: no limit.
    pub memory: Option<u64>,
    /// Use the portable kernels even where the machine has better ones. Default false.
    pub portable: bool,
}

impl Default for ExecOptions {
    fn default() -> Self {
        ExecOptions { threads: None, tile_bytes: 1 << 20, memory: None, portable: false }
    }
}

/// Watches a run, and may stop it. Called from all threads.
pub trait Progress: Sync {
    /// So many bytes will be written in all; told once, before the first of them.
    fn expect(&self, bytes: u64) {
        let _ = bytes;
    }

    /// So many more bytes of output are written.
    fn advance(&self, bytes: u64) {
        let _ = bytes;
    }

    /// True if the run should stop; what was written is then removed.
    fn cancelled(&self) -> bool {
        false
    }
}

/// Watches nothing.
impl Progress for () {}

/// What a run found out, by the order of [`Plan::changes`].
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) sums: Vec<Sums>,
}

/// Writes the weights of every output shard into files that `create` makes; the path that it gives is the file's name in messages.
///
/// # Errors
/// The first by the order of the plan: `E-001`, `E-002`, `E-004`, `E-006`, `A-008`, `A-030`, `A-031`.
pub(crate) fn run(
    plan: &Plan<'_>,
    options: &ExecOptions,
    durability: Durability,
    progress: &dyn Progress,
    mut create: impl FnMut(&str) -> Result<(File, PathBuf)>,
) -> Result<Outcome> {
    let mut outputs = Vec::new();
    for shard in &plan.shards {
        let (file, path) = create(&shard.file_name)?;
        prepare(&file, shard).map_err(|e| write_error(&path, e))?;
        outputs.push(Output { shard, file, path });
    }
    let tasks = split(plan, options.tile_bytes.max(64));
    let isa = if options.portable { Isa::Portable } else { Isa::best() };
    let crew = Crew { plan, isa, outputs: &outputs, tasks: &tasks, progress };
    let found = crew.run(threads(options, tasks.len()), durability)?;
    let mut sums = vec![Sums::default(); plan.changes().count()];
    for (task, found) in tasks.iter().zip(&found) {
        if let Work::Tile(_, place, ..) = task.work {
            sums[place].add(found);
        }
    }
    Ok(Outcome { sums })
}

/// The error of work that [`Progress::cancelled`] ended.
pub(crate) fn interrupted() -> Error {
    Error::new(rules::INTERRUPTED, "interrupted; nothing was published").help("run the command again")
}

/// Reserves the file's space, so that a full disk is known before anything is computed, and writes a new header.
fn prepare(file: &File, shard: &OutShard<'_>) -> std::io::Result<()> {
    disk::allocate(file, shard.len)?;
    match &shard.head {
        Head::Kept => Ok(()),
        Head::New(bytes) => disk::write_at(file, bytes, 0),
    }
}
