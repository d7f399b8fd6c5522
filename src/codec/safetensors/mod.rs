//! The safetensors codec: a strict reader of headers, a file as a tensor source, and the writer of headers.
//! The rules are `C-001` to `C-023` of `spec/container.md`.

mod file;
mod header;
mod json;
mod sniff;
mod write;

pub use file::SafetensorsFile;
pub(crate) use json::{Member, members};
pub(crate) use write::Layout;

/// How strictly a header is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strictness {
    /// An adapter or a container: everything that is not exactly as specified is an error.
    Strict,
    /// A base checkpoint: what old writers did and the reference reader accepts is a warning.
    Lenient,
}
