//! Counts as people read them, for the sentences that reports and errors carry and for the renderings of the command line.

/// `1,769,472`.
pub(crate) fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// `1 file`, `2 files`.
pub(crate) fn plural(n: u64, one: &str) -> String {
    format!("{} {one}{}", count(n), if n == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts() {
        assert_eq!((count(0), count(999), count(1_769_472)), ("0".into(), "999".into(), "1,769,472".into()));
        assert_eq!((plural(1, "file"), plural(2000, "file")), ("1 file".into(), "2,000 files".into()));
    }
}
