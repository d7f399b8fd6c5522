//! The report of `inspect` as text: a few lines about the whole, then what it consists of, by kind of module.

use super::super::finish::{Fit, Inspected};
use super::group::{Group, group, labels};
use super::merge::renamed;
use super::table::{Column, WIDTH, render};
use super::{escape, figure, line, plural};
use crate::report::{
    AdapterReport, CheckpointReport, FactorDtypes, InspectReport, ReplacementReport, RescalingReport, RowsReport, TargetReport,
};

/// Files of a checkpoint that are listed; the rest is counted.
const FILES_SHOWN: usize = 20;

pub(super) fn text(inspected: &Inspected) -> String {
    match &inspected.report {
        InspectReport::Adapter(report) => {
            let spectrum = inspected.spectrum.as_ref().map(|spectrum| super::spectrum::text(spectrum, inspected.every_target));
            adapter(report, inspected.fit.as_ref(), inspected.every_target) + &spectrum.unwrap_or_default()
        }
        InspectReport::Checkpoint(report) => checkpoint(report),
    }
}

/// The first of a text that a file may have made as long as it likes.
fn shortened(text: &str) -> String {
    const SHOWN: usize = 200;
    let short: String = text.chars().take(SHOWN).collect();
    if short.len() < text.len() { short + "…" } else { short }
}

fn adapter(report: &AdapterReport, fit: Option<&Fit>, every_target: bool) -> String {
    let mut text = format!("{}: an adapter ({})\n", escape::inline(&report.path), report.dialect);
    line(&mut text, "method", &report.method);
    line(&mut text, "family", report.family.unwrap_or("not known by its names"));
    line(&mut text, "base", &shortened(report.base_name.as_deref().unwrap_or("not named")));
    if let Some(structure) = &report.base_structure {
        line(&mut text, "", &format!("structure {structure}"));
    }
    let counts = [
        (report.targets.len() as u64, "low-rank update"),
        (report.replacements.len() as u64, "full tensor"),
        (report.rows.iter().map(|rows| rows.rows.len() as u64).sum(), "replaced row"),
        (report.rescalings.len() as u64, "multiplied tensor"),
    ];
    let holds: Vec<String> = counts.iter().filter(|(n, _)| *n > 0).map(|(n, what)| plural(*n, what)).collect();
    line(&mut text, "holds", &holds.join(", "));
    line(&mut text, "size", &format!("{}, {}", plural(report.parameters, "parameter"), figure::bytes(report.bytes)));
    let distinct = |show: fn(&TargetReport) -> String| {
        let mut all: Vec<String> = report.targets.iter().map(show).collect();
        all.dedup();
        all.sort();
        all.dedup();
        all.join(", ")
    };
    if !report.targets.is_empty() {
        line(&mut text, "rank", &figure::range(report.targets.iter().map(|t| t.rank as f64), |x| x.to_string()));
        let scales = figure::range(report.targets.iter().map(|t| t.scale), |x| figure::significant(x, 6));
        line(&mut text, "scale", &format!("{scales} ({})", distinct(|t| t.rule.to_owned())));
        line(&mut text, "dtype", &distinct(dtype));
    }
    for (i, need) in report.needs.iter().enumerate() {
        line(&mut text, if i == 0 { "needs" } else { "" }, need);
    }
    for (i, step) in report.lineage.iter().enumerate() {
        line(&mut text, if i == 0 { "history" } else { "" }, step);
    }
    if !report.targets.is_empty() {
        text.push('\n');
        text.push_str(&if every_target { each_target(report) } else { targets(report) });
    }
    if !report.replacements.is_empty() {
        text.push('\n');
        text.push_str(&replacements(report, every_target));
    }
    if !report.rows.is_empty() {
        text.push('\n');
        text.push_str(&rows(report));
    }
    if !report.rescalings.is_empty() {
        text.push('\n');
        text.push_str(&rescalings(report, every_target));
    }
    if let Some(fit) = fit {
        text.push('\n');
        text.push_str(&fits(fit));
    }
    text
}

fn dtype(target: &TargetReport) -> String {
    let FactorDtypes { a, b } = &target.dtype;
    if a == b { a.clone() } else { format!("{a}/{b}") }
}

