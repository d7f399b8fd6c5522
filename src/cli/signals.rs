//! Signals set flags; the work looks at them, cleans up and ends. A second signal ends the process at once, for the case that the
//! cleaning up is what hangs. A signal that the caller had ignored (`nohup`, a background job) stays ignored.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::flag;

/// What the first signal does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OnSignal {
    /// Nothing is being written: the process exits.
    ExitAtOnce,
    /// The work is asked to stop, and removes what it staged.
    CleanUp,
}

/// The flags that signals set.
#[derive(Debug, Clone)]
pub(super) struct Signals {
    /// The next signal exits.
    armed: Arc<AtomicBool>,
    /// The number of the signal that came, or 0.
    came: Arc<AtomicUsize>,
}

impl Signals {
    /// Handles SIGINT, SIGTERM and SIGHUP from here on. SIGXFSZ gets a handler that does nothing: a write beyond `ulimit -f` then
    /// fails with an error instead of killing the process.
    pub(super) fn watch(first: OnSignal) -> Self {
        let signals =
            Signals { armed: Arc::new(AtomicBool::new(first == OnSignal::ExitAtOnce)), came: Arc::new(AtomicUsize::new(0)) };
        let ignored = ignored_signals();
        for signal in [SIGINT, SIGTERM, SIGHUP].into_iter().filter(|&s| ignored & bit(s) == 0) {
            // In this order, which is the order of the actions: the first signal finds the shutdown unarmed. What cannot be
            // registered keeps its default, which is to end the process.
            let _ = flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(&signals.armed));
            let _ = flag::register_usize(signal, Arc::clone(&signals.came), usize::try_from(signal).unwrap_or(0));
            let _ = flag::register(signal, Arc::clone(&signals.armed));
        }
        let _ = flag::register(SIGXFSZ, Arc::new(AtomicBool::new(false)));
        signals
    }

    /// Whether a signal asked to stop.
    pub(super) fn stop(&self) -> bool {
        self.came.load(Ordering::Relaxed) != 0
    }

    /// The exit code for an interrupted run: 128 + signal number.
    pub(super) fn exit_code(&self) -> Option<u8> {
        match self.came.load(Ordering::Relaxed) {
            0 => None,
            signal => u8::try_from(128 + signal).ok(),
        }
    }
}

fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

/// The mask of signals that were ignored when the process started. Linux only; elsewhere none is known, and all are handled.
fn ignored_signals() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}
