//! One figure as a picture: a bar for each median, a whisker from the least
//! sample to the greatest, and a dot for each sample.

use std::fmt::Display;
use std::ops::Range;

use fastvpn::error::{Error, Result};
use maud::{Markup, PreEscaped, html};
use plotters::coord::Shift;
use plotters::coord::ranged1d::{AsRangedCoord, Ranged, ValueFormatter};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::figures::{BASELINE, Bar, Figure};
use super::palette::{self, FAINT, Family, GRID, Ink, TEXT};
use crate::results::{Better, Target};
use crate::table::{number, ratio_text};

/// Pixels of the drawing per pixel of the page: the backend knows whole ones only.
const SCALE: u32 = 2;

/// In pixels of the drawing.
const WIDTH: u32 = 600 * SCALE;
const NAMES_WIDTH: u32 = 190 * SCALE;
const NUMBER_WIDTH: u32 = 60 * SCALE;
const TOP: u32 = 22 * SCALE;
const BAR_PITCH: u32 = 25 * SCALE;
const AXIS_HEIGHT: u32 = 36 * SCALE;
const GAP: i32 = 8 * SCALE as i32;
/// The backend divides sizes of text by 1.24.
const TEXT_SIZE: u32 = 15 * SCALE;
const SMALL_TEXT_SIZE: u32 = 14 * SCALE;
const DOT_RADIUS: u32 = 4;

/// Share of a bar's pitch above and below it.
const BAR_MARGIN: f64 = 0.2;
/// Share of a bar's pitch that samples are moved from its middle, so that equal
/// ones show.
const SAMPLE_OFFSETS: [f64; 3] = [0.0, -0.13, 0.13];

/// Medians further apart than this are drawn on a logarithmic scale.
const LINEAR_SPREAD_MAX: f64 = 100.0;

/// Names longer than this are cut, in characters; the table has them whole.
const NAME_CHARS_MAX: usize = 25;

const TICKS: usize = 6;

/// The chart of a figure; `id` is unique on the page.
///
/// # Errors
/// When it cannot be drawn.
pub fn render(figure: &Figure<'_>, targets: &[Target], id: &str) -> Result<Markup> {
    let mut svg = String::new();
    draw(figure, targets, (WIDTH, height(figure)), &mut svg)?;
    let (title_id, description_id) = (format!("{id}-title"), format!("{id}-description"));
    let labels = format!("{title_id} {description_id}");
    Ok(html! {
        svg role="img" xmlns="http://www.w3.org/2000/svg" viewBox=(view_box(figure))
            aria-labelledby=(labels) {
            title id=(title_id) { (title(figure)) }
            desc id=(description_id) { (description(figure)) }
            (PreEscaped(svg))
        }
    })
}

fn height(figure: &Figure<'_>) -> u32 {
    TOP + BAR_PITCH * u32::try_from(figure.bars.len()).unwrap_or(0) + AXIS_HEIGHT
}

/// What of the plane a figure's chart takes up.
pub fn view_box(figure: &Figure<'_>) -> String {
    format!("0 0 {WIDTH} {}", height(figure))
}

fn title(figure: &Figure<'_>) -> String {
    let row = figure.row;
    format!("{}: {}, {}", row.group, row.title, row.unit)
}

/// The chart in words.
fn description(figure: &Figure<'_>) -> String {
    let better = better(figure.row.better);
    let bars = figure.bars.iter().map(|bar| {
        let ratio = bar.ratio.map_or_else(String::new, |ratio| {
            format!(", {} {BASELINE}", ratio_text(ratio))
        });
        format!(
            "{}: median {} of {} samples from {} to {}{ratio}.",
            bar.target.title,
            number(bar.median),
            bar.samples.len(),
            number(bar.min),
            number(bar.max)
        )
    });
    let bars: Vec<String> = bars.collect();
    format!("{better}. {}", bars.join(" "))
}

/// Which way is better, in words.
pub fn better(better: Better) -> &'static str {
    match better {
        Better::Higher => "More is better",
        Better::Lower => "Less is better",
    }
}

/// What the axis shows.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Scale {
    /// From nothing, or what is below nothing.
    Linear(Range<f64>),
    /// From a power of ten below everything.
    Logarithmic(Range<f64>),
}

