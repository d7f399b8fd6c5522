//! The report of `extract` as text.

use super::figure::{self, percent_of};
use super::group::group;
use super::table::{self, Column, WIDTH};
use super::{line, plural};
use crate::report::{ExtractReport, ExtractedTarget, RestTensor};

/// Rows of a list that are shown; JSON has all.
const SHOWN: usize = 8;

pub(super) fn text(report: &ExtractReport) -> String {
    let mut text = format!("extracted {}\n", plural(report.targets.len() as u64, "target"));
    line(&mut text, "base", report.base.as_deref().unwrap_or("none: the weights themselves are factorised"));
    line(&mut text, "tuned", &report.tuned);
    if let Some((from, to)) = &report.renamed {
        let side = |prefix: &str| if prefix.is_empty() { "no prefix".to_owned() } else { format!("{prefix:?}") };
        line(&mut text, "", &format!("names have {} there, {} in the base", side(from), side(to)));
    }
    line(&mut text, "output", &format!("{} ({}, {})", report.output, report.to, report.dtype));
    line(&mut text, "", &format!("{}, {} values in factors", figure::bytes(report.bytes), figure::count(report.parameters)));
    let shown = |x: f64| figure::significant(x, 3);
    line(&mut text, "error", &format!("{} of the change of the targets, as it is stored", percent_of(report.error)));
    let weighted = report
        .targets
        .iter()
        .filter_map(|target| target.weighted_error)
        .fold(None, |most: Option<f64>, x| Some(most.map_or(x, |most| most.max(x))));
    if let Some(weighted) = weighted {
        line(&mut text, "", &format!("of the outputs, which --act-stats makes small, up to {}", percent_of(weighted)));
    }
    match report.excess {
        0.0 => line(&mut text, "excess", "none: before rounding the least that these ranks allow, as far as f32 tells"),
        excess => {
            line(&mut text, "excess", &format!("before rounding about {} above the least for these ranks", percent_of(excess)))
        }
    }
    line(&mut text, "left out", &format!("{} of the square of all that changed", percent_of(report.lost)));
    line(&mut text, "change", &format!("{} (Frobenius norm of all of it)", shown(report.change)));
    line(&mut text, "unchanged", &plural(report.unchanged, "tensor"));
    if !report.targets.is_empty() {
        text.push('\n');
        text.push_str(&targets(&report.targets));
    }
    if !report.omitted.is_empty() {
        text.push('\n');
        text.push_str(&omitted(report));
    }
    if !report.rest.is_empty() {
        text.push('\n');
        text.push_str(&rest(&report.rest));
    }
    for loss in &report.losses {
        line(&mut text, "lost", &format!("{} [{}]", loss.message, loss.rule));
    }
    text
}

/// By kind of layer.
fn targets(targets: &[ExtractedTarget]) -> String {
    let columns = [
        Column::Text("target"),
        Column::Text("layers"),
        Column::Number("n"),
        Column::Number("rank"),
        Column::Number("|D|/|W|"),
        Column::Number("error"),
        Column::Number("excess"),
        Column::Text("method"),
    ];
    let groups = group(targets.iter().map(|target| (target.tensor.as_str(), Vec::new())));
    let labels = super::group::labels(&groups);
    let rows: Vec<Vec<String>> = groups
        .iter()
        .zip(labels)
        .map(|(group, label)| {
            let of = |f: &dyn Fn(&ExtractedTarget) -> f64| group.members.iter().map(|i| f(&targets[*i])).collect::<Vec<f64>>();
            let range =
                |f: &dyn Fn(&ExtractedTarget) -> f64, show: &dyn Fn(f64) -> String| figure::range(of(f).into_iter(), show);
            let exact = group.members.iter().filter(|i| targets[**i].method == "exact").count();
            vec![
                label,
                group.layers(),
                group.members.len().to_string(),
                range(&|t| t.rank as f64, &|x| format!("{x}")),
                if targets[group.members[0]].relative.is_some() {
                    range(&|t| t.relative.unwrap_or(0.0), &percent_of)
                } else {
                    String::new()
                },
                range(&|t| t.error, &percent_of),
                percent_of(of(&|t| t.excess).into_iter().fold(0.0, f64::max)),
                match exact {
                    0 => "krylov".to_owned(),
                    n if n == group.members.len() => "exact".to_owned(),
                    _ => "both".to_owned(),
                },
            ]
        })
        .collect();
    table::render(&columns, &rows, WIDTH)
}

fn omitted(report: &ExtractReport) -> String {
    let mut text = format!("  left out: {}\n", plural(report.omitted.len() as u64, "changed weight"));
    for one in report.omitted.iter().take(SHOWN) {
        let why = match (one.why, one.survived) {
            ("unrecoverable", Some(share)) => {
                format!("unrecoverable: about {} of the change survived rounding", percent_of(share))
            }
            ("noise", _) => "nothing stands out of the noise of rounding".to_owned(),
            (why, _) => why.to_owned(),
        };
        text.push_str(&format!("    {}\n      {why}\n", super::escape::inline(&one.tensor)));
    }
    more(&mut text, report.omitted.len());
    text
}

fn rest(rest: &[RestTensor]) -> String {
    let columns = [Column::Text("no factors"), Column::Text("because"), Column::Number("of its square"), Column::Text("")];
    let mut sorted: Vec<&RestTensor> = rest.iter().collect();
    sorted.sort_by(|x, y| y.share.unwrap_or(f64::INFINITY).total_cmp(&x.share.unwrap_or(f64::INFINITY)));
    let row = |one: &&RestTensor| {
        let share = one.share.map_or_else(|| "-".to_owned(), percent_of);
        vec![one.tensor.clone(), one.why.to_owned(), share, if one.stored { "stored" } else { "left out" }.to_owned()]
    };
    let mut text = table::render(&columns, &sorted.iter().take(SHOWN).map(row).collect::<Vec<_>>(), WIDTH);
    more(&mut text, rest.len());
    text
}

fn more(text: &mut String, all: usize) {
    if all > SHOWN {
        text.push_str(&format!("    and {} more (--json lists all)\n", all - SHOWN));
    }
}
