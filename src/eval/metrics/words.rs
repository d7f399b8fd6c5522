//! Words as Python sees them. The scores of text here are defined by Python programs, and Python differs from Rust in what it
//! takes for white space; the other difference, what is a letter, is in the patterns of those who need it.

use regex::Regex;

/// `str.isspace` of Python: Unicode's White_Space and the four separators of ASCII (U+001C to U+001F).
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// `str.split()` of Python.
pub(super) fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(is_space).filter(|word| !word.is_empty())
}

/// A pattern written in this module, never one from outside.
#[expect(clippy::expect_used, reason = "the patterns are literals, and the tests compile every one of them")]
pub(super) fn literal(pattern: &str) -> Regex {
    Regex::new(pattern).expect("a valid literal")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `[c for c in map(chr, range(0x110000)) if c.isspace()]` of Python 3.11, 29 of them.
    #[test]
    fn white_space_is_that_of_python() {
        let mut wanted: Vec<u32> = (0x09..=0x0d).chain(0x1c..=0x20).chain([0x85, 0xa0, 0x1680]).collect();
        wanted.extend((0x2000..=0x200a).chain([0x2028, 0x2029, 0x202f, 0x205f, 0x3000]));
        let found: Vec<u32> = ('\0'..=char::MAX).filter(|c| is_space(*c)).map(u32::from).collect();
        assert_eq!(found, wanted);
    }

    #[test]
    fn words_are_what_lies_between_white_space() {
        let found: Vec<&str> = words("\u{1f} a\u{a0}bc\n\u{3000}d ").collect();
        assert_eq!(found, ["a", "bc", "d"]);
        assert_eq!(words(" \t").count(), 0);
    }
}
