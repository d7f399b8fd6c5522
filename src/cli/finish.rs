//! The end of a command: what was found goes to standard output, what is wrong or worth saying to standard error, and one exit code
//! says which it was. With `--json` all of it is one object on standard output.

use std::io::IsTerminal;

use clap::error::ErrorKind;
use serde::Serialize;

use super::bug;
use super::output;
use super::render::{self, escape, json};
use super::signals::Signals;
use crate::report::{
    BakeReport, CombineReport, CompareReport, ConvertReport, DigestReport, EvalReport, ExtractReport, InspectReport,
    MergeEachReport, MergeReport, Note, PredictReport, RecoverReport, ResizeReport, SpectrumReport, UnmergeReport,
    ValidateReport, VerifyReport,
};
use crate::{Class, Error, Renaming};

/// How a command speaks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Style {
    pub json: bool,
    pub quiet: bool,
}

impl Style {
    /// A progress bar is for people who watch, on a terminal that can clear a line.
    pub(super) fn shows_progress(self) -> bool {
        let dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
        !self.json && !self.quiet && !dumb && std::io::stderr().is_terminal()
    }
}

/// What a command found. Usually there is a report or an error; an adapter that was inspected but does not fit has both, and so has
/// a checkpoint that is not the merge that it was verified to be.
#[derive(Debug)]
pub(super) struct Finished {
    pub found: Option<Found>,
    pub error: Option<Error>,
}

impl Finished {
    pub(super) fn found(found: Found) -> Self {
        Finished { found: Some(found), error: None }
    }

    pub(super) fn failed(error: Error) -> Self {
        Finished { found: None, error: Some(error) }
    }
}

/// The report of a verb.
#[derive(Debug)]
pub(super) enum Found {
    Inspect(Inspected),
    Validate(ValidateReport),
    Merge(MergeReport),
    MergeEach(MergeEachReport),
    Digests(DigestReport),
    Bake(BakeReport),
    Convert(ConvertReport),
    Extract(ExtractReport),
    Resize(ResizeReport),
    Combine(CombineReport),
    Compare(Compared),
    Eval(EvalReport),
    Predict(PredictReport),
    Recover(RecoverReport),
    Unmerge(UnmergeReport),
    Verify(Verified),
}

/// What `verify` found.
#[derive(Debug)]
pub(super) struct Verified {
    pub report: VerifyReport,
    /// Text lists every tensor. JSON always does.
    pub every_tensor: bool,
}

/// What `compare` found.
#[derive(Debug)]
pub(super) struct Compared {
    pub report: CompareReport,
    /// Text lists every tensor. JSON always does.
    pub every_target: bool,
}

/// What `inspect` found.
#[derive(Debug)]
pub(super) struct Inspected {
    pub report: InspectReport,
    /// How the adapter fits a base, if one was given.
    pub fit: Option<Fit>,
    /// The singular values of its updates, if they were asked for.
    pub spectrum: Option<SpectrumReport>,
    /// Text lists every target on its own. JSON always does.
    pub every_target: bool,
}

/// How an inspected adapter fits a base.
#[derive(Debug, Serialize)]
pub(super) struct Fit {
    /// The base, as given.
    pub base: String,
    /// `model_type` of the base, if it says so.
    pub model_type: Option<String>,
    /// Base tensors that the adapter changes.
    pub tensors: u64,
    /// Adapter tensors that a flag leaves out.
    pub ignored: u64,
    /// The prefix that the adapter's names have and the one that the base has instead, if they differ.
    pub renaming: Option<Renaming>,
    /// `verified` if the adapter names the structure of this base, `unverified` if it names none.
    pub structure: &'static str,
    /// What is worth saying about the two together.
    pub warnings: Vec<Note>,
}

impl Found {
    /// Every warning of the report, in order.
    pub(super) fn warnings(&self) -> Vec<&Note> {
        match self {
            Found::Inspect(Inspected { report, fit, .. }) => {
                let own = match report {
                    InspectReport::Adapter(report) => &report.warnings,
                    InspectReport::Checkpoint(report) => &report.warnings,
                };
                own.iter().chain(fit.iter().flat_map(|fit| &fit.warnings)).collect()
            }
            Found::Validate(report) => report.warnings.iter().collect(),
            Found::Merge(report) => report.warnings.iter().collect(),
            Found::MergeEach(report) => report.merges.iter().flat_map(|merge| &merge.warnings).collect(),
            Found::Digests(report) => report.warnings.iter().collect(),
            Found::Unmerge(report) => report.warnings.iter().collect(),
            Found::Bake(report) => report.warnings.iter().collect(),
            Found::Resize(report) => report.warnings.iter().collect(),
            Found::Combine(report) => report.warnings.iter().collect(),
            Found::Compare(compared) => compared.report.warnings.iter().collect(),
            Found::Eval(report) => report.warnings.iter().collect(),
            Found::Predict(report) => report.warnings.iter().collect(),
            Found::Extract(report) => report.warnings.iter().collect(),
            Found::Convert(report) => report.warnings.iter().collect(),
            Found::Recover(_) => Vec::new(),
            Found::Verify(verified) => verified.report.warnings.iter().collect(),
        }
    }
}

/// Prints what a command found and gives its exit code.
pub(super) fn present(verb: &'static str, finished: &Finished, style: Style, signals: &Signals) -> u8 {
    let code = finished.error.as_ref().map_or(0, |error| exit_code(error, signals));
    let text = match (&finished.found, style) {
        (_, Style { json: true, .. }) => json::object(Some(verb), finished, code),
        (Some(found), Style { quiet: false, .. }) => render::report(found),
        _ => String::new(),
    };
    let printed = output::print(&text);
    if !style.json {
        output::eprint(&finished.found.as_ref().map(|found| render::warnings(&found.warnings())).unwrap_or_default());
        output::eprint(&finished.error.as_ref().map(render::error).unwrap_or_default());
    }
    match printed {
        Ok(()) => code,
        Err(error) => {
            output::eprint(&render::error(&error));
            if code == 0 { error.class().exit_code() } else { code }
        }
    }
}

fn exit_code(error: &Error, signals: &Signals) -> u8 {
    let of_class = error.class().exit_code();
    if error.class() == Class::Interrupted { signals.exit_code().unwrap_or(of_class) } else { of_class }
}

/// Help, the version, and arguments that make no command.
pub(super) fn unparsed(error: &clap::Error, as_json: bool) -> u8 {
    let text = escape::lines(&error.render().to_string());
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => match output::print(&text) {
            Ok(()) => 0,
            Err(error) => {
                output::eprint(&render::error(&error));
                error.class().exit_code()
            }
        },
        _ if as_json => print_failure(&json::usage(&text), Class::Usage.exit_code()),
        _ => {
            output::eprint(&text);
            Class::Usage.exit_code()
        }
    }
}

/// A panic.
pub(super) fn bug(message: &str, as_json: bool) -> u8 {
    output::eprint(&render::bug(message));
    if as_json { print_failure(&json::bug(message), bug::EXIT_CODE) } else { bug::EXIT_CODE }
}

fn print_failure(text: &str, code: u8) -> u8 {
    if let Err(error) = output::print(text) {
        output::eprint(&render::error(&error));
    }
    code
}
