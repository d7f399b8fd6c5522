//! Failures on demand, for tests of the cargo feature `faults`: the environment names one of the calls of [`disk`](super::disk), by its
//! number in the run, and what is to become of it. `tests/faults` runs a command once for every call. Without the feature every function
//! here does nothing, and the compiler removes it.
//!
//! - `LORATOOL_FAULT=N:WHAT`: WHAT is an errno; `short` (half is transferred); `kill` (the process ends before the call); `tear` (before
//!   the next one, after half of this one); `int`, `term` or `hup` (that signal comes before the call); with `:from` after it, it happens
//!   to every call from N on.
//! - `LORATOOL_FAULT_TRACE=FILE`: a line for every call, and one for every change of the disk that it made.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::process::{Signal, getpid, kill_process};

#[derive(Debug, Clone, Copy)]
enum What {
    Errno(i32),
    Short,
    Kill,
    Tear,
    Signal(Signal),
}

struct Schedule {
    fault: Option<(u64, What, bool)>,
    trace: Option<File>,
    calls: AtomicU64,
    torn: AtomicBool,
}

fn schedule() -> &'static Schedule {
    static SCHEDULE: OnceLock<Schedule> = OnceLock::new();
    SCHEDULE.get_or_init(|| {
        let fault = std::env::var("LORATOOL_FAULT").ok().and_then(|text| {
            let mut parts = text.split(':');
            let call = parts.next()?.parse().ok()?;
            let what = match parts.next()? {
                "short" => What::Short,
                "kill" => What::Kill,
                "tear" => What::Tear,
                "int" => What::Signal(Signal::INT),
                "term" => What::Signal(Signal::TERM),
                "hup" => What::Signal(Signal::HUP),
                errno => What::Errno(errno.parse().ok()?),
            };
            Some((call, what, parts.next() == Some("from")))
        });
        let trace = std::env::var_os("LORATOOL_FAULT_TRACE")
            .and_then(|path| OpenOptions::new().append(true).create(true).open(path).ok());
        Schedule { fault, trace, calls: AtomicU64::new(0), torn: AtomicBool::new(false) }
    })
}

/// Before a call that transfers up to `len` bytes: how many it may.
///
/// # Errors
/// The scheduled one.
pub(super) fn allow(call: &str, len: usize) -> io::Result<usize> {
    if !cfg!(feature = "faults") {
        return Ok(len);
    }
    let schedule = schedule();
    let number = schedule.calls.fetch_add(1, Ordering::SeqCst) + 1;
    trace(|| format!("call {call}"));
    if schedule.torn.load(Ordering::SeqCst) {
        std::process::abort();
    }
    match schedule.fault {
        Some((at, what, from)) if number == at || (from && number > at) => match what {
            What::Errno(errno) => Err(io::Error::from_raw_os_error(errno)),
            What::Short => Ok(len.div_ceil(2)),
            What::Kill => std::process::abort(),
            What::Signal(signal) => kill_process(getpid(), signal).map(|()| len).map_err(io::Error::from),
            What::Tear => {
                schedule.torn.store(true, Ordering::SeqCst);
                Ok(len.div_ceil(2))
            }
        },
        _ => Ok(len),
    }
}

/// Bytes of a file have changed.
pub(super) fn wrote(file: &File, offset: u64, len: usize) {
    trace(|| {
        let mut bytes = vec![0; len];
        let _ = file.read_exact_at(&mut bytes, offset);
        format!("write {} {offset} {}", inode(file), bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>())
    });
}

/// A file has got its length.
pub(super) fn sized(file: &File, len: u64) {
    trace(|| format!("size {} {len}", inode(file)));
}

/// A file is on disk.
pub(super) fn synced(file: &File) {
    trace(|| format!("sync {}", inode(file)));
}

/// A file has been made.
pub(super) fn made(file: &File, path: &Path) {
    trace(|| format!("made {} {}", inode(file), path.display()));
}

/// Something was done to names: `dir`, `syncdir` or `gone`.
pub(super) fn name(what: &str, path: &Path) {
    trace(|| format!("{what} {}", path.display()));
}

/// A name was changed.
pub(super) fn renamed(from: &Path, to: &Path, exchange: bool) {
    trace(|| format!("{} {}\t{}", if exchange { "exchange" } else { "rename" }, from.display(), to.display()));
}

fn inode(file: &File) -> u64 {
    file.metadata().map_or(0, |meta| meta.ino())
}

fn trace(line: impl FnOnce() -> String) {
    if cfg!(feature = "faults")
        && let Some(mut file) = schedule().trace.as_ref()
    {
        let _ = file.write_all(format!("{}\n", line()).as_bytes());
    }
}
