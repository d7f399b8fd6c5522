//! The shard index: the JSON file that says which file of a folder holds which tensor. Text in, [`ShardIndex`] out, and back to text
//! with the order kept; whether the shards exist and agree is not asked here. The rules are `K-002`, `K-003`, `K-005`, `K-013` and
//! `K-014` of `spec/checkpoint.md`.

use std::collections::HashMap;
use std::path::Path;

use super::safetensors::{Member, members};
use crate::error::{Error, Result};
use crate::io;
use crate::limits::Limits;
use crate::rules::{self, Rule};

/// A parsed index.
#[derive(Debug, Clone)]
pub struct ShardIndex {
    /// Name of the file, inside its folder.
    file_name: String,
    /// Members in the order of the file, values as raw JSON; those of `metadata` and `weight_map` are kept parsed instead.
    members: Vec<(String, String)>,
    metadata: Vec<(String, String)>,
    weight_map: Vec<(String, String)>,
}

/// What the index says of the size of all tensors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum TotalSize {
    Absent,
    Bytes(u64),
    /// Something that is no size, as raw JSON.
    Odd(String),
}

impl ShardIndex {
    /// Reads and checks an index.
    ///
    /// # Errors
    /// `E-001`, `E-007`, or the first broken rule of those above, with the byte offset.
    pub(crate) fn read(path: &Path, limits: &Limits) -> Result<Self> {
        let Some(bytes) = io::read_small(path, limits.index_bytes)? else {
            let message = format!("the index has more than {} bytes, the limit", limits.index_bytes);
            return Err(Error::new(rules::INDEX_LIMIT, message).file(path));
        };
        let text = std::str::from_utf8(&bytes).map_err(|e| {
            Error::new(rules::INDEX_JSON, "the index is not UTF-8 from here on").file(path).offset(e.valid_up_to() as u64)
        })?;
        Parser { path, limits }.index(text)
    }

    /// An index of nothing, to be rendered with a map.
    pub(crate) fn empty(file_name: &str) -> Self {
        let members = vec![("metadata".to_owned(), String::new()), ("weight_map".to_owned(), String::new())];
        ShardIndex { file_name: file_name.to_owned(), members, metadata: Vec::new(), weight_map: Vec::new() }
    }

    /// Name of the index file inside its folder.
    pub(crate) fn file_name(&self) -> &str {
        &self.file_name
    }

    /// Tensor and shard, in the order of the file.
    pub fn weight_map(&self) -> &[(String, String)] {
        &self.weight_map
    }

    /// Names of the shards, sorted, each once.
    pub(crate) fn shard_names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.weight_map.iter().map(|(_, shard)| shard.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    /// What `metadata.total_size` says.
    pub(crate) fn total_size(&self) -> TotalSize {
        match self.metadata.iter().find(|(key, _)| key == "total_size") {
            None => TotalSize::Absent,
            Some((_, raw)) => raw.parse().map_or_else(|_| TotalSize::Odd(raw.clone()), TotalSize::Bytes),
        }
    }

    /// The text of an index like this one for another map and size: other members and their order are kept. Laid out as
    /// `save_pretrained` of transformers does it.
    pub(crate) fn render(&self, weight_map: &[(String, String)], total_size: u64) -> String {
        let mut metadata = self.metadata.clone();
        match metadata.iter_mut().find(|(key, _)| key == "total_size") {
            Some((_, raw)) => *raw = total_size.to_string(),
            None => metadata.push(("total_size".to_owned(), total_size.to_string())),
        }
        let map: Vec<(String, String)> = weight_map.iter().map(|(tensor, shard)| (tensor.clone(), quote(shard))).collect();
        let mut members = self.members.clone();
        if !members.iter().any(|(key, _)| key == "metadata") {
            members.insert(0, ("metadata".to_owned(), String::new()));
        }
        for (key, raw) in &mut members {
            match key.as_str() {
                "metadata" => *raw = object(&metadata, "  "),
                "weight_map" => *raw = object(&map, "  "),
                _ => {}
            }
        }
        object(&members, "") + "\n"
    }
}

/// A JSON object of raw values, one member per line.
fn object(members: &[(String, String)], indent: &str) -> String {
    let lines: Vec<String> = members.iter().map(|(key, raw)| format!("{indent}  {}: {raw}", quote(key))).collect();
    format!("{{\n{}\n{indent}}}", lines.join(",\n"))
}

fn quote(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

struct Parser<'a> {
    path: &'a Path,
    limits: &'a Limits,
}

impl Parser<'_> {
    #[cold]
    fn fail(&self, rule: &'static Rule, at: usize, message: impl Into<String>) -> Error {
        Error::new(rule, message).file(self.path).offset(at as u64)
    }

