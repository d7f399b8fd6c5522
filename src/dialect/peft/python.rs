//! Python regular expressions on module names, as PEFT uses them: `re.match` and `re.fullmatch`, without flags. Most are run by a
//! linear-time engine; look-around and back-references by a second one with a step limit. The three dialects differ in corners,
//! and a pattern that they might read differently is refused instead of guessed at: see [`check`].
//!
//! Names have no line breaks (rule `C-019`), so Python's `$`, which also matches before a last line break, needs no care.

use crate::error::Diagnostic;
use crate::rules;

/// Bytes that one compiled pattern may take. Unsloth's longest, an alternation of layer names, takes a hundredth.
const COMPILED_BYTES: usize = 1 << 20;

/// A compiled pattern that either matches a name or does not.
pub(super) enum Regex {
    Linear(regex::Regex),
    Backtracking(fancy_regex::Regex),
}

impl Regex {
    /// `re.match(pattern, name)`: anchored at the start only. `steps` bounds each match of the backtracking engine.
    pub(super) fn prefix(pattern: &str, steps: usize) -> Result<Regex, String> {
        check(pattern)?;
        Self::compile(&format!("^(?:{pattern})"), steps)
    }

    /// `re.fullmatch(pattern, name)`.
    pub(super) fn full(pattern: &str, steps: usize) -> Result<Regex, String> {
        check(pattern)?;
        Self::compile(&format!("^(?:{pattern})$"), steps)
    }

    /// Wrapping in a group without a number is safe because [`check`] saw that the pattern's own groups are balanced, and keeps
    /// the numbers that back-references use.
    fn compile(wrapped: &str, steps: usize) -> Result<Regex, String> {
        let linear = regex::RegexBuilder::new(wrapped).size_limit(COMPILED_BYTES).dfa_size_limit(COMPILED_BYTES).build();
        if let Ok(regex) = linear {
            return Ok(Regex::Linear(regex));
        }
        fancy_regex::RegexBuilder::new(wrapped)
            .backtrack_limit(steps)
            .delegate_size_limit(COMPILED_BYTES)
            .delegate_dfa_size_limit(COMPILED_BYTES)
            .max_prog_size(COMPILED_BYTES / 16)
            .build()
            .map(Regex::Backtracking)
            .map_err(|error| format!("is not a regular expression that can be run: {error}"))
    }

    /// Whether `name` matches; an error if that takes more steps than allowed.
    pub(super) fn is_match(&self, name: &str) -> Result<bool, String> {
        match self {
            Regex::Linear(regex) => Ok(regex.is_match(name)),
            Regex::Backtracking(regex) => {
                regex.is_match(name).map_err(|_| format!("takes more steps than allowed on {name:?}; it may never end"))
            }
        }
    }
}

/// `P-008` for a pattern that cannot be run. `what` names it, `why` continues the sentence.
#[cold]
pub(super) fn refused(field: &str, what: &str, why: &str) -> Diagnostic {
    Diagnostic::new(rules::PATTERN_REGEX, format!("{what} {why}"))
        .tensor(field)
        .help("list the modules explicitly, without regular expressions")
}

/// What a quantifier would repeat.
#[derive(Clone, Copy, PartialEq)]
enum Before {
    Nothing,
    Item,
    Quantifier,
}

/// Refuses constructs that Python and the engines read differently, or that Python does not know, and unbalanced groups.
fn check(pattern: &str) -> Result<(), String> {
    let mut rest = pattern;
    let mut depth = 0usize;
    let mut before = Before::Nothing;
    while let Some(next) = rest.chars().next() {
        let mut now = Before::Item;
        let used = match next {
            '\\' => escape(rest)?,
            '[' => class(rest)?,
            '(' => {
                depth += 1;
                now = Before::Nothing;
                group(rest, rest.len() == pattern.len())?
            }
            ')' => {
                depth = depth.checked_sub(1).ok_or("closes a group that it did not open")?;
                1
            }
            '|' => {
                now = Before::Nothing;
                1
            }
            '*' | '+' | '?' | '{' => {
                now = match before {
                    Before::Nothing => return Err(format!("has the quantifier {next:?} with nothing before it")),
                    Before::Item => Before::Quantifier,
                    // A second quantifier makes the first lazy (`?`) or, since Python 3.11, possessive (`+`), or is an error.
                    Before::Quantifier if next == '?' => Before::Nothing,
                    Before::Quantifier => return Err(format!("has the quantifier {next:?} after a quantifier")),
                };
                if next == '{' { interval(rest)? } else { 1 }
            }
            other => other.len_utf8(),
        };
        before = now;
        rest = rest.get(used..).unwrap_or_default();
    }
    if depth > 0 { Err("opens a group that it does not close".to_owned()) } else { Ok(()) }
}

