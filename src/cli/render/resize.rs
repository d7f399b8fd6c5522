//! The report of `resize` as text.

use super::figure::{self, percent_of};
use super::group::{group, labels};
use super::table::{self, Column, WIDTH};
use super::{line, plural};
use crate::report::{ResizeReport, ResizedTarget};

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
    let columns = [
        Column::Text("target"),
        Column::Text("layers"),
        Column::Number("n"),
        Column::Number("rank"),
        Column::Number("of"),
        Column::Number("error"),
    ];
    let groups = group(report.targets.iter().map(|target| (target.tensor.as_str(), Vec::new())));
    let rows = groups.iter().zip(labels(&groups)).map(|(group, label)| {
        let range = |f: &dyn Fn(&ResizedTarget) -> f64, show: &dyn Fn(f64) -> String| {
            figure::range(group.members.iter().map(|i| f(&report.targets[*i])), show)
        };
        let whole = |x: f64| format!("{x}");
        vec![
            label,
            group.layers(),
            group.members.len().to_string(),
            range(&|t| t.rank as f64, &whole),
            range(&|t| t.rank_before as f64, &whole),
            range(&|t| t.error, &percent_of),
        ]
    });
    text.push_str(&table::render(&columns, &rows.collect::<Vec<_>>(), WIDTH));
    for loss in &report.losses {
        line(&mut text, "lost", &format!("{} [{}]", loss.message, loss.rule));
    }
    text
}
