//! The singular values of an adapter as text: by kind of module what its rank is used for, and what smaller ranks would keep.

use super::figure::{self, percent_of};
use super::group::{group, labels};
use super::table::{self, Column, WIDTH};
use super::{escape, line, plural};
use crate::report::{SpectrumReport, UpdateSpectrum};

/// Dead updates that are named.
const SHOWN: usize = 5;

pub(super) fn text(report: &SpectrumReport, every_update: bool) -> String {
    let columns = [
        Column::Text("spectrum of"),
        Column::Text("layers"),
        Column::Number("n"),
        Column::Number("rank"),
        Column::Number("effective"),
        Column::Number("stable"),
        Column::Number("90 %"),
        Column::Number("99 %"),
        Column::Number("|dW|/|W|"),
    ];
    let facts = |update: &UpdateSpectrum| if every_update { vec![format!("{:?}", update.expert)] } else { Vec::new() };
    let groups = group(report.updates.iter().map(|update| (update.tensor.as_str(), facts(update))));
    let row = |label: String, layers: String, of: &[&UpdateSpectrum]| {
        let range = |f: &dyn Fn(&UpdateSpectrum) -> f64| figure::range(of.iter().map(|u| f(u)), |x| figure::significant(x, 2));
        let relative = of.iter().filter_map(|u| u.relative);
        vec![
            label,
            layers,
            of.len().to_string(),
            range(&|u| u.rank as f64),
            range(&|u| u.effective_rank),
            range(&|u| u.stable_rank),
            range(&|u| u.energy.keeps_90 as f64),
            range(&|u| u.energy.keeps_99 as f64),
            figure::range(relative, |x| format!("{}%", figure::significant(100.0 * x, 2))),
        ]
    };
    let rows: Vec<Vec<String>> = if every_update {
        report.updates.iter().map(|update| row(update.tensor.clone(), String::new(), &[update])).collect()
    } else {
        let grouped = groups.iter().zip(labels(&groups));
        grouped
            .map(|(g, label)| row(label, g.layers(), &g.members.iter().map(|i| &report.updates[*i]).collect::<Vec<_>>()))
            .collect()
    };
    let mut text = String::from("\n");
    text.push_str(&table::render(&columns, &rows, if every_update { usize::MAX } else { WIDTH }));
    text.push('\n');
    line(&mut text, "norm", &format!("{} (Frobenius, of all updates)", figure::significant(report.norm, 4)));
    for smaller in &report.smaller {
        let values = figure::count(smaller.parameters);
        let what = format!("rank up to {}, {values} values in factors", smaller.highest_rank);
        line(&mut text, &format!("keeps {}", percent_of(smaller.energy).replace(' ', "")), &what);
    }
    if !report.dead.is_empty() {
        let names: Vec<String> = report.dead.iter().take(SHOWN).map(|name| escape::inline(name)).collect();
        let more = if report.dead.len() > SHOWN { ", …" } else { "" };
        line(&mut text, "dead", &format!("{}: {}{more}", plural(report.dead.len() as u64, "update"), names.join(", ")));
    }
    text
}
