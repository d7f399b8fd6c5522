//! Standard output and standard error. Whoever reads standard output may stop reading: that is the end of the output, not an error.
//! Any other failure to write it is one, and `println!`, which panics, is not used.

use std::io::{self, ErrorKind, Write};

use crate::{Class, Error, rules};

/// Writes `text` to standard output.
///
/// # Errors
/// `E-002` (exit 6) if it cannot be written, unless the reader is gone.
pub(super) fn print(text: &str) -> Result<(), Error> {
    let mut out = io::stdout().lock();
    let done = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    match done {
        Err(e) if e.kind() != ErrorKind::BrokenPipe => {
            Err(Error::new(rules::WRITE, format!("cannot write to standard output: {e}")).class_of(Class::Io).because(e))
        }
        _ => Ok(()),
    }
}

/// Writes `text` to standard error. If that fails there is nobody left to tell.
pub(super) fn eprint(text: &str) {
    let mut err = io::stderr().lock();
    let _ = err.write_all(text.as_bytes()).and_then(|()| err.flush());
}
