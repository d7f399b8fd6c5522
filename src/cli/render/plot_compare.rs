//! Two adapters as a picture: which of their directions are shared (Hu et al. 2021, figure 3), and what each rank costs for their sum.

use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;

use super::plot::{FONT, onto_file, shade};
use crate::Result;
use crate::report::CompareReport;

/// Draws to a file that does not exist yet, as SVG or PNG by its name.
///
/// # Errors
/// `U-001` for another name, `U-002` if the file exists, `E-002` if it cannot be written.
pub(in super::super) fn draw(report: &CompareReport, path: &Path) -> Result<()> {
    onto_file(path, (1200, 460), &Figure(report))
}

struct Figure<'r>(&'r CompareReport);

impl super::plot::Picture for Figure<'_> {
    fn onto<D: DrawingBackend>(
        &self,
        area: &DrawingArea<D, Shift>,
    ) -> std::result::Result<(), DrawingAreaErrorKind<D::ErrorType>> {
        area.fill(&WHITE)?;
        let area =
            area.margin(8, 0, 0, 0).titled(&format!("{}: cosine {:.3}", self.0.relation, self.0.together.cosine), (FONT, 20))?;
        let parts = area.split_evenly((1, 3));
        if let [outputs, inputs, cost] = &parts[..] {
            similarity(outputs, "output directions in common", &self.0.output_similarity)?;
            similarity(inputs, "input directions in common", &self.0.input_similarity)?;
            truncation(cost, self.0)?;
        }
        area.present()
    }
}

/// φ(i, j) from pale, 0, to dark, 1.
fn similarity<D: DrawingBackend>(
    area: &DrawingArea<D, Shift>,
    caption: &str,
    grid: &[Vec<f64>],
) -> std::result::Result<(), DrawingAreaErrorKind<D::ErrorType>> {
    let (high, wide) = (grid.len().max(1), grid.first().map_or(1, Vec::len).max(1));
    let mut chart = ChartBuilder::on(area)
        .caption(caption, (FONT, 16))
        .margin(10)
        .x_label_area_size(40)
        .y_label_area_size(50)
        .build_cartesian_2d(0.5..wide as f64 + 0.5, 0.5..high as f64 + 0.5)?;
    let whole = |x: &f64| if (x - x.round()).abs() < 1e-6 { format!("{x:.0}") } else { String::new() };
    chart
        .configure_mesh()
        .disable_mesh()
        .x_desc("first j of the second")
        .y_desc("first i of the first")
        .x_label_formatter(&whole)
        .y_label_formatter(&whole)
        .label_style((FONT, 13))
        .draw()?;
    for (i, row) in grid.iter().enumerate() {
        for (j, value) in row.iter().enumerate() {
            let cell = [(j as f64 + 0.5, i as f64 + 0.5), (j as f64 + 1.5, i as f64 + 1.5)];
            chart.draw_series(std::iter::once(Rectangle::new(cell, shade(*value).filled())))?;
        }
    }
    Ok(())
}

fn truncation<D: DrawingBackend>(
    area: &DrawingArea<D, Shift>,
    report: &CompareReport,
) -> std::result::Result<(), DrawingAreaErrorKind<D::ErrorType>> {
    let highest = report.truncation.last().map_or(1, |one| one.rank);
    let mut chart = ChartBuilder::on(area)
        .caption("error of the sum at a rank", (FONT, 16))
        .margin(10)
        .x_label_area_size(40)
        .y_label_area_size(50)
        .build_cartesian_2d(0.0..highest as f64, 0.0..1.0)?;
    chart
        .configure_mesh()
        .x_desc("rank")
        .y_desc("share of |D1 + D2|")
        .x_label_formatter(&|x| format!("{x:.0}"))
        .light_line_style(WHITE)
        .label_style((FONT, 13))
        .draw()?;
    let color = shade(0.8);
    let points = || std::iter::once((0.0, 1.0)).chain(report.truncation.iter().map(|one| (one.rank as f64, one.error)));
    chart.draw_series(LineSeries::new(points(), color.stroke_width(2)))?;
    chart.draw_series(points().map(|point| Circle::new(point, 3, color.filled())))?;
    Ok(())
}