/// The axis that fits some bars: logarithmic if their medians are far apart.
pub(super) fn scale(bars: &[Bar<'_>]) -> Scale {
    let least = |values: &mut dyn Iterator<Item = f64>| values.fold(f64::INFINITY, f64::min);
    let min = least(&mut bars.iter().map(|bar| bar.min));
    let median_min = least(&mut bars.iter().map(|bar| bar.median));
    let most = |values: &mut dyn Iterator<Item = f64>| values.fold(f64::NEG_INFINITY, f64::max);
    let max = most(&mut bars.iter().map(|bar| bar.max));
    let median_max = most(&mut bars.iter().map(|bar| bar.median));
    // Below, a quotient of ordinary numbers cannot become infinite.
    let far_apart = min > 1e-9 && median_max / median_min > LINEAR_SPREAD_MAX;
    if far_apart && max.is_finite() {
        // A little below the least, or its bar would have no length.
        let from = 10_f64.powf((min * 0.8).log10().floor());
        // And a hair below that, or rounding may cost the axis its first mark.
        return Scale::Logarithmic(from * (1.0 - 1e-9)..max * 1.15);
    }
    let from = if min < 0.0 { min * 1.04 } else { 0.0 };
    let to = if max > 0.0 { max * 1.04 } else { 0.0 };
    match to - from > 1e-9 && (to - from).is_finite() {
        true => Scale::Linear(from..to),
        false => Scale::Linear(0.0..1.0),
    }
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

fn draw(figure: &Figure<'_>, targets: &[Target], size: (u32, u32), svg: &mut String) -> Result<()> {
    let area = SVGBackend::with_string(svg, size).into_drawing_area();
    match scale(&figure.bars) {
        Scale::Linear(range) => {
            let base = range.start.max(0.0);
            draw_on(&area, figure, targets, range, base, "")?;
        }
        Scale::Logarithmic(range) => {
            let base = range.start;
            let range = range.log_scale();
            draw_on(&area, figure, targets, range, base, ", logarithmic")?;
        }
    }
    area.present().map_err(failed)
}

/// Draws on a given axis; bars begin at `base`.
fn draw_on<X>(
    area: &Area<'_>,
    figure: &Figure<'_>,
    targets: &[Target],
    range: X,
    base: f64,
    note: &str,
) -> Result<()>
where
    X: AsRangedCoord<Value = f64>,
    X::CoordDescType: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    let columns = if figure.has_ratios() { 2 } else { 1 };
    let bars = figure.bars.len() as f64;
    let mut chart = ChartBuilder::on(area)
        .margin_top(TOP)
        .margin_right(NUMBER_WIDTH * columns)
        .set_label_area_size(LabelAreaPosition::Left, NAMES_WIDTH)
        .set_label_area_size(LabelAreaPosition::Bottom, AXIS_HEIGHT)
        // The first bar is on top.
        .build_cartesian_2d(range, bars..0.0)
        .map_err(failed)?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .disable_y_axis()
        .x_labels(TICKS)
        .x_max_light_lines(0)
        .x_label_formatter(&|value| tick(*value))
        .x_desc(format!("{}{note}", figure.row.unit))
        .axis_style(GRID.light.stroke_width(SCALE))
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID.light.stroke_width(SCALE))
        .label_style(text(SMALL_TEXT_SIZE, FAINT, HPos::Center))
        .axis_desc_style(text(SMALL_TEXT_SIZE, FAINT, HPos::Center))
        .draw()
        .map_err(failed)?;

    for (place, bar) in figure.bars.iter().enumerate() {
        let top = place as f64;
        let (middle, bottom) = (top + 0.5, top + 1.0 - BAR_MARGIN);
        let color = palette::color(bar.target, targets).light;
        let corners = [(base, top + BAR_MARGIN), (bar.median, bottom)];
        let whisker = |points: [(f64, f64); 2]| {
            PathElement::new(points.to_vec(), TEXT.light.stroke_width(SCALE))
        };
        chart
            .draw_series([Rectangle::new(corners, color.filled())])
            .map_err(failed)?;
        if bar.max > bar.min {
            let end = |at| whisker([(at, middle - 0.15), (at, middle + 0.15)]);
            let line = whisker([(bar.min, middle), (bar.max, middle)]);
            chart
                .draw_series([line, end(bar.min), end(bar.max)])
                .map_err(failed)?;
        }
        let offsets = SAMPLE_OFFSETS.iter().cycle();
        let dots = bar.samples.iter().zip(offsets).map(|(sample, offset)| {
            let at = (*sample, middle + offset);
            // A rim in the paper's colour keeps them apart from bar and whisker.
            EmptyElement::at(at)
                + Circle::new((0, 0), DOT_RADIUS + 1, palette::PAPER.light.filled())
                + Circle::new((0, 0), DOT_RADIUS, TEXT.light.filled())
        });
        chart.draw_series(dots).map_err(failed)?;

        let (left, y) = chart.backend_coord(&(base, middle));
        label(area, bar, (left - GAP, y))?;
        numbers(area, bar, y, columns)?;
    }
    headings(area, columns)
}

