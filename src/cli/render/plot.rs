//! The spectrum of an adapter as a picture: which layers and modules change how much, and how many components their updates need. SVG and
//! PNG are the same drawing.

use std::path::Path;

use epaint_default_fonts::UBUNTU_LIGHT;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::figure;
use super::group::{group, labels, layer};
use crate::report::{SpectrumReport, UpdateSpectrum};
use crate::{Error, Result, rules};

/// Rows of the heat map that are drawn: the kinds of module of an adapter are a dozen at most.
const KINDS: usize = 24;
pub(super) const FONT: &str = "sans-serif";

/// Draws to a file that does not exist yet, as SVG or PNG by its name.
///
/// # Errors
/// `U-001` for another name, `U-002` if the file exists, `E-002` if it cannot be written.
pub(in super::super) fn draw(report: &SpectrumReport, title: &str, path: &Path) -> Result<()> {
    let figure = Figure::of(report, title);
    onto_file(path, figure.size(), &figure)
}

/// What can be drawn on an area of any kind.
pub(super) trait Picture {
    /// Draws it.
    fn onto<D: DrawingBackend>(
        &self,
        area: &DrawingArea<D, Shift>,
    ) -> std::result::Result<(), DrawingAreaErrorKind<D::ErrorType>>;
}

/// Draws a picture of so many pixels to a file that does not exist yet, as SVG or PNG by its name.
///
/// # Errors
/// As [`draw`].
pub(super) fn onto_file(path: &Path, size: (u32, u32), picture: &impl Picture) -> Result<()> {
    let format = format(path)?;
    if std::fs::symlink_metadata(path).is_ok() {
        return Err(Error::new(rules::OUTPUT_EXISTS, "the picture exists").file(path).help("give another name, or remove it"));
    }
    // A font that is registered already is the same one.
    let _ = plotters::style::register_font(FONT, FontStyle::Normal, UBUNTU_LIGHT);
    let written = match format {
        Format::Svg => picture.onto(&SVGBackend::new(path, size).into_drawing_area()).map_err(|e| e.to_string()),
        Format::Png => picture.onto(&BitMapBackend::new(path, size).into_drawing_area()).map_err(|e| e.to_string()),
    };
    written.map_err(|why| {
        let _ = std::fs::remove_file(path);
        let message = format!("the picture cannot be written: {why}");
        Error::new(rules::WRITE, message).file(path).help("check that its folder exists, and that there is room")
    })
}

enum Format {
    Svg,
    Png,
}

/// The format that a name asks for.
///
/// # Errors
/// `U-001`.
fn format(path: &Path) -> Result<Format> {
    match path.extension().map(|extension| extension.to_string_lossy().to_lowercase()).as_deref() {
        Some("svg") => Ok(Format::Svg),
        Some("png") => Ok(Format::Png),
        _ => Err(Error::new(rules::ARGUMENT, "a picture's name ends in .svg or .png").file(path)),
    }
}

/// Refuses a name before anything is computed.
///
/// # Errors
/// `U-001`.
pub(in super::super) fn check(path: &Path) -> Result<()> {
    format(path).map(|_| ())
}

