//! Numbered pieces of work on several threads. They are begun in order, and the error that is reported is that of the first piece that
//! failed, whatever the threads did.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::block::Scratch;
use crate::error::{Error, Result};

/// Does `work` for every number below `count` on `threads` threads, this one included, each with buffers of its own; gives the results in
/// order. Where threads cannot be had, fewer do.
///
/// # Errors
/// That of the smallest number whose work failed; larger ones may not have been begun.
pub(super) fn each<T: Send>(
    threads: usize,
    count: usize,
    work: impl Fn(usize, &mut Scratch) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    let next = AtomicUsize::new(0);
    let failed: Mutex<Option<(usize, Error)>> = Mutex::new(None);
    let stopped = AtomicUsize::new(usize::MAX);
    let run = || {
        let (mut scratch, mut results) = (Scratch::default(), Vec::new());
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= count || index > stopped.load(Ordering::Relaxed) {
                return results;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rules;

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
