//! The screen: a tunnel in figures, its history, a table, and the keys.

use ratatui::Frame;
use ratatui::layout::{Alignment, Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::symbols::bar;
use ratatui::text::{Line, Span, Text};
use ratatui::widgets::{Cell, Paragraph, RenderDirection, Row, Sparkline, Table, Wrap};

use super::model::{Model, Shown};
use super::table::{Column, View};
use crate::cli::rates::Rates;
use crate::cli::units::{bits_per_second, duration, exactly, per_second};
use crate::control::text::printable;

/// Least columns and rows of a terminal.
const SIZE_MIN: (u16, u16) = (80, 24);

/// Columns before a graph: what it is about, and how much it is.
const LABEL_WIDTH: u16 = 10;
const VALUE_WIDTH: u16 = 17;

const ASCII_BARS: bar::Set<'_> = bar::Set {
    empty: " ",
    one_eighth: ".",
    one_quarter: ".",
    three_eighths: ":",
    half: ":",
    five_eighths: "+",
    three_quarters: "+",
    seven_eighths: "#",
    full: "#",
};

const KEYS: &str = "q quit  ? help  v view  s sort  r reverse  / filter  p pause";

const HELP: [(&str, &str); 11] = [
    ("q, Ctrl-C", "quit"),
    (
        "v, Tab, Right",
        "next view: workers, peers, drops by reason",
    ),
    ("V, Left", "the view before"),
    ("s, >", "sort by the next column"),
    ("S, <", "sort by the column before"),
    ("r", "reverse the order"),
    (
        "/",
        "show only rows with a text: Enter keeps it, Escape ends it",
    ),
    ("p, Space", "pause, and go on"),
    ("Up, Down, k, j", "scroll by a row"),
    (
        "PgUp, PgDn",
        "scroll by a page; Home, End: to the first or last row",
    ),
    ("?, h", "this help; any key leaves it"),
];

/// What a terminal can show.
#[derive(Clone, Copy, Debug)]
pub(super) struct Look {
    /// Colors, besides bold and reverse.
    pub(super) has_colors: bool,
    /// Unicode's block elements.
    pub(super) has_blocks: bool,
}

impl Look {
    fn colored(self, color: Color) -> Style {
        match self.has_colors {
            true => Style::new().fg(color),
            false => Style::new(),
        }
    }

    /// For what should not be.
    fn bad(self) -> Style {
        self.colored(Color::Red).add_modifier(Modifier::BOLD)
    }

    /// What marks the column that a table is sorted by: ascending, or descending.
    fn mark(self, is_descending: bool) -> char {
        match (self.has_blocks, is_descending) {
            (true, true) => '▼',
            (true, false) => '▲',
            (false, true) => 'v',
            (false, false) => '^',
        }
    }
}

/// A kind of history: what it is called, how its value is written, where it comes from.
type Graph = (&'static str, fn(f64) -> String, fn(&Rates) -> f64, Color);

const GRAPHS: [Graph; 5] = [
    (
        "sent",
        bits_per_second,
        |rates| rates.bits_sent,
        Color::Green,
    ),
    (
        "",
        packets_per_second,
        |rates| rates.packets_sent,
        Color::Green,
    ),
    (
        "received",
        bits_per_second,
        |rates| rates.bits_received,
        Color::Cyan,
    ),
    (
        "",
        packets_per_second,
        |rates| rates.packets_received,
        Color::Cyan,
    ),
    (
        "dropped",
        packets_per_second,
        |rates| rates.drops,
        Color::Red,
    ),
];

fn packets_per_second(rate: f64) -> String {
    per_second(rate).replace("/s", " packets/s")
}

/// Draws all of it, on a screen of any size.
pub(super) fn draw(frame: &mut Frame<'_>, model: &mut Model, look: Look) {
    let area = frame.area();
    if area.width < SIZE_MIN.0 || area.height < SIZE_MIN.1 {
        let (width, height) = SIZE_MIN;
        let text = format!(
            "fastvpn top needs {width}x{height} characters; here are {}x{}",
            area.width, area.height
        );
        let wrap = Wrap { trim: true };
        return frame.render_widget(Paragraph::new(text).wrap(wrap), area);
    }
    // A row for each on a small screen, and more on a large one.
    let graph_rows = (area.height / 18).clamp(1, 4);
    let [title, message, graphs, tabs, table, keys] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(1),
        Constraint::Length(graph_rows * GRAPHS.len() as u16),
        Constraint::Length(1),
        Constraint::Min(1),
        Constraint::Length(1),
    ])
    .areas(area);
    let bold = Style::new().add_modifier(Modifier::BOLD);
    frame.render_widget(Paragraph::new(title_of(&model.shown)).style(bold), title);
    if let Some((text, is_bad)) = model.message() {
        let style = if is_bad { look.bad() } else { bold };
        frame.render_widget(Paragraph::new(text).style(style), message);
    }
    draw_graphs(frame, model, look, graphs, graph_rows);
    frame.render_widget(Paragraph::new(tabs_of(model)), tabs);
    let place = match model.shows_help {
        true => {
            draw_help(frame, table);
            String::new()
        }
        false => draw_table(frame, model, look, table),
    };
    draw_keys(frame, model, &place, keys);
}

