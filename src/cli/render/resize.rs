//! The report of `resize` as text.

use super::figure::{self, percent_of};
use super::{kinds, line, plural};
use crate::report::ResizeReport;

pub(super) fn text(report: &ResizeReport) -> String {
    let mut text = format!("resized {}\n", plural(report.targets.len() as u64, "target"));
    line(&mut text, "input", &report.input);
    line(&mut text, "output", &format!("{} ({})", report.output, report.to));
    let before = figure::count(report.parameters_before);
    line(&mut text, "", &format!("{}, {} values of {before}", figure::bytes(report.bytes), figure::count(report.parameters)));
    line(&mut text, "error", &format!("{} of the whole update, as it is stored", percent_of(report.error)));
    if let Some(room) = report.room {
        line(&mut text, "room", &format!("for rank {room} in vllm"));
    }
    text.push('\n');
    let whole = |x: f64| format!("{x}");
    text.push_str(&kinds::table(
        &report.targets,
        |target| &target.tensor,
        &[("rank", &|t| t.rank as f64, &whole), ("of", &|t| t.rank_before as f64, &whole), ("error", &|t| t.error, &percent_of)],
    ));
    for loss in &report.losses {
        line(&mut text, "lost", &format!("{} [{}]", loss.message, loss.rule));
    }
    text
}