    fn index(&self, text: &str) -> Result<ShardIndex> {
        if text.starts_with('\u{feff}') {
            return Err(self.fail(rules::INDEX_JSON, 0, "the index starts with a byte order mark (BOM)"));
        }
        let file_name = self.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let mut found = ShardIndex { file_name, members: Vec::new(), metadata: Vec::new(), weight_map: Vec::new() };
        let mut has_map = false;
        for member in self.object(text, 0, "the index")? {
            let (at, raw) = (member.offset, member.value.get());
            let mut kept = String::new();
            match member.key.as_ref() {
                "weight_map" => {
                    found.weight_map = self.weight_map(raw, at)?;
                    has_map = true;
                }
                // Anything but an object tells nothing; the size is then absent.
                "metadata" if raw.starts_with('{') => {
                    let facts = self.object(raw, at, "the metadata of the index")?;
                    found.metadata = facts.into_iter().map(|m| (m.key.into_owned(), m.value.get().to_owned())).collect();
                }
                _ => kept = raw.to_owned(),
            }
            found.members.push((member.key.into_owned(), kept));
        }
        if has_map { Ok(found) } else { Err(self.fail(rules::INDEX_JSON, 0, "the index has no weight_map")) }
    }

    /// The members of an object that lies `base` bytes into the file, each key once.
    fn object<'t>(&self, text: &'t str, base: usize, what: &str) -> Result<Vec<Member<'t>>> {
        let mut found =
            members(text).map_err(|e| self.fail(rules::INDEX_JSON, base, format!("{what} is not a JSON object: {e}")))?;
        let mut seen: HashMap<&str, &Member<'_>> = HashMap::with_capacity(found.len());
        for member in &found {
            if let Some(first) = seen.insert(&member.key, member) {
                let short = |m: &Member<'_>| m.value.get().chars().take(80).collect::<String>();
                let message = format!("{:?} occurs twice, as {} and as {}", member.key, short(first), short(member));
                let error = self.fail(rules::INDEX_UNIQUE, base + member.offset, message).tensor(member.key.as_ref());
                return Err(error.help("two readers would see two different models; write the index again"));
            }
        }
        for member in &mut found {
            member.offset += base;
        }
        Ok(found)
    }

    fn weight_map(&self, text: &str, base: usize) -> Result<Vec<(String, String)>> {
        let found = self.object(text, base, "the weight_map")?;
        if found.is_empty() {
            return Err(self.fail(rules::INDEX_JSON, base, "the weight_map is empty"));
        }
        if found.len() > self.limits.tensors {
            let message = format!("{} tensors in the index, over the limit of {}", found.len(), self.limits.tensors);
            return Err(self.fail(rules::INDEX_LIMIT, base, message));
        }
        let mut map = Vec::with_capacity(found.len());
        let mut by_case: HashMap<String, String> = HashMap::new();
        for member in found {
            let tensor = member.key.into_owned();
            let shard: String = serde_json::from_str(member.value.get()).map_err(|_| {
                self.fail(rules::INDEX_JSON, member.offset, format!("the shard of {tensor:?} is not a string")).tensor(&tensor)
            })?;
            if !is_plain(&shard) {
                let message = format!("the shard of {tensor:?} is {shard:?}; expected a plain file name");
                let error = self.fail(rules::INDEX_PATHS, member.offset, message).tensor(tensor);
                return Err(error.help("shards lie beside the index; nothing else is opened"));
            }
            match by_case.get(&shard.to_lowercase()) {
                None => drop(by_case.insert(shard.to_lowercase(), shard.clone())),
                Some(first) if *first == shard => {}
                Some(first) => {
                    let message = format!("the shards {first:?} and {shard:?} differ by case alone");
                    return Err(self.fail(rules::CASE_DISTINCT, member.offset, message).tensor(tensor));
                }
            }
            map.push((tensor, shard));
        }
        Ok(map)
    }
}

