//! Numbers for people: few digits, never rounded up to "all" or down to "nothing".

pub(super) use crate::report::text::{count, plural};

/// `15,368 bytes`, and from a million on also in a larger unit: `1.23 GB (1,234,567,890 bytes)`.
pub(super) fn bytes(n: u64) -> String {
    let exact = plural(n, "byte");
    let unit = [("TB", 1e12), ("GB", 1e9), ("MB", 1e6)].into_iter().find(|(_, size)| n as f64 >= *size);
    unit.map(|(unit, size)| format!("{} {unit} ({exact})", significant(n as f64 / size, 3))).unwrap_or(exact)
}

/// A number with so many significant digits, without trailing zeros.
pub(super) fn significant(x: f64, digits: usize) -> String {
    if x == 0.0 {
        return "0".to_owned();
    }
    if !x.is_finite() {
        return x.to_string();
    }
    // The exponent after rounding: 0.9996 with 3 digits is 1.00.
    let scientific = format!("{x:.*e}", digits.saturating_sub(1));
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..=6).contains(&exponent) {
        let decimals = usize::try_from(digits as i32 - 1 - exponent).unwrap_or(0);
        return trimmed(&format!("{x:.decimals$}")).to_owned();
    }
    format!("{}e{exponent}", trimmed(mantissa))
}

fn trimmed(text: &str) -> &str {
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { text }
}

/// `part` of `all` in percent with one decimal, but 99.9 for what is not all, and `<0.1` for what is not nothing.
pub(super) fn percent(part: u64, all: u64) -> String {
    if all == 0 {
        return "-".to_owned();
    }
    let tenths = (u128::from(part) * 1000 + u128::from(all) / 2) / u128::from(all);
    match tenths {
        _ if part == 0 => "0".to_owned(),
        _ if part >= all => "100".to_owned(),
        0 => "<0.1".to_owned(),
        _ => format!("{}.{}", tenths.min(999) / 10, tenths.min(999) % 10),
    }
}

/// A share in percent, with three significant digits.
pub(super) fn percent_of(share: f64) -> String {
    format!("{} %", significant(100.0 * share, 3))
}

/// The least and the greatest of some numbers: `0.52-0.61`, or one number if they look the same; empty without any.
pub(super) fn range(numbers: impl Iterator<Item = f64>, show: impl Fn(f64) -> String) -> String {
    let ends = numbers.fold(None, |ends: Option<(f64, f64)>, x| {
        let (low, high) = ends.unwrap_or((x, x));
        Some((low.min(x), high.max(x)))
    });
    match ends.map(|(low, high)| (show(low), show(high))) {
        None => String::new(),
        Some((low, high)) if low == high => low,
        Some((low, high)) => format!("{low}-{high}"),
    }
}

/// `64x32`, as the header says it.
pub(super) fn shape(dims: &[u64]) -> String {
    if dims.is_empty() {
        return "scalar".to_owned();
    }
    dims.iter().map(u64::to_string).collect::<Vec<_>>().join("x")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures() {
        assert_eq!((bytes(1), bytes(1_230_000_000)), ("1 byte".into(), "1.23 GB (1,230,000,000 bytes)".into()));
        for (x, shown) in [
            (2.0, "2"),
            (0.25, "0.25"),
            (5.656854, "5.657"),
            (1e-9, "1e-9"),
            (1234567.0, "1234567"),
            (1e10, "1e10"),
            (0.99999, "1"),
        ] {
            assert_eq!(significant(x, 4), shown);
        }
        for (part, shown) in [
            (0, "0"),
            (1, "<0.1"),
            (4, "<0.1"),
            (5, "0.1"),
            (198, "2.0"),
            (9988, "99.9"),
            (9984, "99.8"),
            (9997, "99.9"),
            (10_000, "100"),
        ] {
            assert_eq!(percent(part, 10_000), shown, "{part}");
        }
        assert_eq!(percent(0, 0), "-");
        assert_eq!(range([0.5, 0.25].into_iter(), |x| significant(x, 2)), "0.25-0.5");
    }
}
