//! Typed access to the members of `adapter_config.json`: each field has the type that PEFT gives it, or is a problem that names
//! the field, what stands there and what should. Nothing is coerced: PEFT would take `"8"` for `r` and fail much later.

use super::config::{Bias, Selection};
use super::json::Json;
use super::methods::variant::BlockDiagonal;
use crate::error::Diagnostic;
use crate::limits::Limits;
use crate::rules;

/// Longest list of module names. Not in [`Limits`]: the byte limit of the config is the one that users meet.
const MAX_NAMES: usize = 100_000;

/// The members of the config; collects every problem and every name that was asked for.
pub(super) struct Fields<'a> {
    members: &'a [(String, Json)],
    pub(super) read: Vec<&'static str>,
    pub(super) problems: Vec<Diagnostic>,
}

impl<'a> Fields<'a> {
    pub(super) fn new(members: &'a [(String, Json)]) -> Self {
        Fields { members, read: Vec::new(), problems: Vec::new() }
    }

    /// The member, if it is there and not null.
    fn get(&mut self, name: &'static str) -> Option<&'a Json> {
        self.read.push(name);
        self.members.iter().find(|(key, _)| key == name).map(|(_, value)| value).filter(|value| **value != Json::Null)
    }

    fn wrong(&mut self, name: &str, found: &Json, expected: &str) {
        let message = format!("{name} is {}, not {expected}", found.describe());
        let field = name.rsplit(' ').next().unwrap_or(name);
        self.problems.push(Diagnostic::new(rules::CONFIG_TYPES, message).tensor(field));
    }

    fn too_many(&mut self, name: &str, found: usize) {
        let message = format!("{name} has {found} entries, more than {MAX_NAMES}");
        self.problems.push(Diagnostic::new(rules::CONFIG_LIMIT, message).tensor(name));
    }

    pub(super) fn rank(&mut self, name: &'static str, limits: &Limits) -> u64 {
        match self.get(name).map(|value| rank_of(value, limits)) {
            Some(Ok(rank)) => return rank,
            Some(Err(problem)) => self.problems.push(problem.named(name)),
            None => {
                let message = format!("{name} is missing or null; it has to be a whole number of at least 1");
                self.problems.push(Diagnostic::new(rules::CONFIG_TYPES, message).tensor(name));
            }
        }
        1
    }

    /// Pairs of a start and an end.
    pub(super) fn ranges(&mut self, name: &'static str) -> Vec<(u64, u64)> {
        let expected = "a list of pairs [start, end]";
        let Some(value) = self.get(name) else { return Vec::new() };
        let Json::List(items) = value else {
            self.wrong(name, value, expected);
            return Vec::new();
        };
        let mut ranges = Vec::new();
        for item in items {
            let number = |value: &Json| if let Json::Int(number) = value { u64::try_from(*number).ok() } else { None };
            let pair = if let Json::List(pair) = item { pair.as_slice() } else { &[] };
            match pair {
                [start, end] if number(start).is_some() && number(end).is_some() => ranges.extend(number(start).zip(number(end))),
                _ => self.wrong(name, item, expected),
            }
        }
        ranges
    }

    /// Whether a sub-config is there.
    pub(super) fn is_set(&mut self, name: &'static str) -> bool {
        self.get(name).is_some_and(|value| *value != Json::Bool(false))
    }

    /// BD-LoRA's sub-config.
    pub(super) fn block_diagonal(&mut self, name: &'static str) -> Option<BlockDiagonal> {
        let members = match self.get(name)? {
            Json::Bool(false) => return None,
            Json::Object(members) => members,
            other => {
                self.wrong(name, other, "an object with nblocks and the modules whose factors have blocks");
                return None;
            }
        };
        let get = |key: &str| members.iter().find(|(k, _)| k == key).map(|(_, value)| value).filter(|v| **v != Json::Null);
        let blocks = match get("nblocks") {
            Some(Json::Int(blocks)) => u64::try_from(*blocks).unwrap_or(0),
            _ => 0,
        };
        if blocks == 0 {
            self.wrong(name, &Json::Null, "an object whose nblocks is a whole number of at least 1");
        }
        let mut list = |key| match get(key) {
            Some(value) => self.list(name, value, "an object with lists of module names"),
            None => Vec::new(),
        };
        Some(BlockDiagonal { blocks, a: list("target_modules_bd_a"), b: list("target_modules_bd_b") })
    }

    pub(super) fn flag(&mut self, name: &'static str) -> Option<bool> {
        match self.get(name)? {
            Json::Bool(flag) => Some(*flag),
            other => {
                self.wrong(name, other, "true or false, without quotes");
                None
            }
        }
    }

    pub(super) fn number(&mut self, name: &'static str) -> Option<f64> {
        number_of(self.get(name)?).map_err(|problem| self.problems.push(problem.named(name))).ok()
    }

    pub(super) fn text(&mut self, name: &'static str) -> Option<String> {
        match self.get(name)? {
            Json::Text(text) => Some(text.clone()),
            other => {
                self.wrong(name, other, "a string or null");
                None
            }
        }
    }

    pub(super) fn bias(&mut self) -> Bias {
        self.read.push("bias");
        match self.members.iter().find(|(key, _)| key == "bias").map(|(_, value)| value) {
            None => return Bias::None,
            Some(Json::Text(text)) if text == "none" => return Bias::None,
            Some(Json::Text(text)) if text == "all" => return Bias::All,
            Some(Json::Text(text)) if text == "lora_only" => return Bias::LoraOnly,
            Some(other) => self.wrong("bias", other, "\"none\", \"all\" or \"lora_only\""),
        }
        Bias::None
    }

    /// An object of values, in the order of the file.
    pub(super) fn pattern<V>(&mut self, name: &'static str, value_of: impl Fn(&Json) -> Result<V, Wrong>) -> Vec<(String, V)> {
        let mut pattern = Vec::new();
        match self.get(name) {
            None => {}
            Some(Json::Object(members)) => {
                for (key, value) in members {
                    match value_of(value) {
                        Ok(value) => pattern.push((key.clone(), value)),
                        Err(problem) => self.problems.push(problem.named(&format!("{name} of {key:?}"))),
                    }
                }
            }
            Some(other) => self.wrong(name, other, "an object from module names to numbers"),
        }
        pattern
    }

    pub(super) fn selection(&mut self, name: &'static str) -> Selection {
        match self.get(name) {
            None => Selection::Automatic,
            // PEFT resolves the shorthand when it trains and saves the result, but other writers keep it.
            Some(Json::Text(text)) if text.eq_ignore_ascii_case("all-linear") => Selection::Automatic,
            Some(Json::Text(text)) => Selection::Pattern(text.clone()),
            Some(value) => Selection::Names(self.list(name, value, "a list of strings, a string or null")),
        }
    }

    pub(super) fn names(&mut self, name: &'static str) -> Vec<String> {
        self.get(name).map_or_else(Vec::new, |value| self.list(name, value, "a list of strings or null"))
    }

    /// Row numbers by module: an object of lists, or one list for the input embedding, which PEFT calls `embed_tokens` then.
    pub(super) fn tokens(&mut self, name: &'static str) -> Vec<(String, Vec<u64>)> {
        let expected = "a list of token ids, or an object of such lists";
        match self.get(name) {
            None => Vec::new(),
            Some(Json::List(list)) => self.ids(name, list).map(|ids| (String::new(), ids)).into_iter().collect(),
            Some(Json::Object(members)) => {
                let mut tokens = Vec::new();
                for (module, value) in members {
                    match value {
                        Json::List(list) => tokens.extend(self.ids(name, list).map(|ids| (module.clone(), ids))),
                        other => self.wrong(name, other, expected),
                    }
                }
                tokens
            }
            Some(other) => {
                self.wrong(name, other, expected);
                Vec::new()
            }
        }
    }

    fn ids(&mut self, name: &'static str, list: &[Json]) -> Option<Vec<u64>> {
        let mut ids = Vec::with_capacity(list.len().min(MAX_NAMES));
        if list.len() > MAX_NAMES {
            self.too_many(name, list.len());
            return None;
        }
        for item in list {
            let id = if let Json::Int(id) = item { u64::try_from(*id).ok() } else { None };
            let Some(id) = id else {
                self.wrong(&format!("an entry of {name}"), item, "a token id: a whole number of at least 0");
                return None;
            };
            ids.push(id);
        }
        Some(ids)
    }

    fn list(&mut self, name: &'static str, value: &Json, expected: &str) -> Vec<String> {
        let Json::List(items) = value else {
            self.wrong(name, value, expected);
            return Vec::new();
        };
        if items.len() > MAX_NAMES {
            self.too_many(name, items.len());
            return Vec::new();
        }
        let mut names = Vec::with_capacity(items.len());
        for item in items {
            match item {
                Json::Text(text) => names.push(text.clone()),
                other => {
                    self.wrong(&format!("an entry of {name}"), other, "a string");
                    break;
                }
            }
        }
        names
    }
}

/// Why a value is not what its field demands; the field is added by whoever knows it.
pub(super) enum Wrong {
    Type(String),
    Limit(String),
}

impl Wrong {
    fn named(self, field: &str) -> Diagnostic {
        let (rule, message) = match self {
            Wrong::Type(what) => (rules::CONFIG_TYPES, what),
            Wrong::Limit(what) => (rules::CONFIG_LIMIT, what),
        };
        let of = field.strip_prefix("an entry of ").unwrap_or(field);
        let key = of.split(' ').next().unwrap_or(of);
        Diagnostic::new(rule, format!("{field} is {message}")).tensor(key)
    }
}

pub(super) fn rank_of(value: &Json, limits: &Limits) -> Result<u64, Wrong> {
    match value {
        Json::Int(rank) if *rank > i128::from(limits.rank) => {
            Err(Wrong::Limit(format!("{rank}, over the limit of {}", limits.rank)))
        }
        Json::Int(rank) if *rank >= 1 => u64::try_from(*rank).map_err(|_| Wrong::Limit(rank.to_string())),
        other => Err(Wrong::Type(format!("{}, not a rank: a whole number of at least 1", other.describe()))),
    }
}

pub(super) fn number_of(value: &Json) -> Result<f64, Wrong> {
    match value {
        // Exact for every alpha that anybody writes; beyond 2^53 Python rounds the same way when it divides.
        Json::Int(number) => Ok(*number as f64),
        Json::Float(number) => Ok(*number),
        other => Err(Wrong::Type(format!("{}, not a number", other.describe()))),
    }
}