/// A name that means a file in the folder and nothing else, here and on Windows: no separator, no drive, no dots alone.
fn is_plain(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && !name.chars().any(|c| matches!(c, '/' | '\\' | ':') || c.is_control())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<ShardIndex> {
        Parser { path: Path::new("index"), limits: &Limits::default() }.index(text)
    }

    fn rule(text: &str) -> &'static str {
        parse(text).map_or_else(|e| e.diagnostics()[0].rule().id, |_| "accepted")
    }

    #[test]
    fn an_index_that_is_written_again_keeps_what_is_not_ours() {
        let text = r#"{"metadata": {"total_parameters": 2, "total_size": 7}, "x": [1],
            "weight_map": {"b": "2.safetensors", "a": "1.safetensors"}}"#;
        let index = parse(text).unwrap();
        assert_eq!(index.shard_names(), ["1.safetensors", "2.safetensors"]);
        assert_eq!(index.total_size(), TotalSize::Bytes(7));
        let written = index.render(index.weight_map(), 8);
        let expected = "{\n  \"metadata\": {\n    \"total_parameters\": 2,\n    \"total_size\": 8\n  },\n  \"x\": [1],\n  \
            \"weight_map\": {\n    \"b\": \"2.safetensors\",\n    \"a\": \"1.safetensors\"\n  }\n}\n";
        assert_eq!(written, expected);
        assert_eq!(parse(&written).unwrap().render(index.weight_map(), 8), written);
    }

    #[test]
    fn a_shard_is_a_plain_file_name() {
        for shard in ["", ".", "..", "../x", "a/b", "/etc/passwd", "a\\\\b", "C:x", "x/", "x\\u0000", "x\\u001b"] {
            assert_eq!(rule(&format!(r#"{{"weight_map":{{"t":"{shard}"}}}}"#)), "K-003", "{shard}");
        }
        assert_eq!(rule(r#"{"weight_map":{"t":"..model-1.safetensors"}}"#), "accepted");
    }

    #[test]
    fn what_is_wrong_with_an_index_has_a_rule() {
        for text in ["", "[]", "{}", r#"{"weight_map":{}}"#, r#"{"weight_map":3}"#, r#"{"weight_map":{"t":3}}"#, "\u{feff}{}"] {
            assert_eq!(rule(text), "K-002", "{text}");
        }
        assert_eq!(rule(r#"{"weight_map":{"t":"a","\u0074":"b"}}"#), "K-005");
        assert_eq!(rule(r#"{"weight_map":{"t":"a"},"weight_map":{"t":"a"}}"#), "K-005");
        assert_eq!(rule(r#"{"weight_map":{"t":"a","u":"A"}}"#), "K-014");
        let deep = format!(r#"{{"x":{}{},"weight_map":{{"t":"a"}}}}"#, "[".repeat(100_000), "]".repeat(100_000));
        assert_eq!(rule(&deep), "accepted");
    }

    #[test]
    fn a_size_that_is_no_size_is_kept_for_the_message() {
        for odd in ["-1", "\"8\"", "8.0", "1e3", "null"] {
            let index = parse(&format!(r#"{{"metadata":{{"total_size":{odd}}},"weight_map":{{"t":"a"}}}}"#)).unwrap();
            assert_eq!(index.total_size(), TotalSize::Odd(odd.to_owned()));
        }
    }

    #[test]
    fn limits_of_an_index_hold_on_both_sides() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("index");
        let text = r#"{"weight_map":{"t":"a","u":"a"}}"#;
        std::fs::write(&path, text).unwrap();
        let read = |bytes, tensors| {
            let limits = Limits { index_bytes: bytes, tensors, ..Limits::default() };
            ShardIndex::read(&path, &limits).map_or_else(|e| e.diagnostics()[0].rule().id, |_| "accepted")
        };
        let len = text.len() as u64;
        assert_eq!([read(len, 2), read(len - 1, 2), read(len, 1)], ["accepted", "K-013", "K-013"]);
    }
}
