//! Tables of at most so many columns of text. What must give way are cells of text, cut in the middle; numbers are never cut.

/// Columns of a terminal that nobody has widened.
pub(super) const WIDTH: usize = 80;
/// A column of text is not cut below this.
const LEAST: usize = 8;

/// What a column holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Column {
    /// Left-aligned, cut if there is no room.
    Text(&'static str),
    /// Right-aligned, never cut.
    Number(&'static str),
}

impl Column {
    fn title(self) -> &'static str {
        match self {
            Column::Text(title) | Column::Number(title) => title,
        }
    }
}

/// A table with a heading, indented by two. A column in which every cell is empty is left out. No line is longer than `width`, if
/// the numbers allow.
pub(super) fn render(columns: &[Column], rows: &[Vec<String>], width: usize) -> String {
    let rows: Vec<Vec<String>> = rows.iter().map(|row| row.iter().map(|cell| super::escape::inline(cell)).collect()).collect();
    let cell = |row: &[String], i: usize| row.get(i).cloned().unwrap_or_default();
    let used: Vec<usize> = (0..columns.len()).filter(|&i| rows.iter().any(|row| !cell(row, i).is_empty())).collect();
    let columns: Vec<Column> = used.iter().map(|&i| columns[i]).collect();
    let mut lines: Vec<Vec<String>> = vec![columns.iter().map(|c| c.title().to_owned()).collect()];
    lines.extend(rows.iter().map(|row| used.iter().map(|&i| cell(row, i)).collect::<Vec<_>>()));
    let mut widths: Vec<usize> =
        (0..columns.len()).map(|i| lines.iter().map(|line| columns_of(&line[i])).max().unwrap_or(0)).collect();
    shrink(&columns, &mut widths, width);
    let mut out = String::new();
    for line in &lines {
        let cells: Vec<String> =
            line.iter().zip(&columns).zip(&widths).map(|((cell, column), &width)| fill(cell, *column, width)).collect();
        out.push_str(format!("  {}", cells.join("  ")).trim_end());
        out.push('\n');
    }
    out
}

/// Takes from the widest column of text until all fit.
fn shrink(columns: &[Column], widths: &mut [usize], width: usize) {
    loop {
        let total: usize = widths.iter().map(|w| w + 2).sum();
        let widest =
            (0..columns.len()).filter(|&i| matches!(columns[i], Column::Text(_)) && widths[i] > LEAST).max_by_key(|&i| widths[i]);
        match widest {
            Some(i) if total > width => widths[i] -= 1,
            _ => return,
        }
    }
}

fn fill(cell: &str, column: Column, width: usize) -> String {
    let cell = cut(cell, width);
    let space = " ".repeat(width - columns_of(&cell).min(width));
    match column {
        Column::Text(_) => cell + &space,
        Column::Number(_) => space + &cell,
    }
}

/// Shortens in the middle: the ends of a tensor's name say more.
fn cut(text: &str, width: usize) -> String {
    if columns_of(text) <= width {
        return text.to_owned();
    }
    let room = width.saturating_sub(1);
    let take = |chars: &mut dyn Iterator<Item = char>, room: usize| {
        let mut used = 0;
        chars
            .take_while(|&c| {
                used += wide(c);
                used <= room
            })
            .collect::<Vec<_>>()
    };
    let head = take(&mut text.chars(), room / 3);
    let tail = take(&mut text.chars().rev(), room - room / 3);
    head.into_iter().chain(['…']).chain(tail.into_iter().rev()).collect()
}

/// Columns that a text takes. Scripts that may take two columns per character are counted as two: a column too few is worse.
fn columns_of(text: &str) -> usize {
    text.chars().map(wide).sum()
}

fn wide(c: char) -> usize {
    if matches!(c, '\u{1100}'..='\u{1fff}' | '\u{2e80}'..) { 2 } else { 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COLUMNS: [Column; 4] = [Column::Text("target"), Column::Text("layers"), Column::Number("n"), Column::Number("empty")];

    fn row(cells: [&str; 4]) -> Vec<String> {
        cells.map(str::to_owned).to_vec()
    }

    #[test]
    fn columns_are_aligned_and_empty_ones_left_out() {
        let text = render(&COLUMNS, &[row(["q_proj", "0-1", "2", ""]), row(["v", "0", "10", ""])], WIDTH);
        assert_eq!(text, "  target  layers   n\n  q_proj  0-1      2\n  v       0       10\n");
    }

    #[test]
    fn no_line_is_wider_than_the_terminal() {
        let long = "model.layers.very_long_module_name.".repeat(5);
        let wide = "重み".repeat(60);
        let layers = "0-1, 3-5, 7-9, 11-13, 15-17, 19-21, 23-25, 27-29, 31-33";
        for name in [&long, &wide] {
            for line in render(&COLUMNS, &[row([name, layers, "123,456,789", "1"])], WIDTH).lines() {
                assert!(columns_of(line) <= WIDTH, "{line}");
            }
        }
        assert!(render(&COLUMNS, &[row([&long, "", "1", ""])], usize::MAX).contains(&long));
    }

    #[test]
    fn a_cut_keeps_both_ends() {
        assert_eq!(cut("model.decoder.q_proj", 12), "mod…r.q_proj");
        assert_eq!(cut("q_proj", 6), "q_proj");
    }
}
