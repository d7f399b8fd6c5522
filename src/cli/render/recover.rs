//! The report of `recover` as text.

use super::{figure, line, plural};
use crate::report::RecoverReport;

pub(super) fn text(report: &RecoverReport) -> String {
    let Some(journal) = &report.journal else {
        return format!("{}: no merge is pending; nothing was done\n", super::escape::inline(&report.path));
    };
    let mut text = String::from("completed the merge\n");
    line(&mut text, "checkpoint", &report.path);
    line(&mut text, "journal", &format!("{journal} (removed)"));
    line(&mut text, "files", &report.files.join(", "));
    line(&mut text, "changed", &plural(report.tensors, "tensor"));
    line(&mut text, "written now", &figure::bytes(report.bytes));
    text
}
