//! The report of `combine` as text.

use super::figure::{self, percent_of};
use super::{escape, kinds, line, plural};
use crate::report::CombineReport;

pub(super) fn text(report: &CombineReport) -> String {
    let count = report.adapters.len() as u64;
    let mut text = format!("combined {} by {}\n", plural(count, "adapter"), report.method);
    for (i, adapter) in report.adapters.iter().enumerate() {
        let weight = figure::significant(adapter.weight, 6);
        let shown = format!("{weight} × {}, {}", escape::inline(&adapter.path), plural(adapter.targets, "target"));
        line(&mut text, if i == 0 { "adapters" } else { "" }, &shown);
    }
    match (&report.output, report.to) {
        (Some(output), Some(to)) => line(&mut text, "output", &format!("{} ({to})", escape::inline(output))),
        _ => line(&mut text, "output", "nothing is written"),
    }
    let values = format!("{} values in {}", figure::count(report.parameters), report.dtype);
    let size = if report.bytes > 0 { format!("{}, {values}", figure::bytes(report.bytes)) } else { values };
    line(&mut text, "", &size);
    line(&mut text, "error", &error(report));
    if report.from_sum != report.error {
        line(&mut text, "", &format!("{} of the plain sum away from it", percent_of(report.from_sum)));
    }
    for note in &report.decided {
        line(&mut text, "parts", &note.message);
    }
    if !report.targets.is_empty() {
        text.push('\n');
        let whole = |x: f64| format!("{x}");
        text.push_str(&kinds::table(
            &report.targets,
            |target| &target.tensor,
            &[
                ("of", &|t| t.adapters as f64, &whole),
                ("ranks", &|t| t.rank_sum as f64, &whole),
                ("rank", &|t| t.rank as f64, &whole),
                ("error", &|t| t.error, &percent_of),
            ],
        ));
    }
    for loss in &report.losses {
        line(&mut text, "lost", &format!("{} [{}]", loss.message, loss.rule));
    }
    text
}

/// What is said before anything is written.
pub(in super::super) fn before_writing(report: &CombineReport) -> String {
    format!("loratool: the error is {}\n", error(report))
}

/// What the stored factors are off by.
fn error(report: &CombineReport) -> String {
    match report.error {
        0.0 => "none: the stored factors hold it without rounding".to_owned(),
        error => format!("{} of the whole update, as it is stored", percent_of(error)),
    }
}
