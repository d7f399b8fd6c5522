//! The reports of `predict` and `eval` as text.

use super::figure::{self, percent_of};
use super::table::{self, Column, WIDTH};
use super::{escape, line, plural};
use crate::report::{Compared, ConfusionReport, EvalReport, Measure, PredictReport, Scores, UsedAdapter};

pub(super) fn predictions(report: &PredictReport) -> String {
    // One answer is what was asked for, and nothing else.
    if let [one] = &report.predictions[..] {
        let mut text = format!("{}\n", escape::inline(&one.text));
        for class in &one.classes {
            line(&mut text, &percent_of(class.probability), &class.label);
        }
        return text;
    }
    let classes = report.predictions.iter().any(|one| !one.classes.is_empty());
    let mut columns = vec![Column::Number("line"), Column::Text("says")];
    if classes {
        columns.push(Column::Number("probability"));
    }
    let row = |one: &crate::report::Prediction| {
        let mut row = vec![one.line.to_string(), escape::inline(&one.text)];
        row.extend(one.classes.first().map(|class| percent_of(class.probability)));
        row
    };
    table::render(&columns, &report.predictions.iter().map(row).collect::<Vec<_>>(), WIDTH)
}

pub(super) fn text(report: &EvalReport) -> String {
    let mut text = format!("{} of {}\n", plural(report.rows, "row"), escape::inline(&report.data));
    line(&mut text, "model", &report.model);
    for (i, UsedAdapter { path, weight, .. }) in report.adapters.iter().enumerate() {
        let weight = if *weight == 1.0 { String::new() } else { format!(", times {weight}") };
        line(&mut text, if i == 0 { "adapters" } else { "" }, &format!("{path}{weight}"));
    }
    line(&mut text, "applied", shown(report.view));
    text.push('\n');
    let (one, other) = (shown(report.view), report.against.map(shown));
    let mut columns = vec![Column::Text("measure"), Column::Number(one)];
    columns.extend(other.map(Column::Number));
    let rows: Vec<Vec<String>> = measures(&report.scores)
        .into_iter()
        .enumerate()
        .map(|(i, (name, value))| {
            let beside = report.compared.as_ref().and_then(|compared| measures(&compared.scores).into_iter().nth(i));
            [name.to_owned(), value].into_iter().chain(beside.map(|(_, value)| value)).collect()
        })
        .collect();
    text.push_str(&table::render(&columns, &rows, WIDTH));
    if let Some(compared) = &report.compared {
        text.push('\n');
        text.push_str(&beside(compared, report.against));
    }
    if let Some(confusion) = &report.scores.confusion {
        text.push('\n');
        text.push_str(&matrix(confusion));
    }
    text
}

fn shown(view: &'static str) -> &'static str {
    match view {
        "on_the_fly" => "on the fly",
        "base" => "base alone",
        other => other,
    }
}

fn measures(scores: &Scores) -> Vec<(&'static str, String)> {
    let share = |measure: &Option<Measure>| {
        measure.map(|m| format!("{} ({} to {})", percent_of(m.value), percent_of(m.low).trim(), percent_of(m.high).trim()))
    };
    let points = |value: Option<f64>| value.map(|value| format!("{value:.2}"));
    let perplexity = scores.perplexity.map(|m| {
        let three = |value| figure::significant(value, 4);
        format!("{} ({} to {})", three(m.value), three(m.low), three(m.high))
    });
    let tokens = (scores.predicted_tokens > 0).then(|| scores.predicted_tokens.to_string());
    let all = [
        ("accuracy", share(&scores.accuracy)),
        ("mean F1 of labels", scores.macro_f1.map(percent_of)),
        ("exact match", share(&scores.exact_match)),
        ("F1", share(&scores.f1)),
        ("BLEU", points(scores.bleu)),
        ("chrF2", points(scores.chrf)),
        ("perplexity", perplexity),
        ("over tokens", tokens),
    ];
    all.into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
}

fn beside(compared: &Compared, against: Option<&str>) -> String {
    let mut text = String::new();
    if let Some(agreement) = &compared.agreement {
        let decisions = plural(compared.decisions, "decision");
        line(&mut text, "same", &format!("{} of {decisions}", percent_of(agreement.value).trim()));
    }
    let kl = |value| figure::significant(value, 3);
    let name = if against == Some("merged") { "merge loss" } else { "KL" };
    let values = format!("{} nats in the mean, {} at 99 %", kl(compared.kl_mean), kl(compared.kl_p99));
    line(&mut text, name, &format!("{values}, {} at most", kl(compared.kl_max)));
    if let Some(p) = compared.mcnemar {
        let counts = format!("{} only here, {} only there", compared.only_first_right, compared.only_second_right);
        line(&mut text, "right", &format!("{counts}; McNemar's p {}", figure::significant(p, 3)));
    }
    text
}

/// Numbers of the labels, as titles.
const NUMBERS: [&str; 8] = ["0", "1", "2", "3", "4", "5", "6", "7"];

/// True labels by row, predicted ones by column.
fn matrix(confusion: &ConfusionReport) -> String {
    let count = confusion.labels.len();
    // Beyond that it is for a program, or a picture.
    if count > NUMBERS.len() {
        return format!("  {count} labels: --json has the confusion matrix\n");
    }
    let mut columns = vec![Column::Text("true label, by predicted")];
    columns.extend(NUMBERS.iter().take(count).map(|number| Column::Number(number)));
    columns.extend([Column::Number("precision"), Column::Number("recall")]);
    let rows = confusion.labels.iter().zip(&confusion.counts).zip(NUMBERS).map(|((label, counts), number)| {
        let counts = counts.iter().map(u64::to_string);
        let name = format!("{number} {}", escape::inline(&label.label));
        std::iter::once(name).chain(counts).chain([percent_of(label.precision), percent_of(label.recall)]).collect()
    });
    table::render(&columns, &rows.collect::<Vec<_>>(), WIDTH)
}
