//! JSON objects as ordered lists of members with byte offsets. `serde_json` parses; this keeps what its maps would lose: repeated
//! keys, the order of keys, and where each value stands.

use std::borrow::Cow;
use std::fmt;

use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

/// One member of a JSON object, its value not yet parsed.
pub(crate) struct Member<'a> {
    /// The key, unescaped.
    pub(crate) key: Cow<'a, str>,
    /// The text of the value.
    pub(crate) value: &'a RawValue,
    /// Byte offset of the value from the start of the text that [`members`] was given.
    pub(crate) offset: usize,
}

/// The members of the JSON object that `text` is, in order, repeated keys and all.
///
/// # Errors
/// The parser's error, with line and column, if the text is not exactly one object.
pub(crate) fn members(text: &str) -> serde_json::Result<Vec<Member<'_>>> {
    let mut parser = serde_json::Deserializer::from_str(text);
    let found = parser.deserialize_map(Members { text })?;
    parser.end()?;
    Ok(found)
}

struct Members<'a> {
    text: &'a str,
}

impl<'de> Visitor<'de> for Members<'de> {
    type Value = Vec<Member<'de>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Self::Value, M::Error> {
        let mut found = Vec::new();
        while let Some(Key(key)) = map.next_key()? {
            let value: &RawValue = map.next_value()?;
            // The value is a slice of the text, so the distance of their addresses is the offset.
            let offset = (value.get().as_ptr() as usize).saturating_sub(self.text.as_ptr() as usize);
            found.push(Member { key, value, offset });
        }
        Ok(found)
    }
}

/// A key, borrowed from the text unless it has escapes.
struct Key<'a>(Cow<'a, str>);

impl<'de> serde::Deserialize<'de> for Key<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct KeyVisitor;
        impl<'de> Visitor<'de> for KeyVisitor {
            type Value = Key<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }
            fn visit_borrowed_str<E>(self, v: &'de str) -> Result<Key<'de>, E> {
                Ok(Key(Cow::Borrowed(v)))
            }
            fn visit_str<E>(self, v: &str) -> Result<Key<'de>, E> {
                Ok(Key(Cow::Owned(v.to_owned())))
            }
        }
        deserializer.deserialize_str(KeyVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeated_keys_are_kept_with_their_offsets() {
        let text = r#"{"a":1, "\u0061":[2]}"#;
        let found = members(text).unwrap();
        let seen: Vec<_> = found.iter().map(|m| (m.key.as_ref(), m.value.get(), m.offset)).collect();
        assert_eq!(seen, [("a", "1", 5), ("a", "[2]", 17)]);
    }

    #[test]
    fn a_deep_value_does_not_overflow_the_stack() {
        let text = format!(r#"{{"a":{}{}}}"#, "[".repeat(100_000), "]".repeat(100_000));
        assert_eq!(members(&text).map(|m| m.len()).unwrap_or(0), 1);
    }

    #[test]
    fn anything_but_one_object_is_an_error() {
        for text in ["[]", "{} x", "{", "3", "null", ""] {
            assert!(members(text).is_err(), "{text}");
        }
    }
}
