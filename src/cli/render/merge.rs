//! The report of `merge` as text: what went in and where it went, what became of each kind of module, and the balance.

use super::group::{group, labels};
use super::table::{Column, WIDTH, render};
use super::{figure, line, plural};
use crate::Renaming;
use crate::report::{AdapterUse, MergeEachReport, MergeReport, TensorReport};

/// Names of files that are listed on one line; the rest is counted.
const NAMES_SHOWN: usize = 8;

pub(super) fn text(report: &MergeReport) -> String {
    let many = plural(report.adapters.len() as u64, "adapter");
    let mut text = match report.dry_run {
        true => format!("would merge {many}; nothing was written\n"),
        false if report.in_place => format!("merged {many} in place\n"),
        false => format!("merged {many}\n"),
    };
    line(&mut text, "base", &report.base);
    for (i, adapter) in report.adapters.iter().enumerate() {
        adapter_lines(&mut text, &format!("adapter{}", numbered(report, i)), adapter);
    }
    if !report.in_place {
        line(&mut text, "output", &report.output);
    }
    if let Some(log) = &report.undo_log {
        line(&mut text, "undo log", log);
    }
    line(&mut text, "", &figure::bytes(report.bytes));
    if !report.resumed.is_empty() {
        line(&mut text, "resumed", &names(report.resumed.iter().map(String::clone)));
    }
    if report.method != "linear" {
        line(&mut text, "method", report.method);
    }
    if report.rounding != "nearest" {
        line(&mut text, "rounding", &report.rounding);
    }
    if let Some(content) = &report.content {
        line(&mut text, "content", content);
    }
    if !report.files_copied.is_empty() {
        line(&mut text, "copied", &names(report.files_copied.iter().map(String::clone)));
    }
    if !report.files_left.is_empty() {
        line(&mut text, "not copied", &names(report.files_left.iter().map(|left| format!("{} ({})", left.file, left.reason))));
    }
    if report.untied {
        line(&mut text, "config.json", "says that embeddings are not tied");
    }
    if report.dry_run {
        line(&mut text, "memory", &format!("up to {} for buffers", figure::bytes(report.memory)));
    }
    text.push('\n');
    text.push_str(&updates(report));
    text.push_str(&others(report));
    text.push_str(&ignored(report));
    text.push('\n');
    text.push_str(&balance(report));
    text
}

/// One report after the other.
pub(super) fn each(report: &MergeEachReport) -> String {
    report.merges.iter().map(text).collect::<Vec<_>>().join("\n")
}

fn numbered(report: &MergeReport, i: usize) -> String {
    if report.adapters.len() == 1 { String::new() } else { format!(" {}", i + 1) }
}

fn adapter_lines(text: &mut String, label: &str, adapter: &AdapterUse) {
    line(text, label, &adapter.path);
    let left_out = if adapter.weight == 0.0 { ": left out" } else { "" };
    line(text, "", &format!("{}, weight {}{left_out}", adapter.dialect, figure::significant(adapter.weight, 6)));
    if let Some(renaming) = &adapter.renaming {
        line(text, "", &renamed(renaming));
    }
    line(
        text,
        "",
        match adapter.base_identity {
            "verified" => "base verified: it is the one that the adapter names by digest",
            "mismatch" => "base MISMATCH: the adapter names another one; allowed by a flag",
            _ => "base UNVERIFIED: the adapter names none by digest",
        },
    );
}

/// What became of the adapter's names.
pub(super) fn renamed(renaming: &Renaming) -> String {
    match renaming.family {
        Some(family) => format!("modules of the adapter are named as the family {family} names them in files"),
        None => format!("{:?} of the adapter is {:?} of the base", renaming.from, renaming.to),
    }
}

/// Several names on one line, the first few of them.
fn names(all: impl ExactSizeIterator<Item = String>) -> String {
    let count = all.len();
    let shown: Vec<String> = all.take(NAMES_SHOWN).collect();
    let more = count.saturating_sub(NAMES_SHOWN);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    shown.join(", ") + &more
}

