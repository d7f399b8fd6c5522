//! The report of `compare` as text.

use super::super::finish::Compared;
use super::figure::{self, percent_of};
use super::group::{group, labels};
use super::table::{self, Column, WIDTH};
use super::{escape, line, plural};
use crate::report::{CompareReport, ComparedTarget, Overlap};

pub(super) fn text(compared: &Compared) -> String {
    let report = &compared.report;
    let mut text = format!("{}\n", plural(report.targets.len() as u64, "tensor") + " updated by both");
    for (i, path) in report.adapters.iter().enumerate() {
        let only = [&report.only_first, &report.only_second][i].len() as u64;
        let alone = if only > 0 { format!(", and {} more", plural(only, "tensor")) } else { String::new() };
        line(&mut text, if i == 0 { "adapters" } else { "" }, &format!("{}{alone}", escape::inline(path)));
    }
    // In lines of the width of the tables.
    for (i, part) in wrapped(&report.verdict, WIDTH - 15).iter().enumerate() {
        line(&mut text, if i == 0 { "verdict" } else { "" }, part);
    }
    if report.targets.is_empty() {
        return text;
    }
    text.push('\n');
    text.push_str(&beside(report));
    text.push('\n');
    let cost: Vec<String> =
        report.truncation.iter().map(|one| format!("{} {}", one.rank, percent_of(one.error).replace(' ', ""))).collect();
    for (i, part) in wrapped(&cost.join(", "), WIDTH - 15).iter().enumerate() {
        line(&mut text, if i == 0 { "rank, error" } else { "" }, part);
    }
    text.push('\n');
    text.push_str(&targets(report, compared.every_target));
    text
}

/// How a figure is shown.
type Shown = fn(&Overlap) -> String;

/// The whole beside a random adapter.
fn beside(report: &CompareReport) -> String {
    let columns = [Column::Text("together"), Column::Number("found"), Column::Number("of a random one")];
    let rows: [(&str, Shown); 6] = [
        ("cosine", |o| figure::significant(o.cosine, 3)),
        ("signs that differ", |o| percent_of(o.sign_conflict)),
        ("by the cosine alone", |o| percent_of(o.sign_conflict_normal)),
        ("output directions in common", |o| percent_of(o.output_overlap)),
        ("input directions in common", |o| percent_of(o.input_overlap)),
        ("of the second within the first", |o| percent_of(o.redundancy[0])),
    ];
    let rows: Vec<Vec<String>> = rows
        .iter()
        .map(|(what, of)| vec![(*what).to_owned(), of(&report.together), report.control.as_ref().map(of).unwrap_or_default()])
        .collect();
    table::render(&columns, &rows, WIDTH)
}

fn targets(report: &CompareReport, every_target: bool) -> String {
    let with_base = report.targets.iter().any(|target| target.relative.is_some());
    let mut columns = vec![
        Column::Text("target"),
        Column::Text("layers"),
        Column::Number("n"),
        Column::Number("cosine"),
        Column::Number("signs"),
        Column::Number("angle"),
        Column::Number("10 %"),
    ];
    if with_base {
        columns.push(Column::Number("|dW|/|W|"));
    }
    let facts = |target: &ComparedTarget| if every_target { vec![target.tensor.clone()] } else { Vec::new() };
    let groups = group(report.targets.iter().map(|target| (target.tensor.as_str(), facts(target))));
    let rows = groups.iter().zip(labels(&groups)).map(|(group, label)| {
        let of = || group.members.iter().map(|i| &report.targets[*i]);
        let range = |f: &dyn Fn(&ComparedTarget) -> f64, show: &dyn Fn(f64) -> String| figure::range(of().map(f), show);
        let two = |x: f64| format!("{:.2}", x + 0.0);
        let mut row = vec![
            label,
            group.layers(),
            group.members.len().to_string(),
            range(&|t| t.overlap.cosine, &two),
            range(&|t| t.overlap.sign_conflict, &two),
            range(&|t| t.output_angle.min(t.input_angle), &|x| format!("{x:.0}°")),
            range(&|t| t.rank_10 as f64, &|x| format!("{x}")),
        ];
        if with_base {
            let both = of().filter_map(|target| target.relative).flatten();
            row.push(figure::range(both, |x| format!("{}%", figure::significant(100.0 * x, 2))));
        }
        row
    });
    table::render(&columns, &rows.collect::<Vec<_>>(), if every_target { usize::MAX } else { WIDTH })
}

/// A sentence in lines of so many characters.
fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split(' ') {
        match lines.last_mut().filter(|line| line.chars().count() + 1 + word.chars().count() <= width) {
            Some(line) => *line = format!("{line} {word}"),
            None => lines.push(word.to_owned()),
        }
    }
    lines
}
