//! Errors by who is at fault, each with its place. An [`Error`] is one word wide, opaque outside and rich inside: a class (which
//! decides the exit code), and one or more [`Diagnostic`]s, because a plan reports everything that is wrong at once.
//! A warning is the same [`Diagnostic`] in a report instead of in an error. Nothing here prints.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::rules::Rule;

/// `Result` with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Who is at fault; decides the exit code of the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Class {
    /// The question was answered "no" (exit 1).
    Negative,
    /// The caller: arguments that cannot be carried out (exit 2).
    Usage,
    /// One file breaks the rules of its own format (exit 3).
    Format,
    /// Valid files that do not fit together, or a method that is not applied exactly (exit 4).
    Mismatch,
    /// Values: not finite, overflow (exit 5).
    Numeric,
    /// The environment: missing files, disks, permissions (exit 6).
    Io,
    /// Policy: a limit was reached (exit 7).
    Limit,
    /// Someone else holds the output (exit 8).
    Busy,
    /// Bytes that are not the ones that a digest names (exit 9).
    Integrity,
    /// A signal ended the run after cleaning up (exit 130 or 143).
    Interrupted,
}

impl Class {
    /// The exit code of the command line for this class. `Interrupted` maps to 130; the command line turns it into
    /// 128 + signal number.
    pub fn exit_code(self) -> u8 {
        match self {
            Class::Negative => 1,
            Class::Usage => 2,
            Class::Format => 3,
            Class::Mismatch => 4,
            Class::Numeric => 5,
            Class::Io => 6,
            Class::Limit => 7,
            Class::Busy => 8,
            Class::Integrity => 9,
            Class::Interrupted => 130,
        }
    }

    /// The name of the class in JSON output.
    pub fn name(self) -> &'static str {
        match self {
            Class::Negative => "negative",
            Class::Usage => "usage",
            Class::Format => "format",
            Class::Mismatch => "mismatch",
            Class::Numeric => "numeric",
            Class::Io => "io",
            Class::Limit => "limit",
            Class::Busy => "busy",
            Class::Integrity => "integrity",
            Class::Interrupted => "interrupted",
        }
    }
}

/// Where something is wrong. Every part is optional; what is known is filled in.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Place {
    /// The file, as the caller named it.
    pub file: Option<PathBuf>,
    /// The tensor, or the key of a JSON file, as written there.
    pub tensor: Option<String>,
    /// Byte offset from the start of the file.
    pub offset: Option<u64>,
}

/// One thing that is wrong, or worth a warning: rule, place, what happened, what to do.
#[derive(Debug, Clone, PartialEq)]
pub struct Diagnostic {
    rule: &'static Rule,
    message: String,
    place: Place,
    help: Option<String>,
}

impl Diagnostic {
    /// A diagnostic of `rule`. The message is lower case, without a full stop, and says what was found.
    #[cold]
    pub fn new(rule: &'static Rule, message: impl Into<String>) -> Self {
        Diagnostic { rule, message: message.into(), place: Place::default(), help: None }
    }

    /// Names the file.
    #[must_use]
    pub fn file(mut self, file: impl AsRef<Path>) -> Self {
        self.place.file = Some(file.as_ref().to_path_buf());
        self
    }

    /// Names the tensor or JSON key.
    #[must_use]
    pub fn tensor(mut self, tensor: impl Into<String>) -> Self {
        self.place.tensor = Some(tensor.into());
        self
    }

    /// States the byte offset from the start of the file.
    #[must_use]
    pub fn offset(mut self, offset: u64) -> Self {
        self.place.offset = Some(offset);
        self
    }

    /// Says what to do.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// The rule that was broken.
    pub fn rule(&self) -> &'static Rule {
        self.rule
    }

    /// What was found.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// Where.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// What to do about it, if the tool knows.
    pub fn help_text(&self) -> Option<&str> {
        self.help.as_deref()
    }
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(file) = &self.place.file {
            write!(f, "{}: ", file.display().to_string().escape_debug())?;
        }
        f.write_str(&self.message)?;
        if let Some(offset) = self.place.offset {
            write!(f, " (byte {offset})")?;
        }
        write!(f, " [{}]", self.rule.id)
    }
}

/// What went wrong: a class and at least one [`Diagnostic`].
///
/// ```
/// let err = loratool::open_checkpoint("no/such/model").unwrap_err();
/// assert_eq!(err.class().exit_code(), 6);
/// assert!(err.to_string().contains("no/such/model"));
/// ```
pub struct Error(Box<Inner>);

