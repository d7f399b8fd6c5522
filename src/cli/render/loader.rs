//! What `validate --for` found out, as text: for each loader a verdict, a table of findings, and the ways out.

use super::plural;
use super::table::{Column, WIDTH, render};
use crate::report::{LoaderFinding, LoaderReport};

pub(super) fn text(report: &LoaderReport) -> String {
    let mut text = format!("\n{} {}: {}\n", report.title, report.version, verdict(report));
    if report.findings.is_empty() {
        return text;
    }
    let columns = [Column::Text("effect"), Column::Text("what"), Column::Number("n"), Column::Text("first")];
    let rows: Vec<Vec<String>> = report.findings.iter().map(row).collect();
    text.push_str(&render(&columns, &rows, WIDTH));
    for (way_out, of) in ways(&report.findings) {
        text.push_str(&wrapped(&format!("{way_out} ({})", of.join("; "))));
    }
    if report.findings.iter().any(|finding| finding.basis == "concluded") {
        text.push_str("  (?) concluded from its source, and not tried\n");
    }
    text
}

fn verdict(report: &LoaderReport) -> String {
    let count = |effect: &str| report.findings.iter().filter(|finding| finding.effect == effect).count() as u64;
    let wrong = report.findings.iter().filter(|finding| finding.wrong).count() as u64;
    match (count("refused"), wrong) {
        (0, 0) if report.findings.is_empty() => "nothing is known against it".to_owned(),
        (0, 0) if count("not known") > 0 => "nothing is known against it, but not all is known".to_owned(),
        (0, 0) => "reads it".to_owned(),
        (0, n) => format!("reads it WRONG: {}", plural(n, "finding")),
        (n, _) => format!("REFUSES it: {}", plural(n, "finding")),
    }
}

fn row(finding: &LoaderFinding) -> Vec<String> {
    let doubt = if finding.basis == "concluded" { " (?)" } else { "" };
    let count = if finding.targets > 0 { finding.targets.to_string() } else { String::new() };
    let first = finding.first.as_deref().unwrap_or_default();
    vec![finding.effect.to_owned() + doubt, finding.what.to_owned(), count, first.to_owned()]
}

/// Each way out once, with what it is the way out of.
fn ways(findings: &[LoaderFinding]) -> Vec<(&str, Vec<&str>)> {
    let mut ways: Vec<(&str, Vec<&str>)> = Vec::new();
    for finding in findings {
        match ways.iter_mut().find(|(way_out, _)| *way_out == finding.way_out) {
            Some((_, of)) => of.push(finding.what),
            None => ways.push((&finding.way_out, vec![finding.what])),
        }
    }
    ways
}

/// A line that begins with an arrow, broken at spaces.
fn wrapped(sentence: &str) -> String {
    let sentence = super::escape::inline(sentence);
    let mut text = String::from("  ->");
    let mut column = 4;
    for word in sentence.split(' ') {
        let length = word.chars().count();
        if column + 1 + length > WIDTH && column > 4 {
            text.push_str("\n    ");
            column = 4;
        }
        text.push(' ');
        text.push_str(word);
        column += 1 + length;
    }
    text.push('\n');
    text
}
