//! What a file is when it is not what its name says. About one in three "adapters" found in public repositories is a Git LFS
//! pointer, so this is the most useful message that a validator gives.

/// What the first bytes look like, with what to do, or `None` if they do not look like any known kind of file. The table is that of
/// rule C-020: a kind is known by its signature, or as text if the eight bytes where the length should be are all printable.
pub(super) fn foreign_kind(head: &[u8]) -> Option<(&'static str, &'static str)> {
    let starts = |prefix: &[u8]| head.starts_with(prefix);
    let kind = if starts(b"version https://git-lfs") {
        ("a Git LFS pointer, not the weights", "run `git lfs pull` in the repository, or download the file itself")
    } else if starts(b"PK\x03\x04") || starts(b"PK\x05\x06") {
        ("a ZIP archive (a PyTorch checkpoint or .npz), not safetensors", PICKLES)
    } else if starts(b"\x80\x02") || starts(b"\x80\x03") || starts(b"\x80\x04") || starts(b"\x80\x05") {
        ("a Python pickle, not safetensors", PICKLES)
    } else if starts(b"GGUF") {
        ("a GGUF file, not safetensors", "use the safetensors checkpoint that the GGUF was made from")
    } else if starts(b"\x1f\x8b\x08") {
        ("a gzip archive, not safetensors", "unpack it first")
    } else if starts(b"\x89HDF") {
        ("an HDF5 file, not safetensors", "convert it to safetensors first")
    } else if starts(b"\x93NUMPY") {
        ("a NumPy array, not safetensors", "convert it to safetensors first")
    } else if head.first_chunk::<8>().is_some_and(|field| field.iter().all(is_text)) {
        text_kind(head)
    } else {
        return None;
    };
    Some(kind)
}

const PICKLES: &str = "convert it with a tool you trust; pickles are never read here";

fn is_text(byte: &u8) -> bool {
    matches!(byte, b'\t' | b'\n' | b'\r' | b' '..=b'~')
}

fn text_kind(head: &[u8]) -> (&'static str, &'static str) {
    let text = head.trim_ascii_start();
    let says = |prefix: &[u8]| text.get(..prefix.len()).is_some_and(|t| t.eq_ignore_ascii_case(prefix));
    if says(b"<!doctype html") || says(b"<html") || says(b"<?xml") || says(b"<head") {
        (
            "an HTML page, not the weights",
            "the download was answered with a web page (a login or an error); download the file itself",
        )
    } else if text.starts_with(b"{") {
        ("a JSON document, not safetensors", "the download was answered with a message; look at the file, then download it again")
    } else {
        ("a text file, not safetensors", "look at the file, then download it again")
    }
}
