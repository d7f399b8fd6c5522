//! The JSON protocol: one object per run, described member by member in `docs/json.md`. Members are added, never renamed or removed,
//! within one schema number.

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::super::finish::{Finished, Found, Inspected};
use super::escape;
use crate::report::Note;
use crate::{Class, Error, rules};

/// The number that changes when a member changes its meaning.
const SCHEMA: u32 = 1;

/// What a command found, and what is wrong.
pub(in super::super) fn object(verb: Option<&str>, finished: &Finished, exit_code: u8) -> String {
    let mut object = envelope(verb);
    match &finished.found {
        Some(Found::Inspect(Inspected { report, fit, spectrum, .. })) => {
            object.insert("report".to_owned(), value(report));
            if let Some(spectrum) = spectrum {
                object.insert("spectrum".to_owned(), value(spectrum));
            }
            if let Some(fit) = fit {
                object.insert("fit".to_owned(), value(fit));
            }
        }
        Some(Found::Validate(report)) => drop(object.insert("report".to_owned(), value(report))),
        Some(Found::Merge(report)) => drop(object.insert("report".to_owned(), value(report))),
        Some(Found::MergeEach(report)) => drop(object.insert("report".to_owned(), value(report))),
        Some(Found::Digests(report)) => drop(object.insert("report".to_owned(), value(report))),
        Some(Found::Recover(report)) => drop(object.insert("report".to_owned(), value(report))),
        Some(Found::Unmerge(report)) => drop(object.insert("report".to_owned(), value(report))),
        Some(Found::Bake(report)) => drop(object.insert("report".to_owned(), value(report))),
        Some(Found::Combine(report)) => drop(object.insert("report".to_owned(), value(report))),
        Some(Found::Compare(compared)) => drop(object.insert("report".to_owned(), value(&compared.report))),
        Some(Found::Eval(report)) => drop(object.insert("report".to_owned(), value(report))),
        Some(Found::Predict(report)) => drop(object.insert("report".to_owned(), value(report))),
        Some(Found::Resize(report)) => drop(object.insert("report".to_owned(), value(report))),
        Some(Found::Extract(report)) => drop(object.insert("report".to_owned(), value(report))),
        Some(Found::Convert(report)) => drop(object.insert("report".to_owned(), value(report))),
        Some(Found::Verify(verified)) => drop(object.insert("report".to_owned(), value(&verified.report))),
        None => {}
    }
    if let Some(error) = &finished.error {
        let problems: Vec<Note> = error.diagnostics().iter().map(Note::from).collect();
        object.insert("error".to_owned(), failure(error.class().name(), exit_code, &problems));
    }
    finish(object)
}

/// Arguments that make no command: the first paragraph of what the parser says, and its tip if it has one.
pub(in super::super) fn usage(said: &str) -> String {
    let mut paragraphs = said.split("\n\n").map(|paragraph| paragraph.split_whitespace().collect::<Vec<_>>().join(" "));
    let message = paragraphs.next().unwrap_or_default();
    let tip = paragraphs.find_map(|paragraph| paragraph.strip_prefix("tip: ").map(str::to_owned));
    let error = Error::new(rules::ARGUMENT, message.trim_start_matches("error: "));
    let error = error.help(tip.unwrap_or_else(|| "see loratool --help".to_owned()));
    object(None, &Finished::failed(error), Class::Usage.exit_code())
}

/// A panic.
pub(in super::super) fn bug(message: &str) -> String {
    let problem = json!({"rule": Value::Null, "message": message, "file": null, "tensor": null, "offset": null, "help": "please report it"});
    let mut object = envelope(None);
    let error = json!({"class": "internal", "exit_code": super::super::bug::EXIT_CODE, "problems": [problem]});
    object.insert("error".to_owned(), error);
    finish(object)
}

fn envelope(verb: Option<&str>) -> Map<String, Value> {
    let mut object = Map::new();
    object.insert("loratool".to_owned(), json!({"schema": SCHEMA, "version": env!("CARGO_PKG_VERSION")}));
    object.insert("verb".to_owned(), json!(verb));
    object
}

fn failure(class: &str, exit_code: u8, problems: &[Note]) -> Value {
    json!({"class": class, "exit_code": exit_code, "problems": problems})
}

/// Reports hold strings, numbers and lists of them, which always have a JSON form. A number that is not finite is `null`.
fn value(report: &impl Serialize) -> Value {
    serde_json::to_value(report).unwrap_or(Value::Null)
}

fn finish(object: Map<String, Value>) -> String {
    escape::json(&Value::Object(object).to_string()) + "\n"
}