/// What is common to the targets of a row.
fn facts(target: &TargetReport) -> Vec<String> {
    let kind = match (target.kind, target.experts) {
        ("linear", _) => String::new(),
        (_, Some(experts)) => format!("{experts} experts"),
        (kind, None) => kind.trim_start_matches("linear_").to_owned(),
    };
    let extras = [(target.bias, "with bias"), (target.magnitudes, "DoRA")];
    let extras = extras.iter().filter(|(is_there, _)| *is_there).map(|(_, what)| (*what).to_owned());
    let kind = std::iter::once(kind).filter(|kind| !kind.is_empty()).chain(extras).collect::<Vec<_>>().join(", ");
    vec![
        figure::shape(&[target.out, target.inner]),
        target.rank.to_string(),
        figure::significant(target.alpha, 6),
        figure::significant(target.scale, 4),
        dtype(target),
        kind,
    ]
}

const TARGET_COLUMNS: [Column; 10] = [
    Column::Text("target"),
    Column::Text("layers"),
    Column::Number("n"),
    Column::Number("(out, in)"),
    Column::Number("rank"),
    Column::Number("alpha"),
    Column::Number("scale"),
    Column::Number("|dW|"),
    Column::Text("dtype"),
    Column::Text("kind"),
];
/// Place of `|dW|` among them.
const NORM: usize = 7;

/// One row for each kind of module.
fn targets(report: &AdapterReport) -> String {
    let groups = group(report.targets.iter().map(|t| (t.tensor.as_str(), facts(t))));
    let row = |(label, group): (String, &Group)| {
        let mut row = vec![label, group.layers(), group.members.len().to_string()];
        row.extend_from_slice(group.facts());
        let norms = group.members.iter().filter_map(|&i| report.targets.get(i)?.norm);
        row.insert(NORM, norm(norms));
        row
    };
    render(&TARGET_COLUMNS, &labels(&groups).into_iter().zip(&groups).map(row).collect::<Vec<_>>(), WIDTH)
}

/// One row for each target, under its full name, however wide.
fn each_target(report: &AdapterReport) -> String {
    let row = |target: &TargetReport| {
        let mut row = vec![target.tensor.clone(), String::new(), String::new()];
        row.extend(facts(target));
        row.insert(NORM, norm(target.norm.into_iter()));
        row
    };
    render(&TARGET_COLUMNS, &report.targets.iter().map(row).collect::<Vec<_>>(), usize::MAX)
}

/// Full tensors, by kind of module or each on its own.
fn replacements(report: &AdapterReport, each: bool) -> String {
    let facts = |r: &ReplacementReport| vec![figure::shape(&r.shape), r.dtype.clone()];
    let columns = [
        Column::Text("full tensor"),
        Column::Text("layers"),
        Column::Number("n"),
        Column::Number("shape"),
        Column::Text("dtype"),
    ];
    if each {
        let row = |r: &ReplacementReport| [vec![r.tensor.clone(), String::new(), String::new()], facts(r)].concat();
        return render(&columns, &report.replacements.iter().map(row).collect::<Vec<_>>(), usize::MAX);
    }
    let groups = group(report.replacements.iter().map(|r| (r.tensor.as_str(), facts(r))));
    let row =
        |(label, group): (String, &Group)| [&[label, group.layers(), group.members.len().to_string()], group.facts()].concat();
    render(&columns, &labels(&groups).into_iter().zip(&groups).map(row).collect::<Vec<_>>(), WIDTH)
}

/// Rows of each tensor that are replaced, the first few of them.
fn rows(report: &AdapterReport) -> String {
    const SHOWN: usize = 12;
    let row = |rows: &RowsReport| {
        let ids: Vec<String> = rows.rows.iter().take(SHOWN).map(u64::to_string).collect();
        let more = if rows.rows.len() > SHOWN { format!(" and {} more", rows.rows.len() - SHOWN) } else { String::new() };
        vec![rows.tensor.clone(), ids.join(" ") + &more, rows.dtype.clone()]
    };
    let columns = [Column::Text("rows of"), Column::Text("which"), Column::Text("dtype")];
    render(&columns, &report.rows.iter().map(row).collect::<Vec<_>>(), WIDTH)
}

