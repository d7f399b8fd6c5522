//! Errors and warnings as text: what is wrong, where, what to do.
//!
//! ```text
//! error: the update of "x" is (64, 32) but the base has (64, 64)
//!   --> adapter/adapter_model.safetensors: tensor "x", byte 1024 [A-023]
//! help: is this the base that the adapter was trained on?
//! ```

use super::escape::inline;
use crate::report::Note;
use crate::{Error, Limits};

/// All problems of an error, up to the number that is shown.
pub(in super::super) fn error(error: &Error) -> String {
    let notes: Vec<Note> = error.diagnostics().iter().map(Note::from).collect();
    notes_text("error", &notes.iter().collect::<Vec<_>>())
}

/// Warnings.
pub(in super::super) fn warnings(notes: &[&Note]) -> String {
    notes_text("warning", notes)
}

/// A panic.
pub(in super::super) fn bug(message: &str) -> String {
    format!(
        "error: internal error: {}\nhelp: this is a bug in loratool; please report it with the command that you ran\n",
        inline(message)
    )
}

fn notes_text(word: &str, notes: &[&Note]) -> String {
    let limit = Limits::default().problems_shown;
    let mut text = String::new();
    for (i, note) in notes.iter().take(limit).enumerate() {
        text.push_str(&format!("{word}: {}\n  --> {}\n", inline(&note.message), inline(&place(note))));
        // One piece of advice for many problems is given once, after the last of them.
        let next = notes.get(i + 1).filter(|_| i + 1 < limit);
        if let Some(help) = note.help.as_ref().filter(|_| next.is_none_or(|next| next.help != note.help)) {
            text.push_str(&format!("help: {}\n", inline(help)));
        }
    }
    if notes.len() > limit {
        text.push_str(&format!("{word}: and {} more\n", notes.len() - limit));
    }
    text
}

/// `file: tensor "x", byte N [RULE]`, as far as it is known.
fn place(note: &Note) -> String {
    // A tensor that the message quotes is not named twice.
    let tensor = note.tensor.as_ref().map(|t| format!("{t:?}")).filter(|quoted| !note.message.contains(quoted.as_str()));
    let what = if note.file.as_ref().is_some_and(|file| file.ends_with(".json")) { "key" } else { "tensor" };
    let tensor = tensor.map(|quoted| format!("{what} {quoted}"));
    let within: Vec<String> = tensor.into_iter().chain(note.offset.map(|at| format!("byte {at}"))).collect();
    let within = within.join(", ");
    let place = match (&note.file, within.is_empty()) {
        (Some(file), true) => format!("{file} "),
        (Some(file), false) => format!("{file}: {within} "),
        (None, true) => String::new(),
        (None, false) => format!("{within} "),
    };
    format!("{place}[{}]", note.rule)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rules;

    #[test]
    fn an_error_says_what_where_and_what_to_do() {
        let found = Error::new(rules::UNIQUE_NAMES, "the name is there twice")
            .file("a\x1b.st")
            .tensor("x")
            .offset(12)
            .help("save it again");
        let text = "error: the name is there twice\n  --> a\\u{1b}.st: tensor \"x\", byte 12 [C-008]\nhelp: save it again\n";
        assert_eq!(error(&found), text);
        assert_eq!(error(&Error::new(rules::ARGUMENT, "no")), "error: no\n  --> [U-001]\n");
    }

    #[test]
    fn the_same_advice_is_given_once_and_the_rest_is_counted() {
        let one = |i: u32| crate::Diagnostic::new(rules::EVERY_TARGET, format!("missing {i}")).help("look again");
        let text = error(&Error::check((0..53).map(one).collect()).unwrap_err());
        assert_eq!((text.matches("missing").count(), text.matches("help").count()), (50, 1));
        assert!(text.ends_with("help: look again\nerror: and 3 more\n"), "{text}");
    }
}