/// What is drawn.
struct Figure<'r> {
    title: &'r str,
    /// Kinds of module, with their updates and the column of each.
    kinds: Vec<(String, Vec<(usize, &'r UpdateSpectrum)>)>,
    /// Numbers of layers; one without a number if modules have none.
    columns: Vec<Option<u64>>,
    /// The figure of an update that the heat map shows, and what it is.
    of: fn(&UpdateSpectrum) -> f64,
    what: &'static str,
}

impl<'r> Figure<'r> {
    fn of(report: &'r SpectrumReport, title: &'r str) -> Self {
        let groups = group(report.updates.iter().map(|update| (update.tensor.as_str(), Vec::new())));
        let mut columns: Vec<Option<u64>> = report.updates.iter().map(|update| layer(&update.tensor)).collect();
        columns.sort_unstable();
        columns.dedup();
        let column = |update: &UpdateSpectrum| columns.binary_search(&layer(&update.tensor)).unwrap_or(0);
        let members = |members: &[usize]| members.iter().map(|i| &report.updates[*i]).map(|u| (column(u), u)).collect();
        let kinds = groups.iter().zip(labels(&groups)).take(KINDS).map(|(g, label)| (label, members(&g.members))).collect();
        let relative = report.updates.iter().all(|update| update.relative.is_some()) && !report.updates.is_empty();
        let (of, what): (fn(&UpdateSpectrum) -> f64, _) =
            if relative { (|u| u.relative.unwrap_or(0.0), "|dW| / |W|") } else { (|u| u.norm, "|dW|") };
        Figure { title, kinds, columns, of, what }
    }

    fn size(&self) -> (u32, u32) {
        (1200, 180 + 30 * self.kinds.len().max(10) as u32)
    }

    /// Layers from left to right, modules from top to bottom.
    fn heat_map<D: DrawingBackend>(
        &self,
        area: &DrawingArea<D, Shift>,
    ) -> std::result::Result<(), DrawingAreaErrorKind<D::ErrorType>> {
        let values = || self.kinds.iter().flat_map(|(_, updates)| updates.iter().map(|(_, update)| (self.of)(update)));
        let (low, high) = values().fold((f64::INFINITY, 0.0f64), |(low, high), x| (low.min(x), high.max(x)));
        let caption = format!("{}: {} to {}", self.what, figure::significant(low, 2), figure::significant(high, 2));
        let (width, height) = (self.columns.len().max(1), self.kinds.len().max(1));
        let mut chart = ChartBuilder::on(area)
            .caption(caption, (FONT, 16))
            .margin(10)
            .x_label_area_size(40)
            .y_label_area_size(150)
            .build_cartesian_2d(-0.5..width as f64 - 0.5, 0.0..height as f64)?;
        let numbered =
            |x: &f64| self.columns.get(x.max(0.0) as usize).copied().flatten().map(|n| n.to_string()).unwrap_or_default();
        chart
            .configure_mesh()
            .disable_mesh()
            .x_desc("layer")
            .x_labels(width.min(17))
            .x_label_formatter(&numbered)
            .y_labels(0)
            .y_label_formatter(&|_| String::new())
            .label_style((FONT, 13))
            .draw()?;
        for (row, (label, updates)) in self.kinds.iter().enumerate() {
            let top = (height - row) as f64;
            for (column, update) in updates {
                let share = if high > low { ((self.of)(update) - low) / (high - low) } else { 1.0 };
                let cell = [(*column as f64 - 0.5, top - 1.0), (*column as f64 + 0.5, top)];
                chart.draw_series(std::iter::once(Rectangle::new(cell, shade(share).filled())))?;
            }
            // Outside of the axes, where there are pixels alone.
            let style = (FONT, 13).into_text_style(area).pos(Pos::new(HPos::Right, VPos::Center));
            let (x, y) = chart.plotting_area().map_coordinate(&(-0.5, top - 0.5));
            let (left, above) = area.get_base_pixel();
            area.draw(&Text::new(shortened(label), (x - left - 8, y - above), style))?;
        }
        Ok(())
    }

    /// The share of ‖ΔW‖² that the first components keep: the middle of each kind's updates.
    fn curves<D: DrawingBackend>(
        &self,
        area: &DrawingArea<D, Shift>,
    ) -> std::result::Result<(), DrawingAreaErrorKind<D::ErrorType>> {
        let highest =
            self.kinds.iter().flat_map(|(_, updates)| updates.iter().map(|(_, u)| u.singular_values.len())).max().unwrap_or(1);
        let mut chart = ChartBuilder::on(area)
            .caption("kept by the first components", (FONT, 16))
            .margin(10)
            .x_label_area_size(40)
            .y_label_area_size(50)
            .build_cartesian_2d(0.0..highest as f64, 0.0..1.0)?;
        chart
            .configure_mesh()
            .x_desc("rank")
            .y_desc("share of |dW|²")
            .x_labels(9)
            .x_label_formatter(&|x| format!("{x:.0}"))
            .y_labels(6)
            .light_line_style(WHITE)
            .label_style((FONT, 13))
            .draw()?;
        for (i, (label, updates)) in self.kinds.iter().enumerate() {
            let color = Palette99::pick(i).to_rgba();
            let points = (0..=highest).map(|rank| (rank as f64, middle(updates.iter().map(|(_, update)| kept(update, rank)))));
            chart
                .draw_series(LineSeries::new(points, color.stroke_width(2)))?
                .label(shortened(label))
                .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 16, y)], color.stroke_width(2)));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::LowerRight)
            .background_style(WHITE.mix(0.85))
            .border_style(BLACK.mix(0.3))
            .label_font((FONT, 12))
            .draw()?;
        Ok(())
    }
}

impl Picture for Figure<'_> {
    fn onto<D: DrawingBackend>(
        &self,
        area: &DrawingArea<D, Shift>,
    ) -> std::result::Result<(), DrawingAreaErrorKind<D::ErrorType>> {
        area.fill(&WHITE)?;
        let area = area.margin(8, 0, 0, 0).titled(self.title, (FONT, 20))?;
        let (left, right) = area.split_horizontally(700);
        self.heat_map(&left)?;
        self.curves(&right)?;
        area.present()
    }
}

/// From pale to dark, for a share of the range.
pub(super) fn shade(share: f64) -> RGBColor {
    let mix = |from: u8, to: u8| (f64::from(from) + (f64::from(to) - f64::from(from)) * share.clamp(0.0, 1.0)) as u8;
    RGBColor(mix(237, 8), mix(244, 48), mix(251, 107))
}

/// The share of ‖ΔW‖² that the first components keep.
fn kept(update: &UpdateSpectrum, rank: usize) -> f64 {
    let sum: f64 = update.singular_values.iter().take(rank).map(|value| value * value).sum();
    sum / (update.norm * update.norm)
}

/// The middle one of some numbers.
fn middle(numbers: impl Iterator<Item = f64>) -> f64 {
    let mut sorted: Vec<f64> = numbers.collect();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(0.0)
}

/// The end of a label that is too long: the name of the module.
fn shortened(label: &str) -> String {
    const SHOWN: usize = 20;
    let chars: Vec<char> = label.chars().collect();
    if chars.len() <= SHOWN {
        label.to_owned()
    } else {
        format!("…{}", chars[chars.len() - SHOWN..].iter().collect::<String>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_is_named_by_its_format() {
        assert!(check(Path::new("a.svg")).is_ok() && check(Path::new("b/c.PNG")).is_ok());
        assert!(check(Path::new("a.pdf")).is_err() && check(Path::new("svg")).is_err());
    }

    #[test]
    fn the_middle_and_the_share_are_what_they_say() {
        assert_eq!((middle([3.0, 1.0, 2.0].into_iter()), middle(std::iter::empty())), (2.0, 0.0));
        assert_eq!((shade(0.0), shade(1.0)), (RGBColor(237, 244, 251), RGBColor(8, 48, 107)));
        assert_eq!(shortened("short"), "short");
    }
}
