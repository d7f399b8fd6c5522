//! Renderings of the reports: text for people, [`json`] for programs. Both take the same value. Text fits in 80 columns where the
//! names in it allow, and whatever comes from a file is escaped on the way.

mod bake;
mod combine;
mod compare;
mod convert;
pub(super) mod escape;
mod eval;
mod extract;
mod figure;
mod group;
mod inspect;
pub(super) mod json;
mod kinds;
mod loader;
mod merge;
mod note;
pub(super) mod plot;
pub(super) mod plot_compare;
mod recover;
mod resize;
mod spectrum;
mod table;
mod unmerge;
mod validate;
mod verify;

use super::finish::Found;

pub(super) use combine::before_writing;
use figure::plural;
pub(super) use note::{bug, error, warnings};

/// The report as text.
pub(super) fn report(found: &Found) -> String {
    let text = match found {
        Found::Inspect(inspected) => inspect::text(inspected),
        Found::Validate(report) => validate::text(report),
        Found::Merge(report) => merge::text(report),
        Found::MergeEach(report) => merge::each(report),
        Found::Digests(report) => verify::digests(report),
        Found::Bake(report) => bake::text(report),
        Found::Resize(report) => resize::text(report),
        Found::Combine(report) => combine::text(report),
        Found::Compare(compared) => compare::text(compared),
        Found::Eval(report) => eval::text(report),
        Found::Predict(report) => eval::predictions(report),
        Found::Extract(report) => extract::text(report),
        Found::Convert(report) => convert::text(report),
        Found::Recover(report) => recover::text(report),
        Found::Unmerge(report) => unmerge::text(report),
        Found::Verify(verified) => verify::text(verified),
    };
    escape::lines(&text)
}

/// A line of a report: what it is about, and what there is to say. A line that begins with a space continues the one before.
fn line(text: &mut String, label: &str, value: &str) {
    text.push_str(format!("  {label:<12} {}", escape::inline(value)).trim_end());
    text.push('\n');
}
