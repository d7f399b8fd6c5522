//! Threads for work that rayon divides. Where none can be had, the one that asks does all of it.

/// Calls `work` on so many threads, or on one per core if the number is 0.
pub(crate) fn on_threads<T: Send>(threads: usize, work: impl FnOnce() -> T + Send) -> T {
    match rayon::ThreadPoolBuilder::new().num_threads(threads).build() {
        Ok(pool) => pool.install(work),
        Err(_) => {
            // Without a pool to be in, rayon would start its own, and panic. This one has no thread but this, which stays in it.
            std::mem::forget(rayon::ThreadPoolBuilder::new().num_threads(1).use_current_thread().build());
            work()
        }
    }
}
