//! All matrices on all cores. Each thread works on a matrix of its own, the largest ones first, and helps with the sweeps of others when none
//! is left: so there are never more matrices in memory than threads, and no thread waits for the last one. What is found does not depend on
//! the threads.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::error::{Error, Result};

/// Does `work` for every number below `sizes.len()` on the threads of the pool; results in order.
///
/// # Errors
/// That of the smallest number whose work failed, of those that were begun.
pub(super) fn each<T: Send>(sizes: &[u64], work: impl Fn(usize) -> Result<T> + Sync) -> Result<Vec<T>> {
    let mut order: Vec<usize> = (0..sizes.len()).collect();
    order.sort_by_key(|i| std::cmp::Reverse(sizes[*i]));
    let next = AtomicUsize::new(0);
    let failed = AtomicBool::new(false);
    let results: Mutex<Vec<(usize, Result<T, Error>)>> = Mutex::default();
    let run = || {
        while let Some(index) = order.get(next.fetch_add(1, Ordering::Relaxed)) {
            if failed.load(Ordering::Relaxed) {
                break;
            }
            let result = work(*index);
            failed.fetch_or(result.is_err(), Ordering::Relaxed);
            results.lock().unwrap_or_else(PoisonError::into_inner).push((*index, result));
        }
    };
    // All of them begin at once, so that none is begun by a thread that waits for a sweep.
    rayon::scope(|scope| (0..rayon::current_num_threads()).for_each(|_| scope.spawn(|_| run())));
    let mut results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    results.sort_by_key(|(index, _)| *index);
    results.into_iter().map(|(_, result)| result).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rules;

    #[test]
    fn results_are_in_order_and_the_first_failure_is_told() {
        let sizes = [1, 9, 3, 7];
        assert_eq!(each(&sizes, |i| Ok(i * 2)).unwrap(), [0, 2, 4, 6]);
        let failing = |i: usize| if i == 1 { Err(Error::new(rules::READ, "no")) } else { Ok(i) };
        assert!(each(&sizes, failing).is_err());
        assert!(each(&[], |_| Ok(())).unwrap().is_empty());
    }
}
