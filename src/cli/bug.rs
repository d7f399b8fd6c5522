//! A panic is a bug of the tool, and is said to be one: a line that can be reported instead of a raw backtrace, and an exit code of
//! its own. Unwinding runs the destructors, so a staged output is removed.

use std::panic::{self, AssertUnwindSafe};
use std::sync::{Mutex, PoisonError};

/// Exit code of a bug, `EX_SOFTWARE` of sysexits.h.
pub(super) const EXIT_CODE: u8 = 70;

/// What the first panic said. A panic of a worker thread is thrown again on the main thread without its place, which is kept here.
static FIRST: Mutex<Option<String>> = Mutex::new(None);

/// Calls `f`; if it panics, gives what the panic said and where.
pub(super) fn catch<T>(f: impl FnOnce() -> T) -> Result<T, String> {
    panic::set_hook(Box::new(|info| {
        let payload = info.payload();
        let said = payload.downcast_ref::<&str>().copied().or_else(|| payload.downcast_ref::<String>().map(String::as_str));
        let said = said.unwrap_or("no message");
        let place = info.location().map(|l| format!(" at {}:{}", l.file(), l.line())).unwrap_or_default();
        FIRST.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(format!("{said}{place}"));
    }));
    let caught = panic::catch_unwind(AssertUnwindSafe(f));
    let _ = panic::take_hook();
    caught.map_err(|_| {
        let first = FIRST.lock().unwrap_or_else(PoisonError::into_inner).take();
        first.unwrap_or_else(|| "no message".to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_caught_with_its_message_and_place() {
        let said = catch(|| {
            if true {
                panic!("seven is not six")
            }
        })
        .unwrap_err();
        assert!(said.starts_with("seven is not six at ") && said.contains("bug.rs"), "{said}");
        assert_eq!(catch(|| 7), Ok(7));
    }
}
