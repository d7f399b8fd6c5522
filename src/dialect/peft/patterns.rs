//! `rank_pattern` and `alpha_pattern`: for each module the first key, in file order, that `re.match(rf"(.*\.)?({key})$", module)`
//! finds; else a key that is the module's whole name; else the default (PEFT `utils/other.py`, `get_pattern_key`, and
//! `tuners/lora/model.py`, `_create_and_replace`). Also which modules `target_modules` covers (`check_target_module_exists`).
//!
//! Keys are tried one by one over all modules, so that one compiled pattern is held at a time. Keys that are plain names, which is
//! what people and tools write, are looked up without a regular expression: an adapter with a pattern per expert has tens of
//! thousands.

use std::collections::{HashMap, HashSet};

use super::config::Selection;
use super::python::{Regex, refused};
use crate::error::Diagnostic;
use crate::limits::Limits;
use crate::rules;

/// Comparisons of a key with a name that one config may ask for: seconds of work.
const MAX_TESTS: usize = 1_000_000_000;
/// The same for keys that are run as regular expressions.
const MAX_REGEX_TESTS: usize = 20_000_000;
/// Backtracking steps that all keys of a field may take together; divided evenly before anything is run, so that the outcome does
/// not depend on the machine.
const MAX_STEPS: usize = 200_000_000;

/// What a pattern field says about each module, by index of key.
pub(super) struct Found {
    /// The key that decides.
    pub(super) winner: Vec<Option<usize>>,
    /// A later key that matches too and has another value: the order of the file decided.
    pub(super) rival: Vec<Option<usize>>,
    /// Whether a key matches any module.
    pub(super) used: Vec<bool>,
}

/// The modules of an adapter, indexed for plain keys.
pub(super) struct Modules<'a> {
    names: &'a [&'a str],
    by_name: HashMap<&'a str, usize>,
    by_leaf: HashMap<&'a str, Vec<usize>>,
    ascii: bool,
}

impl<'a> Modules<'a> {
    pub(super) fn new(names: &'a [&'a str]) -> Self {
        let mut by_leaf: HashMap<&str, Vec<usize>> = HashMap::new();
        for (i, name) in names.iter().enumerate() {
            by_leaf.entry(name.rsplit('.').next().unwrap_or(name)).or_default().push(i);
        }
        let by_name = names.iter().enumerate().map(|(i, &name)| (name, i)).collect();
        Modules { names, by_name, by_leaf, ascii: names.iter().all(|name| name.is_ascii()) }
    }

    /// Resolves the keys of `field` for every module; what cannot be run goes to `problems`.
    pub(super) fn resolve<V: PartialEq>(
        &self,
        field: &str,
        pattern: &[(String, V)],
        limits: &Limits,
        problems: &mut Vec<Diagnostic>,
    ) -> Found {
        let mut found =
            Found { winner: vec![None; self.names.len()], rival: vec![None; self.names.len()], used: vec![false; pattern.len()] };
        let tests = pattern.len().saturating_mul(self.names.len()).max(1);
        let mut work = Work { tests: 0, regex_tests: 0, steps: limits.regex_steps.min(MAX_STEPS / tests).max(1) };
        for (k, (key, value)) in pattern.iter().enumerate() {
            let matches = match self.matches(key, &mut work) {
                Ok(matches) => matches,
                Err(Stop::Limit) => {
                    let message = format!("{field} has {} keys for {} modules: too much work", pattern.len(), self.names.len());
                    problems.push(Diagnostic::new(rules::CONFIG_LIMIT, message).tensor(field));
                    return found;
                }
                Err(Stop::Pattern(why)) => {
                    problems.push(refused(field, &format!("{field} key {key:?}"), &why));
                    continue;
                }
            };
            for m in matches {
                found.note(m, k, |first| pattern.get(first).is_some_and(|(_, v)| v != value));
            }
        }
        self.literal_keys(pattern, &mut found);
        found
    }

    /// A module that no key matches as a pattern takes the key that is its name (a name may hold characters such as `+`).
    fn literal_keys<V>(&self, pattern: &[(String, V)], found: &mut Found) {
        for (k, (key, _)) in pattern.iter().enumerate() {
            if let Some(&m) = self.by_name.get(key.as_str())
                && found.winner.get(m).is_some_and(Option::is_none)
            {
                found.note(m, k, |_| false);
            }
        }
    }

    /// The modules that `key` matches.
    fn matches(&self, key: &str, work: &mut Work) -> Result<Vec<usize>, Stop> {
        match Plain::of(key).filter(|_| self.ascii) {
            Some(Plain::Whole(name)) => Ok(self.by_name.get(name.as_str()).copied().into_iter().collect()),
            Some(Plain::Leaf(leaf)) => Ok(self.by_leaf.get(leaf.as_str()).cloned().unwrap_or_default()),
            Some(Plain::Dotted { anchored, bytes }) => {
                work.tests = work.tests.saturating_add(self.names.len());
                if work.tests > MAX_TESTS {
                    return Err(Stop::Limit);
                }
                Ok(self.indices(|name| dotted_match(&bytes, anchored, name.as_bytes())))
            }
            None => {
                work.regex_tests = work.regex_tests.saturating_add(self.names.len());
                if work.regex_tests > MAX_REGEX_TESTS {
                    return Err(Stop::Limit);
                }
                let regex = Regex::prefix(&format!(r"(.*\.)?({key})$"), work.steps).map_err(Stop::Pattern)?;
                let mut matches = Vec::new();
                for (m, name) in self.names.iter().enumerate() {
                    if regex.is_match(name).map_err(Stop::Pattern)? {
                        matches.push(m);
                    }
                }
                Ok(matches)
            }
        }
    }

    fn indices(&self, mut matches: impl FnMut(&str) -> bool) -> Vec<usize> {
        self.names.iter().enumerate().filter(|(_, name)| matches(name)).map(|(i, _)| i).collect()
    }

    /// The modules that `target_modules` does not cover, or `P-008`.
    pub(super) fn uncovered(&self, selection: &Selection, limits: &Limits) -> Result<Vec<usize>, Diagnostic> {
        match selection {
            Selection::Automatic => Ok(Vec::new()),
            Selection::Names(names) => {
                let names: HashSet<&str> = names.iter().map(String::as_str).collect();
                Ok(self.indices(|module| !ends(module).any(|end| names.contains(end))))
            }
            Selection::Pattern(pattern) => {
                let field = "target_modules";
                let refuse = |why: String| refused(field, field, &why);
                let steps = limits.regex_steps.min(MAX_STEPS / self.names.len().max(1)).max(1);
                let regex = Regex::full(pattern, steps).map_err(refuse)?;
                let mut uncovered = Vec::new();
                for (m, name) in self.names.iter().enumerate() {
                    if !regex.is_match(name).map_err(refuse)? {
                        uncovered.push(m);
                    }
                }
                Ok(uncovered)
            }
        }
    }
}