/// Who it is, before the bar.
fn label(area: &Area<'_>, bar: &Bar<'_>, at: (i32, i32)) -> Result<()> {
    let mut style = text(TEXT_SIZE, TEXT, HPos::Right);
    if palette::family(bar.target) == Family::Fastvpn {
        style.font = style.font.style(FontStyle::Bold);
    }
    let name = cut(&bar.target.title);
    area.draw_text(&name, &style, at).map_err(failed)
}

/// What it comes to, behind the bar.
fn numbers(area: &Area<'_>, bar: &Bar<'_>, y: i32, columns: u32) -> Result<()> {
    let style = text(TEXT_SIZE, TEXT, HPos::Right);
    let at = (column_end(0, columns), y);
    area.draw_text(&number(bar.median), &style, at)
        .map_err(failed)?;
    if let Some(ratio) = bar.ratio {
        let style = text(TEXT_SIZE, FAINT, HPos::Right);
        let at = (column_end(1, columns), y);
        area.draw_text(&ratio_text(ratio), &style, at)
            .map_err(failed)?;
    }
    Ok(())
}

fn headings(area: &Area<'_>, columns: u32) -> Result<()> {
    let style = text(SMALL_TEXT_SIZE, FAINT, HPos::Right);
    let y = i32::try_from(TOP / 2).unwrap_or(0);
    for (column, heading) in ["median", "/VXLAN"]
        .iter()
        .take(columns as usize)
        .enumerate()
    {
        let at = (column_end(column as u32, columns), y);
        area.draw_text(heading, &style, at).map_err(failed)?;
    }
    Ok(())
}

/// Right end of a column of numbers.
fn column_end(column: u32, columns: u32) -> i32 {
    let end = WIDTH - NUMBER_WIDTH * (columns - 1 - column);
    i32::try_from(end).unwrap_or(i32::MAX) - 2
}

fn text(size: u32, ink: Ink, align: HPos) -> TextStyle<'static> {
    ("sans-serif", size)
        .into_font()
        .color(&ink.light)
        .pos(Pos::new(align, VPos::Center))
}

/// A value on the axis.
fn tick(value: f64) -> String {
    let decimals = match value.abs() {
        size if size >= 10.0 => 1,
        size if size >= 0.1 => 2,
        _ => 4,
    };
    let text = format!("{value:.decimals$}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    // Rounding can leave a sign before nothing.
    if text == "-0" { "0" } else { text }.to_string()
}

fn cut(name: &str) -> String {
    if name.chars().count() <= NAME_CHARS_MAX {
        return name.to_string();
    }
    let start: String = name.chars().take(NAME_CHARS_MAX - 1).collect();
    format!("{}…", start.trim_end())
}

fn failed(cause: impl Display) -> Error {
    Error::new(format!("cannot draw a chart: {cause}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_short() {
        let cases = [
            (0.0, "0"),
            (-0.00001, "0"),
            (0.1 + 0.2, "0.3"),
            (0.001, "0.001"),
            (2.5, "2.5"),
            (20.0, "20"),
            (100_000.0, "100000"),
        ];
        for (value, text) in cases {
            assert_eq!(tick(value), text);
        }
    }

    #[test]
    fn long_names_are_cut() {
        let name = "é".repeat(NAME_CHARS_MAX);
        assert_eq!(cut(&name), name);
        let cut = cut(&format!("{name}é"));
        assert!(cut.ends_with('…') && cut.chars().count() == NAME_CHARS_MAX);
    }
}