const COLUMNS: [Column; 9] = [
    Column::Text("updated"),
    Column::Text("layers"),
    Column::Number("n"),
    Column::Number("shape"),
    Column::Text("rank"),
    Column::Text("scale"),
    Column::Number("dW/W %"),
    Column::Number("chg %"),
    Column::Number("kept %"),
];

/// One row for each kind of updated tensor.
fn updates(report: &MergeReport) -> String {
    let updated: Vec<&TensorReport> = report.tensors.iter().filter(|tensor| !tensor.contributions.is_empty()).collect();
    if updated.is_empty() {
        return String::new();
    }
    let facts = |tensor: &TensorReport| {
        let ranks: Vec<String> = tensor.contributions.iter().map(|c| c.rank.to_string()).collect();
        let scales: Vec<String> = tensor.contributions.iter().map(|c| figure::significant(c.scale, 4)).collect();
        vec![figure::shape(&tensor.shape), ranks.join(", "), scales.join(", ")]
    };
    let groups = group(updated.iter().map(|tensor| (tensor.tensor.as_str(), facts(tensor))));
    // The count says something new only where a layer has several, or the name has no layer.
    let counted = groups.iter().any(|group| group.members.len() != group.layer_count());
    let rows = labels(&groups).into_iter().zip(&groups).map(|(label, group)| {
        let members: Vec<&TensorReport> = group.members.iter().filter_map(|&i| updated.get(i).copied()).collect();
        let count = if counted { members.len().to_string() } else { String::new() };
        let mut row = vec![label, group.layers(), count];
        row.extend_from_slice(group.facts());
        row.extend(if report.dry_run { Default::default() } else { outcome(&members) });
        row
    });
    render(&COLUMNS, &rows.collect::<Vec<_>>(), WIDTH)
}

/// What only the values could tell: the size of the update relative to the weight, the values that changed, and how much of the
/// update survived rounding where the least of it did.
fn outcome(members: &[&TensorReport]) -> [String; 3] {
    let norms = members.iter().filter_map(|tensor| tensor.relative_norm);
    let elements = members.iter().map(|tensor| tensor.elements).sum();
    let changed = members.iter().filter_map(|tensor| tensor.changed).sum();
    let least = members.iter().filter_map(|tensor| tensor.gain).reduce(f64::min);
    [
        figure::range(norms, |x| figure::significant(100.0 * x, 2)),
        figure::percent(changed, elements),
        least.map(percent).unwrap_or_default(),
    ]
}

/// One decimal; an exact 100 without. What survived is a length along the update and may be a little over 100, so unlike a count it
/// rounds to 100 from both sides; but what is left of a lost update is never called nothing.
fn percent(share: f64) -> String {
    match format!("{:.1}", 100.0 * share).as_str() {
        "100.0" => "100".to_owned(),
        "0.0" if share > 0.0 => "<0.1".to_owned(),
        shown => shown.to_owned(),
    }
}

/// What an update is not: full tensors and rows that were put in place, what was multiplied, and copies under a second name.
fn others(report: &MergeReport) -> String {
    let is_other = |tensor: &&TensorReport| !matches!(tensor.action, "update" | "convert");
    let others: Vec<&TensorReport> = report.tensors.iter().filter(is_other).collect();
    let facts = |tensor: &TensorReport| {
        let action = match tensor.action {
            "replace" => "replaced",
            "replace+update" => "replaced, then updated",
            "replace+rows" => "replaced, then rows of it",
            "replace rows" => "rows replaced",
            "rescale" => "multiplied",
            "untie" => "untied",
            "requantise" => "scales of a weight",
            other => other,
        };
        let added = if tensor.added { ", added" } else { "" };
        vec![figure::shape(&tensor.shape), tensor.dtype.clone(), format!("{action}{added}")]
    };
    let columns = [
        Column::Text("otherwise changed"),
        Column::Text("layers"),
        Column::Number("shape"),
        Column::Text("dtype"),
        Column::Text("what"),
    ];
    let groups = group(others.iter().map(|tensor| (tensor.tensor.as_str(), facts(tensor))));
    let rows = labels(&groups).into_iter().zip(&groups).map(|(label, group)| {
        let mut row = vec![label, group.layers()];
        row.extend_from_slice(group.facts());
        row
    });
    let rows: Vec<_> = rows.collect();
    if rows.is_empty() { String::new() } else { format!("\n{}", render(&columns, &rows, WIDTH)) }
}

