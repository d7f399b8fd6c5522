//! Strict JSON for `adapter_config.json`: UTF-8 without a byte order mark, one object, no key twice at any level, order kept
//! (PEFT's patterns are "the first that matches"), and every error with its byte. `serde_json::Value` would keep the last of two
//! equal keys, and would do so in silence.

use std::cell::RefCell;
use std::collections::HashSet;
use std::fmt;
use std::path::Path;

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};

use crate::error::{Error, Result};
use crate::rules;

/// A JSON value whose objects keep their order.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Json {
    Null,
    Bool(bool),
    /// A number written without fraction and exponent that fits 64 bits.
    Int(i128),
    /// Any other number; always finite.
    Float(f64),
    Text(String),
    List(Vec<Json>),
    Object(Vec<(String, Json)>),
}

impl Json {
    /// What a message calls the value; strings and lists are not repeated in full.
    pub(super) fn describe(&self) -> String {
        match self {
            Json::Null => "null".to_owned(),
            Json::Bool(b) => b.to_string(),
            Json::Int(i) => i.to_string(),
            Json::Float(f) => format!("the float {f:?}"),
            Json::Text(t) if t.len() <= 40 => format!("the string {t:?}"),
            Json::Text(t) => format!("a string of {} bytes", t.len()),
            Json::List(l) => format!("a list of {}", l.len()),
            Json::Object(o) => format!("an object of {}", o.len()),
        }
    }
}

/// Parses `bytes` as one JSON object.
///
/// # Errors
/// `P-001` for anything that is not a UTF-8 JSON object, `P-002` for a key that occurs twice.
pub(super) fn parse_object<'a>(bytes: &'a [u8], file: &Path) -> Result<(&'a str, Vec<(String, Json)>)> {
    let text = decode(bytes, file)?;
    let duplicate = RefCell::new(None);
    let mut input = serde_json::Deserializer::from_str(text);
    let parsed = Tree { duplicate: &duplicate }.deserialize(&mut input).and_then(|tree| input.end().map(|()| tree));
    match parsed {
        Ok(Json::Object(members)) => Ok((text, members)),
        Ok(other) => {
            let message = format!("expected a JSON object, found {}", other.describe());
            Err(Error::new(rules::CONFIG_ENCODING, message).file(file).offset(0))
        }
        Err(error) => Err(syntax_error(text, &error, duplicate.into_inner(), file)),
    }
}

/// The bytes as text, or what they are instead.
fn decode<'a>(bytes: &'a [u8], file: &Path) -> Result<&'a str> {
    let refuse = |message: String, offset: usize, help: &str| {
        Err(Error::new(rules::CONFIG_ENCODING, message).file(file).offset(offset as u64).help(help))
    };
    if bytes.is_empty() {
        return refuse("the config is empty (0 bytes)".to_owned(), 0, "the download is unfinished; get the file again");
    }
    if bytes.starts_with(&[0xef, 0xbb, 0xbf]) {
        return refuse("the config starts with a UTF-8 byte order mark".to_owned(), 0, "save it as UTF-8 without BOM");
    }
    // JSON starts with ASCII, so in UTF-16 and UTF-32 one of the first bytes is zero even without a mark.
    if bytes.starts_with(&[0xff, 0xfe]) || bytes.starts_with(&[0xfe, 0xff]) || bytes.iter().take(4).any(|&b| b == 0) {
        return refuse("the config is UTF-16 or UTF-32".to_owned(), 0, "save it as UTF-8");
    }
    std::str::from_utf8(bytes).or_else(|error| {
        let at = error.valid_up_to();
        let byte = bytes.get(at).copied().unwrap_or_default();
        refuse(format!("byte 0x{byte:02x} is not UTF-8; the config may be Latin-1"), at, "save it as UTF-8")
    })
}

fn syntax_error(text: &str, error: &serde_json::Error, duplicate: Option<String>, file: &Path) -> Error {
    let offset = byte_offset(text, error.line(), error.column());
    let at = format!("line {} column {}", error.line(), error.column());
    if let Some(key) = duplicate {
        let message = format!("key {key:?} occurs twice ({at})");
        let help = "readers disagree on which of the two counts; remove one";
        return Error::new(rules::CONFIG_UNIQUE, message).file(file).tensor(key).offset(offset).help(help);
    }
    let start = text.trim_start();
    let rest = usize::try_from(offset).ok().and_then(|o| text.get(o..)).unwrap_or_default();
    let constant = ["NaN", "Infinity", "-Infinity"].into_iter().any(|c| rest.starts_with(c));
    let help = if start.starts_with("version https://git-lfs") {
        "this is a Git LFS pointer, not the file; run git lfs pull"
    } else if start.starts_with('<') {
        "this is a web page, not the file; get the file again"
    } else if constant {
        "NaN and Infinity are not JSON, although Python writes them; write the number that was meant"
    } else {
        "correct the file, or get it again"
    };
    Error::new(rules::CONFIG_ENCODING, format!("not JSON: {error}")).file(file).offset(offset).help(help)
}

/// The byte that serde_json's line and column (both from 1, columns in bytes) point at.
fn byte_offset(text: &str, line: usize, column: usize) -> u64 {
    let start: usize = text.split_inclusive('\n').take(line.saturating_sub(1)).map(str::len).sum();
    start.saturating_add(column.saturating_sub(1)).min(text.len()) as u64
}

/// Builds a [`Json`] and leaves the first repeated key in `duplicate`.
#[derive(Clone, Copy)]
struct Tree<'s> {
    duplicate: &'s RefCell<Option<String>>,
}

impl<'de> DeserializeSeed<'de> for Tree<'_> {
    type Value = Json;

    fn deserialize<D: Deserializer<'de>>(self, input: D) -> Result<Json, D::Error> {
        input.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Tree<'_> {
    type Value = Json;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Json, E> {
        Ok(Json::Null)
    }

    fn visit_bool<E>(self, v: bool) -> Result<Json, E> {
        Ok(Json::Bool(v))
    }

    fn visit_u64<E>(self, v: u64) -> Result<Json, E> {
        Ok(Json::Int(v.into()))
    }

    fn visit_i64<E>(self, v: i64) -> Result<Json, E> {
        Ok(Json::Int(v.into()))
    }

    fn visit_f64<E>(self, v: f64) -> Result<Json, E> {
        Ok(Json::Float(v))
    }

    fn visit_str<E>(self, v: &str) -> Result<Json, E> {
        Ok(Json::Text(v.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Json, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element_seed(self)? {
            list.push(item);
        }
        Ok(Json::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Json, A::Error> {
        let mut members = Vec::new();
        let mut seen = HashSet::new();
        while let Some(key) = entries.next_key::<String>()? {
            if !seen.insert(key.clone()) {
                let error = A::Error::custom("repeated key");
                *self.duplicate.borrow_mut() = Some(key);
                return Err(error);
            }
            members.push((key, entries.next_value_seed(self)?));
        }
        Ok(Json::Object(members))
    }
}
