//! Plots for docs/performance.md.

use std::error::Error;
use std::io;
use std::path::Path;

use plotters::prelude::*;

use crate::report::{Report, Series};

const SIZE: (u32, u32) = (760, 420);
const COLOURS: [RGBColor; 6] = [
    RGBColor(0x1f, 0x77, 0xb4),
    RGBColor(0xd6, 0x27, 0x28),
    RGBColor(0x2c, 0xa0, 0x2c),
    RGBColor(0x94, 0x67, 0xbd),
    RGBColor(0xff, 0x7f, 0x0e),
    RGBColor(0x7f, 0x7f, 0x7f),
];

/// Draws whatever there are measurements for.
pub(crate) fn all(report: &Report, directory: &Path) -> io::Result<()> {
    let of =
        |row: &str| -> Vec<&Series> { report.series.iter().filter(|s| s.row == row).collect() };
    let draw = |name: &str, title: &str, series: Vec<&Series>, plot: Plot| {
        if series.is_empty() {
            return Ok(());
        }
        let path = directory.join(name);
        plot(&path, title, &series).map_err(|e| io::Error::other(format!("{name}: {e}")))
    };
    // Of those who give verdicts the time until that, of nobody the time until a process is there.
    let latency = of("latency")
        .into_iter()
        .filter(|s| s.what.contains("in force") || s.on == "none")
        .collect();
    draw(
        "latency.svg",
        "From mkdir until the verdict is in force",
        latency,
        distribution,
    )?;
    let packets = of("packets")
        .into_iter()
        .filter(|s| s.on != "none")
        .collect();
    draw("packets.svg", "Cost added to a packet", packets, bars)?;
    let start = of("start")
        .into_iter()
        .filter(|s| s.what.ends_with("in force"))
        .collect();
    draw(
        "start.svg",
        "Start of an agent, until all is in force",
        start,
        bars,
    )?;
    let burst = of("burst")
        .into_iter()
        .filter(|s| s.unit == " ms")
        .collect();
    draw("burst.svg", "A burst of control groups", burst, bars)?;
    let requests = of("relay")
        .into_iter()
        .filter(|s| s.unit == " µs")
        .collect();
    draw(
        "relay.svg",
        "A connection, a question and its answer",
        requests,
        distribution,
    )?;
    let flood = of("flood")
        .into_iter()
        .filter(|s| s.unit == " µs")
        .collect();
    draw(
        "flood.svg",
        "An update, quiet and while another user floods",
        flood,
        distribution,
    )
}

type Plot = fn(&Path, &str, &[&Series]) -> Result<(), Box<dyn Error>>;

/// Share of the samples below each value, on a logarithmic axis.
fn distribution(path: &Path, title: &str, series: &[&Series]) -> Result<(), Box<dyn Error>> {
    let values = || series.iter().flat_map(|s| s.quantiles.iter().copied());
    let least = values().fold(f64::INFINITY, f64::min).max(0.1) * 0.9;
    let most = values().fold(0.0, f64::max).max(1.0) * 1.1;
    let root = SVGBackend::new(path, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let unit = series.first().map_or("", |s| s.unit.trim());
    let mut chart = ChartBuilder::on(&root)
        .caption(title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(50)
        .build_cartesian_2d((least..most).log_scale(), 0.0..100.0)?;
    chart
        .configure_mesh()
        .x_desc(unit)
        .y_desc("% of samples")
        .draw()?;
    for (n, one) in series.iter().enumerate() {
        let colour = COLOURS[n % COLOURS.len()];
        let last = one.quantiles.len().saturating_sub(1).max(1) as f64;
        let points = one
            .quantiles
            .iter()
            .enumerate()
            .map(|(i, &value)| (value, 100.0 * i as f64 / last));
        chart
            .draw_series(LineSeries::new(points, colour.stroke_width(2)))?
            .label(format!("{}: {}", one.on, one.what))
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerRight)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    root.present()?;
    Ok(())
}

/// One horizontal bar for each series' median.
fn bars(path: &Path, title: &str, series: &[&Series]) -> Result<(), Box<dyn Error>> {
    let most = series.iter().map(|s| s.summary.median).fold(1.0, f64::max) * 1.15;
    let height = 90 + 26 * series.len() as u32;
    let root = SVGBackend::new(path, (SIZE.0, height)).into_drawing_area();
    root.fill(&WHITE)?;
    let rows = series.len() as f64;
    let mut chart = ChartBuilder::on(&root)
        .caption(title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(390)
        .build_cartesian_2d(0.0..most, 0.0..rows)?;
    let unit = series.first().map_or("", |s| s.unit.trim());
    chart
        .configure_mesh()
        .disable_y_mesh()
        .disable_y_axis()
        .x_desc(format!("median, {unit}"))
        .draw()?;
    let mut names: Vec<&str> = Vec::new();
    for one in series {
        if !names.contains(&one.on) {
            names.push(one.on);
        }
    }
    for (n, one) in series.iter().enumerate() {
        let bottom = rows - n as f64 - 0.85;
        let position = names.iter().position(|name| *name == one.on).unwrap_or(0);
        let colour = COLOURS[position % COLOURS.len()];
        let corners = [(0.0, bottom), (one.summary.median.max(0.0), bottom + 0.7)];
        chart.draw_series([Rectangle::new(corners, colour.filled())])?;
        let (_, y) = chart.backend_coord(&(0.0, bottom + 0.35));
        let style = ("sans-serif", 12).into_font();
        root.draw(&Text::new(
            format!("{}: {}", one.on, one.what),
            (14, y - 6),
            style,
        ))?;
    }
    root.present()?;
    Ok(())
}
