//! The report of `unmerge` as text.

use super::{figure, line, plural};
use crate::report::UnmergeReport;
use crate::report::text::count;

pub(super) fn text(report: &UnmergeReport) -> String {
    let mut text = format!("unmerged by {}{}\n", report.by, if report.in_place { ", in place" } else { "" });
    line(&mut text, "checkpoint", &report.merged);
    if !report.in_place {
        line(&mut text, "output", &report.output);
    }
    line(&mut text, "written", &figure::bytes(report.bytes));
    line(&mut text, "put back", &plural(report.tensors, "tensor"));
    if report.exact {
        line(&mut text, "exact", "every value is what it was before the merge");
        return text;
    }
    let share = 100.0 * report.certain as f64 / report.values.max(1) as f64;
    let counted = format!("{} of {} values ({share:.2} %)", count(report.certain), count(report.values));
    line(&mut text, "NOT exact", &format!("{counted} are certain"));
    line(&mut text, "", "to be what they were, if the merge rounded once");
    if let Some(bound) = report.error_bound {
        line(&mut text, "error", &format!("at most {} of the weights' norm", figure::significant(bound, 3)));
    }
    text
}
