//! The report of `bake` as text.

use super::{figure, line, plural};
use crate::report::BakeReport;

pub(super) fn text(report: &BakeReport) -> String {
    let mut text = format!("baked {}\n", plural(report.targets, "target"));
    line(&mut text, "input", &report.input);
    line(&mut text, "output", &report.output);
    line(&mut text, "", &figure::bytes(report.bytes));
    line(&mut text, "scale", &format!("{} = alpha {} / rank {}", report.scale, report.alpha, report.rank));
    let changes = [
        (report.padded, "padded with zeros"),
        (report.folded, "with a scale folded into B"),
        (report.retyped, "in another dtype"),
    ];
    let changes: Vec<String> = changes.iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!("{n} {what}")).collect();
    let changes = if changes.is_empty() { "as they were".to_owned() } else { changes.join(", ") };
    line(&mut text, "targets", &changes);
    match &report.worst {
        None => line(&mut text, "error", "none: every update is what it was, bit for bit"),
        Some(worst) => {
            let shown = |error: f64| figure::significant(error, 3);
            let rounded = plural(report.rounded, "target");
            line(&mut text, "error", &format!("{} of the whole update, rounded in {rounded}", shown(report.error)));
            line(&mut text, "", &format!("{} at most, in {}", shown(worst.error), worst.tensor));
        }
    }
    line(&mut text, "content", &report.content);
    line(&mut text, "read by", &report.read_by.join(", "));
    line(&mut text, "not by", &report.not_read_by.join(", "));
    for loss in &report.losses {
        line(&mut text, "lost", &format!("{} [{}]", loss.message, loss.rule));
    }
    text
}
