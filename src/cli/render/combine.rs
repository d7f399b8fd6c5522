//! The report of `combine` as text.

use super::figure::{self, percent_of};
use super::group::{group, labels};
use super::table::{self, Column, WIDTH};
use super::{escape, line, plural};
use crate::report::{CombineReport, CombinedTarget};

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
        text.push_str(&targets(report));
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

fn targets(report: &CombineReport) -> String {
    let columns = [
        Column::Text("target"),
        Column::Text("layers"),
        Column::Number("n"),
        Column::Number("of"),
        Column::Number("ranks"),
        Column::Number("rank"),
        Column::Number("error"),
    ];
    let groups = group(report.targets.iter().map(|target| (target.tensor.as_str(), Vec::new())));
    let rows = groups.iter().zip(labels(&groups)).map(|(group, label)| {
        let range = |f: &dyn Fn(&CombinedTarget) -> f64, show: &dyn Fn(f64) -> String| {
            figure::range(group.members.iter().map(|i| f(&report.targets[*i])), show)
        };
        let whole = |x: f64| format!("{x}");
        vec![
            label,
            group.layers(),
            group.members.len().to_string(),
            range(&|t| t.adapters as f64, &whole),
            range(&|t| t.rank_sum as f64, &whole),
            range(&|t| t.rank as f64, &whole),
            range(&|t| t.error, &percent_of),
        ]
    });
    table::render(&columns, &rows.collect::<Vec<_>>(), WIDTH)
}
