//! One JSON object of the manifest, read strictly: the members that are listed, of the types that are listed, and no others but those
//! that begin with `x-`. Every error says where in the manifest it stands.

use serde_json::value::RawValue;

use crate::codec::safetensors::{Member, members};
use crate::error::{Error, Result};
use crate::rules::Rule;

/// An object, its place in the manifest, and the rule that its form is under.
pub(super) struct Object<'a> {
    members: Vec<Member<'a>>,
    place: String,
    rule: &'static Rule,
}

impl<'a> Object<'a> {
    /// Reads the members of an object. That none occurs twice was checked for the whole manifest.
    pub(super) fn new(rule: &'static Rule, place: impl Into<String>, text: &'a str) -> Result<Self> {
        let place = place.into();
        match members(text) {
            Ok(members) => Ok(Object { members, place, rule }),
            Err(_) => Err(Error::new(rule, format!("{place} is not an object"))),
        }
    }

    /// Refuses members that are neither listed nor private.
    pub(super) fn only(self, known: &[&str]) -> Result<Self> {
        match self.members.iter().find(|m| !known.contains(&m.key.as_ref()) && !m.key.starts_with("x-")) {
            None => Ok(self),
            Some(m) => Err(Error::new(self.rule, format!("{} has the unknown member {:?}", self.place, m.key))),
        }
    }

    /// The place of a member, for messages.
    pub(super) fn at(&self, key: &str) -> String {
        if self.place == "the manifest" { key.to_owned() } else { format!("{}.{key}", self.place) }
    }

    pub(super) fn get(&self, key: &str) -> Option<&'a str> {
        self.members.iter().find(|m| m.key == key).map(|m| m.value.get())
    }

    pub(super) fn raw(&self, key: &str) -> Result<&'a str> {
        self.get(key).ok_or_else(|| Error::new(self.rule, format!("{} has no {key:?}", self.place)))
    }

    #[cold]
    pub(super) fn wrong(&self, key: &str, wanted: &str) -> Error {
        let found: String = self.get(key).unwrap_or_default().chars().take(60).collect();
        Error::new(self.rule, format!("{} is {}; expected {wanted}", self.at(key), found.escape_debug()))
    }

    fn parsed<T: serde::Deserialize<'a>>(&self, key: &str, wanted: &str) -> Result<T> {
        serde_json::from_str(self.raw(key)?).map_err(|_| self.wrong(key, wanted))
    }

    pub(super) fn string(&self, key: &str) -> Result<String> {
        self.parsed(key, "a string")
    }

    pub(super) fn string_or_null(&self, key: &str) -> Result<Option<String>> {
        self.parsed(key, "a string or null")
    }

    pub(super) fn strings(&self, key: &str) -> Result<Vec<String>> {
        self.parsed(key, "an array of strings")
    }

    /// Digits alone: `8`, not `8.0`.
    pub(super) fn integer(&self, key: &str) -> Result<u64> {
        self.parsed(key, "an integer of at least 0")
    }

    pub(super) fn integers(&self, key: &str) -> Result<Vec<u64>> {
        self.parsed(key, "an array of integers")
    }

    pub(super) fn pairs(&self, key: &str) -> Result<Vec<[u64; 2]>> {
        self.parsed(key, "an array of pairs of integers")
    }

    pub(super) fn number(&self, key: &str) -> Result<f64> {
        self.parsed(key, "a number")
    }

    pub(super) fn numbers(&self, key: &str) -> Result<Vec<f64>> {
        self.parsed(key, "an array of numbers")
    }

    pub(super) fn flag(&self, key: &str) -> Result<bool> {
        self.parsed(key, "true or false")
    }

    /// An object that is kept as it is.
    pub(super) fn any_object(&self, key: &str) -> Result<Box<RawValue>> {
        let raw: &RawValue = self.parsed(key, "an object")?;
        if raw.get().starts_with('{') { Ok(raw.to_owned()) } else { Err(self.wrong(key, "an object")) }
    }

    /// The object that a member is.
    pub(super) fn object(&self, key: &str) -> Result<Object<'a>> {
        Object::new(self.rule, self.at(key), self.raw(key)?)
    }

    /// The objects of an array.
    pub(super) fn objects(&self, key: &str) -> Result<Vec<Object<'a>>> {
        let items: Vec<&RawValue> = self.parsed(key, "an array of objects")?;
        items.iter().enumerate().map(|(i, item)| Object::new(self.rule, format!("{}[{i}]", self.at(key)), item.get())).collect()
    }

    /// Every member that is not private, as strings.
    pub(super) fn string_members(&self) -> Result<Vec<(String, String)>> {
        self.members.iter().map(|m| Ok((m.key.to_string(), self.string(&m.key)?))).collect()
    }
}
