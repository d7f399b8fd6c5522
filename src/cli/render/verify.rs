//! The report of `verify` as text: the answer, what it rests on, and the tensors that are not as they should be.

use super::super::finish::Verified;
use super::table::{Column, WIDTH, render};
use super::{figure, line, plural};
use crate::report::{DigestReport, Ulps, VerifiedTensor, VerifyReport};

/// Tensors that are listed without `--all`.
const SHOWN: usize = 20;

pub(super) fn text(verified: &Verified) -> String {
    let report = &verified.report;
    let mut text = format!("{}\n", report.says);
    line(&mut text, "checkpoint", &report.merged);
    line(&mut text, "base", &report.base);
    for adapter in &report.adapters {
        line(&mut text, "adapter", &adapter.path);
        line(&mut text, "", &format!("{}, weight {}", adapter.dialect, figure::significant(adapter.weight, 6)));
        if let Some(renaming) = &adapter.renaming {
            line(&mut text, "", &super::merge::renamed(renaming));
        }
    }
    line(&mut text, "read", &read(report));
    if report.sample.is_some() {
        line(&mut text, "", "a sample: a bit that is flipped elsewhere is not seen");
    }
    if let Some(error) = report.tensors.iter().filter_map(|tensor| tensor.gain_error).reduce(f64::max) {
        let gains = figure::range(report.tensors.iter().filter_map(|tensor| tensor.gain), |x| figure::significant(x, 4));
        line(&mut text, "gain", &format!("{gains}, each ± {} or less", figure::significant(error, 1)));
    }
    text.push('\n');
    text.push_str(&distances(&report.ulps));
    text.push_str(&counts(report));
    let limit = if verified.every_tensor { usize::MAX } else { SHOWN };
    text.push_str(&tensors(report, verified.every_tensor, limit));
    text.push_str(&untouched(report, limit));
    text.push_str(&structure(report, limit));
    text
}

/// What was written is what is there.
pub(super) fn digests(report: &DigestReport) -> String {
    let mut text = format!("{} as they were written\n", plural(report.tensors, "tensor"));
    line(&mut text, "checkpoint", &report.path);
    line(&mut text, "read", &figure::bytes(report.bytes));
    line(&mut text, "content", &report.content);
    text
}

fn read(report: &VerifyReport) -> String {
    format!("{} % of {}", figure::percent(report.bytes_compared, report.bytes), figure::bytes(report.bytes))
}

/// How many values lie how far from the correctly rounded ones.
fn distances(ulps: &Ulps) -> String {
    let buckets =
        [("0", ulps.none), ("1", ulps.one), ("2", ulps.two), ("3-4", ulps.to_4), ("5-16", ulps.to_16), ("more", ulps.more)];
    let all = buckets.iter().map(|(_, n)| n).sum();
    let rows: Vec<Vec<String>> = buckets
        .iter()
        .filter(|(name, n)| *n > 0 || *name == "0")
        .map(|(name, n)| vec![(*name).to_owned(), figure::count(*n), figure::percent(*n, all)])
        .collect();
    if all == 0 {
        return String::new();
    }
    render(&[Column::Number("ulp off"), Column::Number("values"), Column::Number("%")], &rows, WIDTH) + "\n"
}

fn counts(report: &VerifyReport) -> String {
    let right = report.tensors.iter().filter(|tensor| tensor.verdict.is_merged()).count() as u64;
    let sampled = if report.sample.is_some() { " where it was read" } else { "" };
    format!(
        "changed tensors: {} of {} as they should be{sampled}\nuntouched tensors: {} of {} the base's{sampled}\n",
        figure::count(right),
        figure::count(report.tensors.len() as u64),
        figure::count(report.untouched.same),
        figure::count(report.untouched.tensors)
    )
}

fn more(all: usize, limit: usize) -> String {
    match all.saturating_sub(limit) {
        0 => String::new(),
        rest => format!("  and {} more: --all lists them\n", figure::count(rest as u64)),
    }
}

/// The tensors that are not as they should be, or all of them; what is wrong stands below each.
fn tensors(report: &VerifyReport, every: bool, limit: usize) -> String {
    let listed: Vec<&VerifiedTensor> = report.tensors.iter().filter(|tensor| every || !tensor.verdict.is_merged()).collect();
    if listed.is_empty() {
        return String::new();
    }
    let number = |x: Option<f64>, digits| x.map(|x| figure::significant(x, digits)).unwrap_or_default();
    let rows = listed.iter().take(limit).map(|tensor| {
        vec![
            tensor.tensor.clone(),
            number(tensor.gain, 4),
            number(tensor.gain_error, 1),
            number(tensor.residual_of_update, 2),
            figure::percent(tensor.ulps.none, tensor.values),
        ]
    });
    let columns = [
        Column::Text("changed"),
        Column::Number("gain"),
        Column::Number("±"),
        Column::Number("rest/dW"),
        Column::Number("right %"),
    ];
    let table = render(&columns, &rows.collect::<Vec<_>>(), WIDTH);
    let mut text = "\n".to_owned();
    for (i, row) in table.lines().enumerate() {
        text.push_str(row);
        text.push('\n');
        if let Some(tensor) = i.checked_sub(1).and_then(|i| listed.get(i)) {
            text.push_str(&said(&tensor.says));
        }
    }
    text + &more(listed.len(), limit)
}

/// A sentence below a row, broken where it would be too long.
fn said(says: &str) -> String {
    let says = super::escape::inline(says);
    let (mut text, mut width) = (String::new(), 0);
    for word in says.split(' ') {
        let columns = word.chars().count() + 1;
        if width == 0 || width + columns > WIDTH {
            text.push_str(if width == 0 { "   " } else { "\n   " });
            width = 3;
        }
        text.push(' ');
        text.push_str(word);
        width += columns;
    }
    text + "\n"
}

fn untouched(report: &VerifyReport, limit: usize) -> String {
    let differ = &report.untouched.differ;
    let rows = differ.iter().take(limit).map(|tensor| {
        let index: Vec<String> = tensor.index.iter().map(u64::to_string).collect();
        vec![
            tensor.tensor.clone(),
            format!("[{}]", index.join(", ")),
            figure::count(tensor.offset),
            figure::count(tensor.differing),
        ]
    });
    let columns = [
        Column::Text("untouched, but differs"),
        Column::Text("first at"),
        Column::Number("byte"),
        Column::Number("bytes that differ"),
    ];
    match differ.len() {
        0 => String::new(),
        all => format!("\n{}{}", render(&columns, &rows.collect::<Vec<_>>(), WIDTH), more(all, limit)),
    }
}

fn structure(report: &VerifyReport, limit: usize) -> String {
    let rows = report.structure.iter().take(limit).map(|finding| {
        let or_none = |form: &Option<String>| form.clone().unwrap_or_else(|| "-".to_owned());
        vec![finding.tensor.clone(), finding.finding.to_owned(), or_none(&finding.expected), or_none(&finding.found)]
    });
    let columns = [Column::Text("tensor"), Column::Text("finding"), Column::Text("expected"), Column::Text("found")];
    match report.structure.len() {
        0 => String::new(),
        all => format!(
            "\n{} not of the expected form\n{}{}",
            plural(all as u64, "tensor"),
            render(&columns, &rows.collect::<Vec<_>>(), WIDTH),
            more(all, limit)
        ),
    }
}
