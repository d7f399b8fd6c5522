//! Numbered pieces of work on several threads. The error that is reported is that of the first piece that failed, whatever the threads did.
//! Pieces may be put into lanes, such as those that write one file: two threads in one file wait for each other in the system, which locks
//! a file while it is written, so that each thread keeps to a lane of its own as long as there are enough of them.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use super::block::Scratch;
use crate::error::{Error, Result};

/// [`each_in_lanes`], with a single lane: the pieces are begun in order.
///
/// # Errors
/// As [`each_in_lanes`].
pub(super) fn each<T: Send>(
    threads: usize,
    count: usize,
    work: impl Fn(usize, &mut Scratch) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    each_in_lanes(threads, std::slice::from_ref(&(0..count)), work)
}

/// Does `work` for every number in `lanes`, which are consecutive from 0 on, on `threads` threads, this one included, each with buffers of
/// its own; gives the results in order. Within a lane the pieces are begun in order, and lanes are begun in order. Where threads cannot be
/// had, fewer do.
///
/// # Errors
/// That of the smallest number whose work failed; larger ones may not have been begun.
pub(super) fn each_in_lanes<T: Send>(
    threads: usize,
    lanes: &[Range<usize>],
    work: impl Fn(usize, &mut Scratch) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    let lanes: Vec<Lane> = lanes.iter().cloned().map(Lane::new).collect();
    let count: usize = lanes.iter().map(|lane| lane.end - lane.next.load(Ordering::Relaxed)).sum();
    let failed: Mutex<Option<(usize, Error)>> = Mutex::new(None);
    let stopped = AtomicUsize::new(usize::MAX);
    let run = || {
        let (mut scratch, mut results) = (Scratch::default(), Vec::new());
        while let Some(lane) = Lane::choose(&lanes) {
            while let Some(index) = lane.take() {
                if index > stopped.load(Ordering::Relaxed) {
                    break;
                }
                match work(index, &mut scratch) {
                    Ok(result) => results.push((index, result)),
                    Err(error) => {
                        stopped.fetch_min(index, Ordering::Relaxed);
                        let mut first = failed.lock().unwrap_or_else(PoisonError::into_inner);
                        if first.as_ref().is_none_or(|(at, _)| index < *at) {
                            *first = Some((index, error));
                        }
                    }
                }
            }
            lane.leave();
        }
        results
    };
    let mut results = std::thread::scope(|scope| {
        let mut others = Vec::new();
        for _ in 1..threads.min(count) {
            match std::thread::Builder::new().spawn_scoped(scope, run) {
                Ok(handle) => others.push(handle),
                Err(_) => break,
            }
        }
        let mut results = run();
        for handle in others {
            results.extend(handle.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        }
        results
    });
    if let Some((_, error)) = failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(error);
    }
    results.sort_unstable_by_key(|(index, _)| *index);
    Ok(results.into_iter().map(|(_, result)| result).collect())
}

/// A lane for each run of pieces that belong to one thing.
pub(super) fn lanes(of: impl Iterator<Item = usize>) -> Vec<Range<usize>> {
    let mut lanes: Vec<Range<usize>> = Vec::new();
    let mut last = None;
    for (index, of) in of.enumerate() {
        match lanes.last_mut().filter(|_| last == Some(of)) {
            Some(lane) => lane.end = index + 1,
            None => lanes.push(index..index + 1),
        }
        last = Some(of);
    }
    lanes
}

/// Pieces that are begun in order.
struct Lane {
    next: AtomicUsize,
    end: usize,
    workers: AtomicUsize,
}

impl Lane {
    fn new(pieces: Range<usize>) -> Self {
        Lane { next: AtomicUsize::new(pieces.start), end: pieces.end, workers: AtomicUsize::new(0) }
    }

    /// The first lane with work and without a thread; if there is none, the one with the most work for each thread.
    fn choose(lanes: &[Lane]) -> Option<&Lane> {
        let left = |lane: &&Lane| lane.end.saturating_sub(lane.next.load(Ordering::Relaxed));
        let share = |lane: &&Lane| left(lane) / (lane.workers.load(Ordering::Relaxed) + 1);
        let free =
            |lane: &&Lane| left(lane) > 0 && lane.workers.compare_exchange(0, 1, Ordering::Relaxed, Ordering::Relaxed).is_ok();
        lanes.iter().find(free).or_else(|| {
            let lane = lanes.iter().filter(|lane| left(lane) > 0).max_by_key(share)?;
            lane.workers.fetch_add(1, Ordering::Relaxed);
            Some(lane)
        })
    }

    fn take(&self) -> Option<usize> {
        let index = self.next.fetch_add(1, Ordering::Relaxed);
        (index < self.end).then_some(index)
    }

    fn leave(&self) {
        self.workers.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rules;

    #[test]
    fn lanes_are_worked_off_whole_and_in_order() {
        for threads in [1, 2, 3, 9] {
            let lanes = [0..50, 50..50, 50..51, 51..300];
            let begun = Mutex::new(Vec::new());
            let done = each_in_lanes(threads, &lanes, |i, _| {
                begun.lock().unwrap().push(i);
                Ok(i)
            });
            assert_eq!(done.unwrap(), (0..300).collect::<Vec<_>>());
            if threads == 1 {
                assert_eq!(begun.into_inner().unwrap(), (0..300).collect::<Vec<_>>());
            }
        }
        let failing = each_in_lanes(3, &[0..100, 100..200], |i, _| match i {
            30 | 130 => Err(Error::new(rules::READ, i.to_string())),
            _ => Ok(()),
        });
        assert_eq!(failing.unwrap_err().diagnostics()[0].message(), "30");
    }

    #[test]
    fn results_are_in_order_and_the_first_failure_is_told() {
        for threads in [1, 2, 7] {
            let squares = each(threads, 100, |i, _| Ok(i * i)).unwrap();
            assert_eq!(squares, (0..100).map(|i| i * i).collect::<Vec<_>>());
            let failing = each(threads, 1000, |i, _| match i % 100 {
                37 => Err(Error::new(rules::READ, i.to_string())),
                _ => Ok(()),
            });
            assert_eq!(failing.unwrap_err().diagnostics()[0].message(), "37");
        }
    }
}