impl Found {
    /// Key `k` matches module `m`; `differs` says whether the value of an earlier key is another one.
    fn note(&mut self, m: usize, k: usize, differs: impl Fn(usize) -> bool) {
        if let Some(used) = self.used.get_mut(k) {
            *used = true;
        }
        let (Some(winner), Some(rival)) = (self.winner.get_mut(m), self.rival.get_mut(m)) else { return };
        match winner {
            None => *winner = Some(k),
            Some(first) if rival.is_none() && differs(*first) => *rival = Some(k),
            Some(_) => {}
        }
    }
}

/// What was asked of the engines so far, and steps per match.
struct Work {
    tests: usize,
    regex_tests: usize,
    steps: usize,
}

enum Stop {
    Limit,
    Pattern(String),
}

/// A path and its ends at dots: `a.b.c`, `b.c`, `c`.
pub(super) fn ends(path: &str) -> impl Iterator<Item = &str> {
    std::iter::successors(Some(path), |rest| rest.split_once('.').map(|(_, end)| end))
}

/// A key that needs no regular expression.
enum Plain {
    /// `^a\.b`: one module.
    Whole(String),
    /// `q_proj`: every module with that last segment.
    Leaf(String),
    /// `layers.0.q_proj`: an end of the path, where a dot that is not escaped stands for any character (`None`).
    Dotted { anchored: bool, bytes: Vec<Option<u8>> },
}

impl Plain {
    fn of(key: &str) -> Option<Plain> {
        let (anchored, body) = key.strip_prefix('^').map_or((false, key), |body| (true, body));
        let mut bytes = Vec::with_capacity(body.len());
        let mut rest = body.bytes();
        while let Some(byte) = rest.next() {
            bytes.push(match byte {
                b'.' => None,
                b'\\' => Some(rest.next().filter(|b| matches!(b, b'.' | b'-' | b'_' | b'/'))?),
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'-' | b'/' => Some(byte),
                _ => return None,
            });
        }
        if bytes.is_empty() {
            return None;
        }
        let literal: Option<Vec<u8>> = bytes.iter().copied().collect();
        let text = literal.and_then(|literal| String::from_utf8(literal).ok());
        Some(match text {
            Some(name) if anchored => Plain::Whole(name),
            Some(leaf) if !leaf.contains('.') => Plain::Leaf(leaf),
            _ => Plain::Dotted { anchored, bytes },
        })
    }
}

/// `re.match(rf"(.*\.)?({key})$", name)` for a dotted key and an ASCII name.
fn dotted_match(key: &[Option<u8>], anchored: bool, name: &[u8]) -> bool {
    let Some(start) = name.len().checked_sub(key.len()) else { return false };
    let (before, end) = name.split_at(start);
    let placed = if anchored { before.is_empty() } else { before.last().is_none_or(|&b| b == b'.') };
    placed && key.iter().rev().zip(end.iter().rev()).all(|(k, n)| k.is_none_or(|k| k == *n))
}