/// Length of the escape at the start of `rest`: punctuation, and the classes and anchors that all three dialects share. References
/// back are not among them: fancy-regex 0.20 misses matches of `((.)+)+\1` that Python finds.
fn escape(rest: &str) -> Result<usize, String> {
    match rest.chars().nth(1) {
        Some('<' | '>') | None => {}
        Some(c) if c.is_ascii_punctuation() => return Ok(2),
        Some('d' | 'D' | 'w' | 'W' | 's' | 'S' | 'B' | 'A' | 'Z' | 'n' | 't') => return Ok(2),
        // `\b{start}` is Rust's alone.
        Some('b') if !rest.starts_with(r"\b{") => return Ok(2),
        Some(_) => {}
    }
    let shown: String = rest.chars().take(2).collect();
    Err(format!("has the escape {shown:?}, which is not known to mean the same here as in Python"))
}

/// Length of the character class at the start of `rest`.
fn class(rest: &str) -> Result<usize, String> {
    let mut at = if rest.starts_with("[^") { 2 } else { 1 };
    let first = at;
    loop {
        let tail = rest.get(at..).unwrap_or_default();
        let Some(next) = tail.chars().next() else { return Err("has a character class without an end".to_owned()) };
        match next {
            // In Python a bracket that comes first is a member.
            ']' if at > first => return Ok(at + 1),
            '\\' => at += escape(tail)?,
            '[' => return Err("has a bracket inside a character class".to_owned()),
            _ if ["&&", "--", "~~"].iter().any(|set| tail.starts_with(set)) => {
                return Err("has a set operation inside a character class".to_owned());
            }
            other => at += other.len_utf8(),
        }
    }
}

/// Length of the opening of the group at the start of `rest`. Flags for the whole pattern stand at its start or nowhere.
fn group(rest: &str, at_start: bool) -> Result<usize, String> {
    let Some(inner) = rest.strip_prefix("(?") else { return Ok(1) };
    for known in [":", "=", "!", "<=", "<!", "P<", "i:", "s:", "-i:", "-s:"] {
        if inner.starts_with(known) {
            return Ok(2 + known.len());
        }
    }
    if at_start && (inner.starts_with("i)") || inner.starts_with("s)")) {
        // The closing parenthesis is left for the caller, who counted the opening one.
        return Ok(3);
    }
    let shown: String = rest.chars().take(4).collect();
    Err(format!("has the group {shown:?}, which is not known to mean the same here as in Python"))
}

/// Length of the interval at the start of `rest`: `{2}`, `{2,}`, `{2,3}` or `{,3}`. Any other brace is a plain one in Python.
fn interval(rest: &str) -> Result<usize, String> {
    let inner = rest.strip_prefix('{').and_then(|rest| rest.split_once('}')).map(|(inner, _)| inner);
    let digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
    let bound = |text: &str, open: u64| if text.is_empty() { Some(open) } else { text.parse::<u64>().ok() };
    let ordered =
        |low: &str, high: &str| matches!((bound(low, 0), bound(high, u64::MAX)), (Some(low), Some(high)) if low <= high);
    let valid = inner.is_some_and(|inner| match inner.split_once(',') {
        None => !inner.is_empty() && digits(inner),
        Some((low, high)) => inner != "," && digits(low) && digits(high) && ordered(low, high),
    });
    match inner {
        Some(inner) if valid => Ok(inner.len() + 2),
        _ => Err("has a brace that is no interval".to_owned()),
    }
}