/// The tunnel in one line.
fn title_of(shown: &Shown) -> String {
    let status = &shown.status;
    let sessions = match shown.sessions {
        (0, _) => String::new(),
        (_, usable) => format!(", {}", exactly(usable, "session")),
    };
    printable(&format!(
        "{}  {}  MTU {}  {}{sessions}  process {}, up {}",
        status.tun,
        status.engine,
        status.mtu_bytes,
        exactly(status.peers, "peer"),
        status.pid,
        duration(status.uptime_seconds),
    ))
}

fn draw_graphs(frame: &mut Frame<'_>, model: &Model, look: Look, area: Rect, rows: u16) {
    for (index, (label, text, rate, color)) in (0..).zip(GRAPHS) {
        let line = Rect {
            y: area.y + index * rows,
            height: rows,
            ..area
        };
        let [name, value, graph] = Layout::horizontal([
            Constraint::Length(LABEL_WIDTH),
            Constraint::Length(VALUE_WIDTH),
            Constraint::Min(1),
        ])
        .spacing(1)
        .areas(line);
        frame.render_widget(Paragraph::new(label), name);
        let now = model.shown.rates.as_ref().map(rate);
        let now = now.map_or("-".into(), text);
        frame.render_widget(Paragraph::new(now).alignment(Alignment::Right), value);
        let bars = match look.has_blocks {
            true => bar::NINE_LEVELS,
            false => ASCII_BARS,
        };
        let history = model.history.iter().map(|rates| rate(rates).round() as u64);
        let sparkline = Sparkline::default()
            .data(history.take(graph.width.into()))
            .direction(RenderDirection::RightToLeft)
            .bar_set(bars)
            .style(look.colored(color));
        frame.render_widget(sparkline, graph);
    }
}

/// The views, that which is shown reversed, and how its rows are chosen.
fn tabs_of(model: &Model) -> Line<'_> {
    let mut spans = Vec::new();
    for view in View::ALL {
        let style = match view == model.view {
            true => Style::new().add_modifier(Modifier::REVERSED),
            false => Style::new(),
        };
        spans.push(Span::styled(format!(" {} ", view.title()), style));
    }
    if model.is_filtering || !model.filter.is_empty() {
        let end = if model.is_filtering { "_" } else { "" };
        let filter = printable(&model.filter);
        spans.push(Span::raw(format!("  filter: {filter}{end}")));
    }
    Line::from(spans)
}

/// Draws the rows that there is room for, and returns which these are.
fn draw_table(frame: &mut Frame<'_>, model: &mut Model, look: Look, area: Rect) -> String {
    let (view, sort) = (model.view, model.sort());
    let columns = view.columns().iter().enumerate();
    let columns: Vec<(usize, &Column)> = columns
        .filter(|(_, column)| area.width >= column.terminal_width)
        .collect();
    let headline = columns.iter().map(|(index, column)| {
        let is_descending = column.is_number != sort.is_reversed;
        let title = match *index == sort.column {
            true => format!("{}{}", column.title, look.mark(is_descending)),
            // Where the mark would be.
            false => format!("{} ", column.title),
        };
        aligned(title, column)
    });
    let headline = Row::new(headline).style(Style::new().add_modifier(Modifier::REVERSED));
    let (rows, before, count) = model.rows(area.height.saturating_sub(1).into());
    let last = before + rows.len();
    let rows = rows.into_iter().map(|row| {
        let cells = columns.iter().map(|(index, column)| {
            let Some(cell) = row.get(*index) else {
                return Cell::default();
            };
            let is_bad = column.title.starts_with("DROPS") && cell.is_some();
            let style = if is_bad { look.bad() } else { Style::new() };
            let end = if column.is_number { " " } else { "" };
            aligned(format!("{}{end}", cell.text), column).style(style)
        });
        Row::new(cells.collect::<Vec<_>>())
    });
    let widths = columns.iter().map(|(index, column)| match index {
        0 => Constraint::Fill(1),
        _ => Constraint::Length(column.width),
    });
    let table = Table::new(rows.collect::<Vec<_>>(), widths).header(headline);
    frame.render_widget(table.column_spacing(1), area);
    match (count, view) {
        (0, View::Drops) if model.filter.is_empty() => "nothing was dropped".into(),
        (0, _) => "none".into(),
        _ => format!("{}-{last} of {count}", before + 1),
    }
}

fn aligned(text: String, column: &Column) -> Cell<'static> {
    let alignment = match column.is_number {
        true => Alignment::Right,
        false => Alignment::Left,
    };
    Cell::from(Text::from(text).alignment(alignment))
}

fn draw_help(frame: &mut Frame<'_>, area: Rect) {
    let lines = HELP.map(|(keys, what)| Line::from(format!("  {keys:<16}{what}")));
    frame.render_widget(Paragraph::new(lines.to_vec()), area);
}

fn draw_keys(frame: &mut Frame<'_>, model: &Model, place: &str, area: Rect) {
    let keys = match model.is_filtering {
        true => "Enter keep the filter  Escape no filter",
        false => KEYS,
    };
    frame.render_widget(Paragraph::new(keys), area);
    let place = Paragraph::new(place).alignment(Alignment::Right);
    let width = area.width.saturating_sub(keys.len() as u16 + 1);
    let right = Rect {
        x: area.right().saturating_sub(width),
        width,
        ..area
    };
    frame.render_widget(place, right);
}
