//! The report of `validate` as text: the checks, then the verdict.

use super::plural;
use super::table::{Column, render};
use crate::report::ValidateReport;

pub(super) fn text(report: &ValidateReport) -> String {
    let mut text = format!("{}: {}\n", super::escape::inline(&report.path), with_article(report.kind));
    let rows: Vec<Vec<String>> =
        report.checks.iter().map(|check| vec![check.name.to_owned(), check.outcome.to_owned(), check.detail.clone()]).collect();
    text.push_str(&render(&[Column::Text("check"), Column::Text("outcome"), Column::Text("found")], &rows, usize::MAX));
    let passed = report.checks.iter().filter(|check| check.outcome == "ok").count() as u64;
    text.push_str(&format!("valid: {} passed", plural(passed, "check")));
    let unchecked: Vec<&str> = report.checks.iter().filter(|check| check.outcome != "ok").map(|check| check.name).collect();
    if !unchecked.is_empty() {
        text.push_str(&format!(", nothing to check for {}", unchecked.join(", ")));
    }
    if !report.warnings.is_empty() {
        text.push_str(&format!(", {}", plural(report.warnings.len() as u64, "warning")));
    }
    text.push('\n');
    report.loaders.iter().for_each(|loader| text.push_str(&super::loader::text(loader)));
    text
}

fn with_article(kind: &str) -> String {
    if kind.starts_with('a') { format!("an {kind}") } else { format!("a {kind}") }
}