/// Tensors of the adapters that were left out, with the flag that asked for it.
fn ignored(report: &MergeReport) -> String {
    let groups = group(report.ignored.iter().map(|ignored| (ignored.tensor.as_str(), vec![ignored.flag.clone()])));
    let rows = labels(&groups)
        .into_iter()
        .zip(&groups)
        .map(|(label, group)| vec![label, group.layers(), group.members.len().to_string(), group.facts().join(", ")]);
    let rows: Vec<_> = rows.collect();
    let columns = [Column::Text("ignored"), Column::Text("layers"), Column::Number("n"), Column::Text("by")];
    if rows.is_empty() { String::new() } else { format!("\n{}", render(&columns, &rows, WIDTH)) }
}

/// Weights that are stored as codes and scales.
fn requantised(report: &MergeReport) -> String {
    let weights: Vec<_> =
        report.tensors.iter().filter(|tensor| tensor.block.is_some() && tensor.action != "requantise").collect();
    let Some(first) = weights.first() else { return String::new() };
    let will = if report.dry_run { "to be quantised" } else { "quantised" };
    format!("{will} again, to {} with new scales: {}\n", first.dtype, plural(weights.len() as u64, "tensor"))
}

fn balance(report: &MergeReport) -> String {
    let b = &report.balance;
    let count = figure::count;
    let converted = if b.converted > 0 { format!(" + {} converted", count(b.converted)) } else { String::new() };
    let mut text = format!(
        "adapter tensors: {} = {} applied + {} ignored\nbase tensors: {} = {} copied + {} modified{converted}; added: {}\n",
        count(b.adapter_tensors),
        count(b.applied),
        count(b.ignored),
        count(b.base_tensors),
        count(b.copied),
        count(b.modified),
        count(b.added)
    );
    if let Some(done) = &report.converted {
        let (tensors, values) = (plural(done.tensors, "tensor"), count(done.values));
        let loss = if done.error == 0.0 {
            "exactly".to_owned()
        } else {
            format!("at a loss of {} %", figure::significant(100.0 * done.error, 2))
        };
        let zeroed = if done.zeroed > 0 { format!(", {} of them became 0", count(done.zeroed)) } else { String::new() };
        text.push_str(&format!("stored as {}: {tensors}, {values} values, {loss}{zeroed}\n", done.dtype));
    }
    text.push_str(&requantised(report));
    let (all, changed) = report.changed();
    if !report.dry_run && all > 0 {
        text.push_str(&format!("{} % of {} touched weights changed", figure::percent(changed, all), count(all)));
        if let Some(survived) = report.survived {
            let whole = percent(survived);
            let each = figure::range(report.tensors.iter().filter_map(|tensor| tensor.gain), percent);
            text.push_str(&format!("\n{whole} % of the update survived rounding"));
            if each != whole {
                text.push_str(&format!(" ({each} % by tensor)"));
            }
        }
        text.push('\n');
    }
    if let Some((wide, narrowed)) = report.changed_if_narrowed() {
        let of = if wide == all { "of them".to_owned() } else { format!("of the {} in F32 and F64", count(wide)) };
        let (bf16, f16) = (figure::percent(narrowed.bf16, wide), figure::percent(narrowed.f16, wide));
        text.push_str(&format!("stored in BF16 later, {bf16} % {of} would differ from the base; in F16, {f16} %\n"));
    }
    text
}
