//! All matrices on all cores. Each thread works on a matrix of its own, the largest ones first, and helps with the sweeps of others when none
//! is left: so there are never more matrices in memory than threads, and no thread waits for the last one. What is found does not depend on
//! the threads.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::error::{Error, Result};

/// Does `work` for every number below `sizes.len()` on the threads of the pool; results in order.
///
/// # Errors
/// That of the largest matrix whose work failed, and of the first of those of one size: whatever was begun before it is finished, so that it
/// is the same on any number of threads.
pub(super) fn each<T: Send>(sizes: &[u64], work: impl Fn(usize) -> Result<T> + Sync) -> Result<Vec<T>> {
    let mut order: Vec<usize> = (0..sizes.len()).collect();
    order.sort_by_key(|i| std::cmp::Reverse(sizes[*i]));
    let next = AtomicUsize::new(0);
    let failed = AtomicBool::new(false);
    let results: Mutex<Vec<(usize, Result<T, Error>)>> = Mutex::default();
    let run = || {
        while !failed.load(Ordering::Relaxed) {
            let place = next.fetch_add(1, Ordering::Relaxed);
            let Some(index) = order.get(place) else { break };
            let result = work(*index);
            failed.fetch_or(result.is_err(), Ordering::Relaxed);
            results.lock().unwrap_or_else(PoisonError::into_inner).push((place, result));
        }
    };
    // All of them begin at once, so that none is begun by a thread that waits for a sweep.
    rayon::scope(|scope| (0..rayon::current_num_threads()).for_each(|_| scope.spawn(|_| run())));
    let mut results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    results.sort_by_key(|(place, _)| *place);
    let mut found = Vec::with_capacity(results.len());
    for (place, result) in results {
        found.push((order[place], result?));
    }
    found.sort_by_key(|(index, _)| *index);
    Ok(found.into_iter().map(|(_, found)| found).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rules;

    #[test]
    fn results_are_in_order_and_the_first_failure_is_told() {
        let sizes = [1, 9, 3, 7];
        assert_eq!(each(&sizes, |i| Ok(i * 2)).unwrap(), [0, 2, 4, 6]);
        // The second largest and the smallest fail, the latter at once.
        let failing = |i: usize| match i {
            3 => {
                std::thread::sleep(std::time::Duration::from_millis(5));
                Err(Error::new(rules::READ, "3"))
            }
            0 => Err(Error::new(rules::READ, "0")),
            _ => Ok(i),
        };
        let told = each(&sizes, failing).unwrap_err();
        assert_eq!(told.diagnostics()[0].message(), "3");
        assert!(each(&[], |_| Ok(())).unwrap().is_empty());
    }
}
