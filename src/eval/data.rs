//! Rows of data: a JSON object on each line, or a table with a header. A row is a map from names to texts, numbers and lists; what a task needs of
//! it is asked for by name, and what is missing is told with its line.

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::io::read_small;
use crate::rules;

/// Bytes of the longest file that is read.
const LIMIT: u64 = 1 << 30;

/// One row.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// The line that it stands on, from 1.
    pub line: u64,
    members: Map<String, Value>,
}

/// Rows, and where they are from.
#[derive(Debug, Clone, PartialEq)]
pub struct Data {
    /// For messages.
    pub label: String,
    /// In the order of the file.
    pub rows: Vec<Row>,
}

impl Data {
    /// Reads a `.csv` as a table with a header, and anything else as JSON Lines.
    ///
    /// # Errors
    /// `E-001`; `U-012` for a line that is no object, a table whose lines are not as long as its header, or no row at all.
    pub fn open(path: &Path) -> Result<Self> {
        let refuse = |message: String| Error::new(rules::DATA, message).file(path);
        let bytes = read_small(path, LIMIT)?.ok_or_else(|| refuse(format!("it is longer than {LIMIT} bytes")))?;
        let is_table = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("csv"));
        let rows = if is_table { table(&bytes) } else { lines(&bytes) }.map_err(refuse)?;
        if rows.is_empty() {
            return Err(refuse("there is no row in it".to_owned()));
        }
        Ok(Data { label: path.display().to_string(), rows })
    }

    /// One row of texts that were not in a file.
    pub fn of(members: &[(&str, &str)]) -> Self {
        let members = members.iter().map(|(name, text)| ((*name).to_owned(), Value::from(*text))).collect();
        Data { label: "the command line".to_owned(), rows: vec![Row { line: 1, members }] }
    }

    /// The error for a row.
    pub(super) fn refuse(&self, row: &Row, message: &str) -> Error {
        Error::new(rules::DATA, format!("line {}: {message}", row.line)).file(&self.label)
    }
}

impl Row {
    /// A value, if the row has one that is not null.
    pub(super) fn get(&self, name: &str) -> Option<&Value> {
        self.members.get(name).filter(|value| !value.is_null())
    }

    /// A text that must be there.
    pub(super) fn text<'r>(&'r self, data: &Data, name: &str) -> Result<&'r str> {
        match self.get(name) {
            Some(Value::String(text)) => Ok(text),
            Some(other) => Err(data.refuse(self, &format!("{name:?} is {other}, and not a text"))),
            None => {
                let has: Vec<String> = self.members.keys().map(|name| format!("{name:?}")).collect();
                let message = format!("there is no {name:?}; the row has {}", has.join(", "));
                Err(data.refuse(self, &message).help("rename the member, or choose the --task that the data is for"))
            }
        }
    }
}

fn lines(bytes: &[u8]) -> Result<Vec<Row>, String> {
    let text = std::str::from_utf8(bytes).map_err(|error| format!("it is no UTF-8 from byte {} on", error.valid_up_to()))?;
    let lines = text.lines().zip(1..).filter(|(line, _)| !line.trim().is_empty());
    let row = |(text, line): (&str, u64)| match serde_json::from_str(text) {
        Ok(members) => Ok(Row { line, members }),
        Err(error) => Err(format!("line {line} is no JSON object: {error}")),
    };
    lines.map(row).collect()
}

fn table(bytes: &[u8]) -> Result<Vec<Row>, String> {
    let mut reader = csv::Reader::from_reader(bytes);
    let header = reader.headers().map_err(|error| error.to_string())?.clone();
    let mut rows = Vec::new();
    for record in reader.records() {
        let record = record.map_err(|error| error.to_string())?;
        let line = record.position().map_or(0, csv::Position::line);
        let members = header.iter().zip(&record).map(|(name, text)| (name.trim().to_owned(), Value::from(text))).collect();
        rows.push(Row { line, members });
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_is_no_object_is_named() {
        let error = lines(b"{\"text\": \"one\"}\n\n[1]\n").unwrap_err();
        assert!(error.starts_with("line 3 is no JSON object"), "{error}");
    }

    #[test]
    fn a_table_keeps_quoted_commas_and_tells_lines() {
        let rows = table(b"text,label\n\"a, b\",1\n\"c\nd\",0\n").unwrap();
        let texts: Vec<_> = rows.iter().map(|row| row.get("text").and_then(Value::as_str).unwrap()).collect();
        assert_eq!(texts, ["a, b", "c\nd"]);
        assert_eq!((rows[0].line, rows[1].line), (2, 3));
        assert!(table(b"text,label\nonly one\n").is_err());
    }

    #[test]
    fn what_a_row_lacks_is_told_with_what_it_has() {
        let data = Data::of(&[("sentence", "x")]);
        let error = data.rows[0].text(&data, "text").unwrap_err().to_string();
        assert!(error.contains("no \"text\"") && error.contains("\"sentence\""), "{error}");
    }
}