/// Tensors that are multiplied, by kind of module or each on its own.
fn rescalings(report: &AdapterReport, each: bool) -> String {
    let facts = |r: &RescalingReport| vec![r.axis.to_owned(), r.factors.to_string(), r.dtype.clone()];
    let columns = [
        Column::Text("multiplied tensor"),
        Column::Text("layers"),
        Column::Number("n"),
        Column::Text("by"),
        Column::Number("factors"),
        Column::Text("dtype"),
    ];
    if each {
        let row = |r: &RescalingReport| [vec![r.tensor.clone(), String::new(), String::new()], facts(r)].concat();
        return render(&columns, &report.rescalings.iter().map(row).collect::<Vec<_>>(), usize::MAX);
    }
    let groups = group(report.rescalings.iter().map(|r| (r.tensor.as_str(), facts(r))));
    let row =
        |(label, group): (String, &Group)| [&[label, group.layers(), group.members.len().to_string()], group.facts()].concat();
    render(&columns, &labels(&groups).into_iter().zip(&groups).map(row).collect::<Vec<_>>(), WIDTH)
}

/// Norms were read on request only; without them the column stays empty.
fn norm(norms: impl Iterator<Item = f64>) -> String {
    figure::range(norms, |x| figure::significant(x, 3))
}

fn fits(fit: &Fit) -> String {
    let mut text = format!("fits {}\n", escape::inline(&fit.base));
    line(&mut text, "model type", &shortened(fit.model_type.as_deref().unwrap_or("not stated")));
    line(&mut text, "changes", &plural(fit.tensors, "tensor"));
    if fit.ignored > 0 {
        line(&mut text, "ignored", &format!("{} of the adapter, by a flag", plural(fit.ignored, "tensor")));
    }
    if let Some(renaming) = &fit.renaming {
        line(&mut text, "names", &renamed(renaming));
    }
    line(&mut text, "identity", identity(fit.structure));
    text
}

fn identity(structure: &str) -> &'static str {
    match structure {
        "verified" => "the adapter names a base of this structure",
        _ => "base UNVERIFIED: the adapter names none by digest",
    }
}

fn checkpoint(report: &CheckpointReport) -> String {
    let mut text = format!("{}: a checkpoint\n", escape::inline(&report.path));
    line(&mut text, "model type", report.model_type.as_deref().unwrap_or("not stated"));
    let holds = format!("{} in {}", plural(report.tensors, "tensor"), plural(report.files.len() as u64, "file"));
    line(&mut text, "holds", &holds);
    line(&mut text, "size", &format!("{}, {}", plural(report.parameters, "parameter"), figure::bytes(report.bytes)));
    for (i, of) in report.dtypes.iter().enumerate() {
        let shown = format!("{} ({}, {})", of.dtype, plural(of.tensors, "tensor"), plural(of.parameters, "parameter"));
        line(&mut text, if i == 0 { "dtype" } else { "" }, &shown);
    }
    match &report.tied {
        Some(tied) => line(&mut text, "tied", &format!("{} is also {}", tied.stored, tied.shared_by.join(", "))),
        None => line(&mut text, "tied", "no"),
    }
    if let Some(quantization) = &report.quantization {
        let blocks = report.quantization_block.map(|[rows, cols]| format!(", in blocks of {rows} x {cols}")).unwrap_or_default();
        line(&mut text, "quantised", &format!("{quantization}{blocks}"));
    }
    line(&mut text, "structure", &report.structure);
    let rows: Vec<Vec<String>> = report
        .files
        .iter()
        .take(FILES_SHOWN)
        .map(|file| vec![file.file.clone(), figure::count(file.bytes), figure::count(file.tensors)])
        .collect();
    text.push('\n');
    text.push_str(&render(&[Column::Text("file"), Column::Number("bytes"), Column::Number("tensors")], &rows, WIDTH));
    if report.files.len() > FILES_SHOWN {
        text.push_str(&format!("  and {} more\n", report.files.len() - FILES_SHOWN));
    }
    if let Some(listing) = &report.listing {
        let rows: Vec<_> = listing.iter().map(|t| vec![t.tensor.clone(), t.dtype.clone(), figure::shape(&t.shape)]).collect();
        text.push('\n');
        text.push_str(&render(&[Column::Text("tensor"), Column::Text("dtype"), Column::Number("shape")], &rows, usize::MAX));
    }
    text
}
