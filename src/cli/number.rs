//! Numbers as people type them: weights, sizes, and `PATH:WEIGHT`. A decimal comma is explained instead of being misread, whatever
//! the locale.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use crate::{Error, Result, rules};

/// A finite number with a decimal point. `what` names it in messages.
///
/// # Errors
/// `U-001`.
pub(super) fn finite(text: &str, what: &str) -> Result<f64> {
    let bad = |message: String| Error::new(rules::ARGUMENT, message);
    if text.is_empty() {
        return Err(bad(format!("the {what} is empty")).help("give a number, such as 0.5"));
    }
    if text.matches(',').count() == 1 && text.replace(',', ".").parse::<f64>().is_ok_and(f64::is_finite) {
        let help = format!("decimals have a point: {}", text.replace(',', "."));
        return Err(bad(format!("the {what} {text:?} has a decimal comma")).help(help));
    }
    match text.parse::<f64>() {
        Ok(number) if number.is_finite() => Ok(number),
        Ok(_) => Err(bad(format!("the {what} {text:?} is not a finite number")).help("give a finite number, such as 0.5")),
        Err(_) => {
            Err(bad(format!("the {what} {text:?} is not a number")).help("give a number with a decimal point, such as 0.5"))
        }
    }
}

/// A number of bytes: digits, then nothing, a decimal unit (`kB`, `MB`, `GB`) or a binary one (`KiB`, `MiB`, `GiB`).
///
/// # Errors
/// `U-001`.
pub(super) fn bytes(text: &str, what: &str) -> Result<usize> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit = match unit.trim_start() {
        "" | "B" => Some(1),
        "kB" | "KB" => Some(1000),
        "MB" => Some(1_000_000),
        "GB" => Some(1_000_000_000),
        "KiB" => Some(1 << 10),
        "MiB" => Some(1 << 20),
        "GiB" => Some(1 << 30),
        _ => None,
    };
    let size = unit.and_then(|unit: usize| number.parse::<usize>().ok()?.checked_mul(unit)).filter(|&size| size > 0);
    size.ok_or_else(|| {
        Error::new(rules::ARGUMENT, format!("the {what} {text:?} is not a number of bytes"))
            .help("give a size such as 65536, 64KiB or 1MiB")
    })
}

/// Splits `PATH[:WEIGHT]`. The part after the last `:` is the weight if it looks like a number, or if the part before it exists; but a
/// file that has the whole of it as its name is that file. `exists` says which paths exist.
///
/// # Errors
/// `U-001` if the weight is not a finite number.
pub(super) fn path_and_weight(typed: &OsStr, exists: impl Fn(&Path) -> bool) -> Result<(PathBuf, f64)> {
    let whole = (PathBuf::from(typed), 1.0);
    let raw = typed.as_bytes();
    let Some(colon) = raw.iter().rposition(|&b| b == b':') else { return Ok(whole) };
    if exists(&whole.0) {
        return Ok(whole);
    }
    let (path, weight) = (PathBuf::from(OsString::from_vec(raw[..colon].to_vec())), &raw[colon + 1..]);
    let weight = String::from_utf8_lossy(weight);
    if path.as_os_str().is_empty() || weight.contains('/') || !(looks_numeric(&weight) || exists(&path)) {
        return Ok(whole);
    }
    let weight = finite(&weight, "weight").map_err(|e| e.file(&path))?;
    Ok((path, weight))
}

fn looks_numeric(text: &str) -> bool {
    let unsigned = text.trim_start_matches(['+', '-']);
    text.is_empty()
        || unsigned.starts_with(|c: char| c.is_ascii_digit() || c == '.' || c == ',')
        || ["nan", "inf", "infinity"].iter().any(|word| unsigned.eq_ignore_ascii_case(word))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(typed: &str, files: &[&str]) -> std::result::Result<(String, f64), String> {
        let split = path_and_weight(OsStr::new(typed), |p| files.iter().any(|f| Path::new(f) == p));
        split.map(|(path, weight)| (path.display().to_string(), weight)).map_err(|e| {
            assert_eq!(e.class().exit_code(), 2);
            e.diagnostics()[0].message().to_owned()
        })
    }

    #[test]
    fn a_weight_follows_the_last_colon() {
        for (typed, path, weight) in [
            ("adapter", "adapter", 1.0),
            ("adapter:0.5", "adapter", 0.5),
            ("adapter:-1", "adapter", -1.0),
            ("adapter:+.5", "adapter", 0.5),
            ("adapter:1e-3", "adapter", 1e-3),
            ("adapter:0", "adapter", 0.0),
            ("a:b:2", "a:b", 2.0),
            ("./dir:1/adapter", "./dir:1/adapter", 1.0),
            ("hub:name", "hub:name", 1.0),
            (":0.5", ":0.5", 1.0),
        ] {
            assert_eq!(split(typed, &["adapter"]), Ok((path.to_owned(), weight)), "{typed}");
        }
    }

    #[test]
    fn a_file_of_the_whole_name_is_that_file() {
        assert_eq!(split("adapter:0.5", &["adapter", "adapter:0.5"]), Ok(("adapter:0.5".to_owned(), 1.0)));
    }

    #[test]
    fn a_weight_that_is_no_finite_number_is_refused() {
        for weight in ["nan", "NaN", "inf", "-inf", "infinity", "1e999", "", "0,5", "1.2.3", "0x10", "1_000"] {
            assert!(split(&format!("missing:{weight}"), &[]).is_err(), "{weight}");
        }
        assert!(split("adapter:half", &["adapter"]).is_err());
    }

    #[test]
    fn a_decimal_comma_is_explained() {
        let error = finite("0,5", "scale").unwrap_err();
        assert!(error.diagnostics()[0].message().contains("decimal comma"));
        assert_eq!(error.diagnostics()[0].help_text(), Some("decimals have a point: 0.5"));
    }

    #[test]
    fn a_path_need_not_be_utf8() {
        let typed = OsString::from_vec(b"caf\xe9:0.5".to_vec());
        let (path, weight) = path_and_weight(&typed, |_| false).unwrap();
        assert_eq!((path.as_os_str().as_bytes(), weight), (&b"caf\xe9"[..], 0.5));
    }

    #[test]
    fn sizes_have_units() {
        for (text, size) in [("1", 1), ("64KiB", 65536), ("1MiB", 1 << 20), ("2 MB", 2_000_000)] {
            assert_eq!(bytes(text, "tile").unwrap(), size, "{text}");
        }
        for text in ["", "0", "MiB", "1TB", "-1", "1.5MiB", "99999999999999999999", "99999999999GiB"] {
            assert!(bytes(text, "tile").is_err(), "{text}");
        }
    }
}
