//! The report of `convert` as text.

use super::{figure, line, plural};
use crate::report::ConvertReport;

pub(super) fn text(report: &ConvertReport) -> String {
    let mut text = format!("converted {} to {}\n", report.from, report.to);
    line(&mut text, "input", &report.input);
    line(&mut text, "output", &report.output);
    let full =
        if report.replacements > 0 { format!(" and {}", plural(report.replacements, "full tensor")) } else { String::new() };
    line(&mut text, "holds", &format!("{}{full}, {}", plural(report.targets, "target"), figure::bytes(report.bytes)));
    line(&mut text, "content", &report.content);
    if report.losses.is_empty() {
        line(&mut text, "lost", "nothing is lost");
    }
    for loss in &report.losses {
        line(&mut text, "lost", &format!("{} [{}]", loss.message, loss.rule));
    }
    text
}
