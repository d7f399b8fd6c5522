//! The command line: arguments as typed (`args`) become a job (`job`), the job runs (`run`) on the library's public API, and what
//! it found is rendered (`render`) as text or JSON. One exit code says whose fault it was; `docs/errors.md` lists them.
//!
//! Relies on the reports of [`crate::report`] for everything that it prints: nothing is computed here that a program could not ask for.

mod args;
mod bug;
mod finish;
mod job;
mod number;
mod output;
mod progress;
mod render;
mod run;
mod run_model;
mod signals;
mod sniff;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser;

use args::Cli;
use finish::{Finished, Style};
use signals::Signals;

/// Runs the command line on the process's arguments.
pub fn main() -> ExitCode {
    let typed: Vec<OsString> = std::env::args_os().collect();
    let code = bug::catch(|| run_typed(&typed)).unwrap_or_else(|message| finish::bug(&message, wants_json(&typed)));
    ExitCode::from(code)
}

fn run_typed(typed: &[OsString]) -> u8 {
    let cli = match Cli::try_parse_from(typed) {
        Ok(cli) => cli,
        Err(error) => return finish::unparsed(&error, wants_json(typed)),
    };
    let style = Style { json: cli.common.json, quiet: cli.common.quiet };
    let verb = cli.verb.name();
    let signals = Signals::watch(cli.verb.on_signal());
    let finished = match job::resolve(cli.verb) {
        Ok(job) => run::run(&job, &signals, style),
        Err(error) => Finished::failed(error),
    };
    finish::present(verb, &finished, style, &signals)
}

/// Whether `--json` was typed, for the cases in which the arguments as a whole were not understood.
fn wants_json(typed: &[OsString]) -> bool {
    typed.iter().skip(1).take_while(|arg| *arg != "--").any(|arg| arg == "--json")
}
