//! What is shown while a merge or a conversion runs, and the way in which a signal reaches it. The bar appears only on a terminal, only for work that
//! takes a while, and is gone without a trace when the work ends, however it ends.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle, TermLike};

use super::output;
use super::signals::Signals;
use crate::Progress;

/// Work that ends sooner shows nothing.
const PATIENCE: Duration = Duration::from_millis(500);
/// Between two drawings, so that the time left counts on while nothing is written.
const TICK: Duration = Duration::from_millis(200);
/// The same where the parts of the work have something to tell.
const TOLD: &str = "[{bar:10}] {percent:>3}%  ETA {eta:>4}  {msg}";
/// Columns that are left for that.
const ROOM: usize = 46;
/// Fits in [`Line::width`].
const LINE: &str = "{msg:<8} [{bar:20}] {decimal_bytes}/{decimal_total_bytes}  {decimal_bytes_per_sec}  ETA {eta}";

/// Watches a merge or a conversion.
pub(super) struct Watch<'s> {
    signals: &'s Signals,
    /// What is being done, in at most 8 characters.
    doing: &'static str,
    total: AtomicU64,
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
    pub(super) fn start(signals: &'s Signals, doing: &'static str, total: u64, show: bool) -> Self {
        Watch { signals, doing, total: AtomicU64::new(total), shown: show.then(|| Shown::new(total)) }
    }
}

impl Progress for Watch<'_> {
    fn expect(&self, bytes: u64) {
        self.total.store(bytes, Ordering::Relaxed);
        if let Some(Shown { bar, .. }) = &self.shown {
            bar.set_length(bytes);
        }
    }

    fn advance(&self, bytes: u64) {
        if let Some(Shown { bar, .. }) = &self.shown {
            let before = bar.position();
            bar.inc(bytes);
            if before == 0 {
                // The time for checking the inputs is no time of writing.
                bar.reset_eta();
                bar.set_message(self.doing);
            } else if before + bytes >= self.total.load(Ordering::Relaxed) {
                bar.set_message("syncing");
            }
        }
    }

    fn tell(&self, what: &str) {
        if let Some(Shown { bar, .. }) = &self.shown {
            if let Ok(style) = ProgressStyle::with_template(TOLD) {
                bar.set_style(style.progress_chars("=> "));
            }
            // The end of a tensor's name says more than its beginning.
            let shown = super::render::escape::inline(what);
            let skipped = shown.chars().count().saturating_sub(ROOM);
            bar.set_message(shown.chars().skip(skipped).collect::<String>());
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
                later.set_draw_target(ProgressDrawTarget::term_like_with_hz(Box::new(Line::default()), 20));
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

/// One line of standard error, a little narrower than a terminal: the `^C` that the terminal echoes after it then does not wrap, and
/// clearing the line clears all of it.
#[derive(Debug, Default)]
struct Line {
    /// What is not flushed yet.
    pending: Mutex<String>,
}

impl Line {
    fn push(&self, text: &str) -> io::Result<()> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner).push_str(text);
        Ok(())
    }
}

impl TermLike for Line {
    fn width(&self) -> u16 {
        76
    }

    fn move_cursor_up(&self, n: usize) -> io::Result<()> {
        if n == 0 { Ok(()) } else { self.push(&format!("\x1b[{n}A")) }
    }

    fn move_cursor_down(&self, n: usize) -> io::Result<()> {
        if n == 0 { Ok(()) } else { self.push(&format!("\x1b[{n}B")) }
    }

    fn move_cursor_right(&self, n: usize) -> io::Result<()> {
        if n == 0 { Ok(()) } else { self.push(&format!("\x1b[{n}C")) }
    }

    fn move_cursor_left(&self, n: usize) -> io::Result<()> {
        if n == 0 { Ok(()) } else { self.push(&format!("\x1b[{n}D")) }
    }

    fn write_line(&self, text: &str) -> io::Result<()> {
        self.push(text)?;
        self.push("\n")
    }

    fn write_str(&self, text: &str) -> io::Result<()> {
        self.push(text)
    }

    fn clear_line(&self) -> io::Result<()> {
        self.push("\r\x1b[2K")
    }

    fn flush(&self) -> io::Result<()> {
        output::eprint(&std::mem::take(&mut *self.pending.lock().unwrap_or_else(PoisonError::into_inner)));
        Ok(())
    }
}
