//! A table with a row for each kind of module, and the range that each figure has among its targets.

use super::figure;
use super::group::{group, labels};
use super::table::{self, Column, WIDTH};

/// A figure of a target: its heading, its value and how that is shown.
pub(super) type Figure<'f, T> = (&'static str, &'f dyn Fn(&T) -> f64, &'f dyn Fn(f64) -> String);

/// The table; `name` is the tensor of a target.
pub(super) fn table<T>(targets: &[T], name: impl Fn(&T) -> &str, figures: &[Figure<'_, T>]) -> String {
    let mut columns = vec![Column::Text("target"), Column::Text("layers"), Column::Number("n")];
    columns.extend(figures.iter().map(|(heading, ..)| Column::Number(heading)));
    let groups = group(targets.iter().map(|target| (name(target), Vec::new())));
    let rows = groups.iter().zip(labels(&groups)).map(|(group, label)| {
        let mut row = vec![label, group.layers(), group.members.len().to_string()];
        let range = |(_, of, show): &Figure<'_, T>| figure::range(group.members.iter().map(|i| of(&targets[*i])), show);
        row.extend(figures.iter().map(range));
        row
    });
    table::render(&columns, &rows.collect::<Vec<_>>(), WIDTH)
}