struct Inner {
    class: Class,
    diagnostics: Vec<Diagnostic>,
    source: Option<std::io::Error>,
}

impl Error {
    /// An error of one diagnostic, with the class of its rule.
    #[cold]
    pub fn new(rule: &'static Rule, message: impl Into<String>) -> Self {
        Diagnostic::new(rule, message).into()
    }

    /// All of `diagnostics` as one error, or `Ok` if there are none. The class is that of the first.
    pub fn check(diagnostics: Vec<Diagnostic>) -> Result<()> {
        match diagnostics.first() {
            None => Ok(()),
            Some(first) => {
                let class = first.rule.class;
                Err(Error(Box::new(Inner { class, diagnostics, source: None })))
            }
        }
    }

    fn edit(mut self, edit: impl FnOnce(Diagnostic) -> Diagnostic) -> Self {
        if let Some(last) = self.0.diagnostics.pop() {
            self.0.diagnostics.push(edit(last));
        }
        self
    }

    /// Names the file.
    #[must_use]
    pub fn file(self, file: impl AsRef<Path>) -> Self {
        self.edit(|d| d.file(file))
    }

    /// Names the tensor or JSON key.
    #[must_use]
    pub fn tensor(self, tensor: impl Into<String>) -> Self {
        self.edit(|d| d.tensor(tensor))
    }

    /// States the byte offset from the start of the file.
    #[must_use]
    pub fn offset(self, offset: u64) -> Self {
        self.edit(|d| d.offset(offset))
    }

    /// Says what to do.
    #[must_use]
    pub fn help(self, help: impl Into<String>) -> Self {
        self.edit(|d| d.help(help))
    }

    /// Overrides the class that the rule gives.
    #[must_use]
    pub fn class_of(mut self, class: Class) -> Self {
        self.0.class = class;
        self
    }

    /// Attaches the operating system's error as the cause.
    #[must_use]
    pub fn because(mut self, source: std::io::Error) -> Self {
        self.0.source = Some(source);
        self
    }

    /// Who is at fault.
    pub fn class(&self) -> Class {
        self.0.class
    }

    /// Everything that is wrong; never empty.
    pub fn diagnostics(&self) -> &[Diagnostic] {
        &self.0.diagnostics
    }

    /// Where the first thing is wrong.
    pub fn place(&self) -> &Place {
        static NOWHERE: Place = Place { file: None, tensor: None, offset: None };
        self.0.diagnostics.first().map_or(&NOWHERE, |d| &d.place)
    }

    /// The diagnostics by value, for collecting the problems of several steps into one report.
    pub fn into_diagnostics(self) -> Vec<Diagnostic> {
        self.0.diagnostics
    }
}

/// Collects what is wrong, up to a number that a person can read; the rest is counted, so that a file of a million mistakes costs no
/// more memory than one of fifty.
#[derive(Debug)]
pub(crate) struct Problems {
    shown: Vec<Diagnostic>,
    limit: usize,
    more: usize,
}

impl Problems {
    /// Keeps at most `limit` of them.
    pub(crate) fn new(limit: usize) -> Self {
        Problems { shown: Vec::new(), limit: limit.max(1), more: 0 }
    }

    /// Adds a problem; `make` is called only if it will be shown.
    pub(crate) fn push(&mut self, make: impl FnOnce() -> Diagnostic) {
        if self.shown.len() < self.limit { self.shown.push(make()) } else { self.more += 1 }
    }

    /// All of them as one error, or `Ok` if there are none.
    pub(crate) fn check(mut self) -> Result<()> {
        if let (Some(last), 1..) = (self.shown.last(), self.more) {
            let rest = Diagnostic { message: format!("and {} more", self.more), help: None, ..last.clone() };
            self.shown.push(rest);
        }
        Error::check(self.shown)
    }
}

impl From<Diagnostic> for Error {
    fn from(diagnostic: Diagnostic) -> Self {
        let class = diagnostic.rule.class;
        Error(Box::new(Inner { class, diagnostics: vec![diagnostic], source: None }))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, diagnostic) in self.0.diagnostics.iter().enumerate() {
            if i > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{diagnostic}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Error")
            .field("class", &self.0.class)
            .field("diagnostics", &self.0.diagnostics)
            .field("source", &self.0.source)
            .finish()
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_ref().map(|e| e as _)
    }
}
