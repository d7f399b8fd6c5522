//! What is shown while a merge runs, and the way in which a signal reaches it. The bar appears only on a terminal, only for work that
//! takes a while, and is gone without a trace when the work ends, however it ends.

use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::signals::Signals;
use crate::Progress;

/// Work that ends sooner shows nothing.
const PATIENCE: Duration = Duration::from_millis(500);
/// Between two drawings, so that the time left counts on while nothing is written.
const TICK: Duration = Duration::from_millis(200);
/// Fits in 80 columns.
const LINE: &str = "{msg:<8} [{bar:24}] {decimal_bytes}/{decimal_total_bytes}  {decimal_bytes_per_sec}  ETA {eta}";

/// Watches a merge.
pub(super) struct Watch<'s> {
    signals: &'s Signals,
    total: u64,
    shown: Option<Shown>,
}

/// The bar, and the thread that waits until it is worth showing.
struct Shown {
    bar: ProgressBar,
    done: Option<Sender<()>>,
    waiting: Option<JoinHandle<()>>,
}

impl<'s> Watch<'s> {
    /// Starts the clock. `total` is the bytes of weights that will be written.
    pub(super) fn start(signals: &'s Signals, total: u64, show: bool) -> Self {
        Watch { signals, total, shown: show.then(|| Shown::new(total)) }
    }
}

impl Progress for Watch<'_> {
    fn advance(&self, bytes: u64) {
        if let Some(Shown { bar, .. }) = &self.shown {
            let before = bar.position();
            bar.inc(bytes);
            if before == 0 {
                // The time for checking the inputs is no time of writing.
                bar.reset_eta();
                bar.set_message("merging");
            } else if before + bytes >= self.total {
                bar.set_message("syncing");
            }
        }
    }

    fn cancelled(&self) -> bool {
        self.signals.stop()
    }
}

impl Shown {
    fn new(total: u64) -> Self {
        let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::hidden());
        if let Ok(style) = ProgressStyle::with_template(LINE) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_message("checking");
        let (done, rest) = mpsc::channel::<()>();
        let later = bar.clone();
        let waiting = thread::spawn(move || {
            if rest.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
                later.set_draw_target(ProgressDrawTarget::stderr());
                later.enable_steady_tick(TICK);
            }
        });
        Shown { bar, done: Some(done), waiting: Some(waiting) }
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        drop(self.done.take());
        if let Some(waiting) = self.waiting.take() {
            let _ = waiting.join();
        }
        self.bar.finish_and_clear();
    }
}
