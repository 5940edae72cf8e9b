//! The results as text, for a terminal.

use crate::results::{Cell, Results, Row};

/// Widest line, in characters, as far as a single figure's column fits.
pub const WIDTH_MAX: usize = 120;

/// Between two columns.
const GAP: &str = "   ";

/// One column: two lines of heading, and a text for each target.
struct Column {
    heading: [String; 2],
    texts: Vec<String>,
    /// Whether texts are aligned to the left; numbers are not.
    left: bool,
}

impl Column {
    fn width(&self) -> usize {
        let texts = self.heading.iter().chain(&self.texts);
        texts.map(|text| chars(text)).max().unwrap_or(0)
    }

    fn cell(&self, text: &str) -> String {
        let padding = " ".repeat(self.width() - chars(text));
        if self.left {
            format!("{text}{padding}")
        } else {
            format!("{padding}{text}")
        }
    }
}

/// All results, a block of lines for each group of rows: median, (minimum –
/// maximum) where there are several samples, and the median's ratio to that of
/// the target `baseline`.
pub fn render(results: &Results, baseline: &str) -> String {
    let mut text = String::new();
    for rows in results.rows.chunk_by(|a, b| a.group == b.group) {
        text.push_str(&group(results, rows, baseline));
        text.push('\n');
    }
    for target in &results.targets {
        if let Some(reason) = &target.missing {
            text.push_str(&format!("{} was left out: {reason}\n", target.key));
        }
    }
    text
}

fn group(results: &Results, rows: &[Row], baseline: &str) -> String {
    let keys: Vec<&str> = results
        .targets
        .iter()
        .map(|target| target.key.as_str())
        .filter(|key| rows.iter().any(|row| results.cell(&row.key, key).is_some()))
        .collect();
    let names = Column {
        heading: [String::new(), String::new()],
        texts: keys.iter().map(|key| key.to_string()).collect(),
        left: true,
    };
    let figures = rows.iter().map(|row| figure(results, row, &keys, baseline));
    let title = rows.first().map_or("", |row| row.group.as_str());
    let mut text = format!("{title}\n");
    for block in blocks(figures.collect(), names.width()) {
        let mut columns = vec![&names];
        columns.extend(block.iter().flatten());
        let mut line = |cells: Vec<String>| {
            let line = format!("  {}", cells.join(GAP));
            text.push_str(line.trim_end());
            text.push('\n');
        };
        for number in [0, 1] {
            line(columns.iter().map(|c| c.cell(&c.heading[number])).collect());
        }
        for number in 0..keys.len() {
            line(columns.iter().map(|c| c.cell(&c.texts[number])).collect());
        }
    }
    text
}

/// Puts figures side by side as long as they fit.
fn blocks(figures: Vec<Vec<Column>>, names_width: usize) -> Vec<Vec<Vec<Column>>> {
    let mut blocks: Vec<Vec<Vec<Column>>> = Vec::new();
    let mut width = WIDTH_MAX + 1;
    for figure in figures {
        let own: usize = figure
            .iter()
            .map(|column| chars(GAP) + column.width())
            .sum();
        if width + own > WIDTH_MAX {
            blocks.push(Vec::new());
            width = 2 + names_width;
        }
        width += own;
        if let Some(block) = blocks.last_mut() {
            block.push(figure);
        }
    }
    blocks
}

/// The columns of one figure: median, spread if there is any, ratio if there
/// is something to compare with.
fn figure(results: &Results, row: &Row, keys: &[&str], baseline: &str) -> Vec<Column> {
    let cells: Vec<Option<&Cell>> = keys.iter().map(|key| results.cell(&row.key, key)).collect();
    let medians: Vec<Option<f64>> = cells
        .iter()
        .map(|cell| cell.and_then(Cell::median))
        .collect();
    let mut columns = vec![Column {
        heading: [row.title.clone(), row.unit.clone()],
        texts: medians
            .iter()
            .map(|median| median.map_or("-".into(), number))
            .collect(),
        left: false,
    }];
    if cells.iter().flatten().any(|cell| cell.samples.len() > 1) {
        let spread = |cell: &Option<&Cell>| cell.and_then(spread).unwrap_or_default();
        columns.push(Column {
            heading: ["min–max".into(), String::new()],
            texts: cells.iter().map(spread).collect(),
            left: true,
        });
    }
    let base = results.cell(&row.key, baseline).and_then(Cell::median);
    let base = base.filter(|base| *base > 0.0 && has_ratio(row));
    if let Some(base) = base {
        let ratio = |median: &Option<f64>| {
            median.map_or_else(String::new, |median| ratio_text(median / base))
        };
        columns.push(Column {
            heading: [format!("/{baseline}"), String::new()],
            texts: medians.iter().map(ratio).collect(),
            left: false,
        });
    }
    columns
}

/// Whether twice as much means anything: for what is usually none it does not.
pub fn has_ratio(row: &Row) -> bool {
    !["retransmits", "lost", "loss_percent"]
        .iter()
        .any(|figure| row.key.ends_with(figure))
}

fn spread(cell: &Cell) -> Option<String> {
    let minimum = cell.samples.iter().copied().min_by(f64::total_cmp)?;
    let maximum = cell.samples.iter().copied().max_by(f64::total_cmp)?;
    Some(format!("{}–{}", number(minimum), number(maximum)))
}

/// Medians of an older run and this one, and their ratio, for every cell that
/// both have.
pub fn compare(old: &Results, new: &Results) -> String {
    let mut lines = Vec::new();
    for row in &new.rows {
        for target in &new.targets {
            let median = |results: &Results| {
                let cell = results.cell(&row.key, &target.key);
                cell.and_then(Cell::median)
            };
            let (Some(before), Some(after)) = (median(old), median(new)) else {
                continue;
            };
            let ratio = if before > 0.0 {
                ratio_text(after / before)
            } else {
                String::new()
            };
            lines.push([
                row.key.clone(),
                target.key.clone(),
                number(before),
                number(after),
                ratio,
            ]);
        }
    }
    if lines.is_empty() {
        return "nothing was measured in both runs\n".into();
    }
    let headings = ["row", "target", "old", "new", "new/old"];
    let columns: Vec<Column> = headings
        .iter()
        .enumerate()
        .map(|(index, heading)| Column {
            heading: [heading.to_string(), String::new()],
            texts: lines.iter().map(|line| line[index].clone()).collect(),
            left: index < 2,
        })
        .collect();
    let mut text = String::new();
    let texts =
        (0..lines.len()).map(|line| columns.iter().map(|c| c.cell(&c.texts[line])).collect());
    let heading: Vec<String> = columns.iter().map(|c| c.cell(&c.heading[0])).collect();
    for cells in std::iter::once(heading).chain(texts) {
        text.push_str(cells.join(GAP).trim_end());
        text.push('\n');
    }
    text
}

/// A number with three digits that matter, or all before the point.
pub fn number(value: f64) -> String {
    let decimals = match value.abs() {
        0.0 => 0,
        size if size >= 99.95 => 0,
        size if size >= 9.995 => 1,
        size if size >= 0.0995 => 2,
        _ => 3,
    };
    format!("{value:.decimals$}")
}

/// A ratio as it is shown.
pub fn ratio_text(ratio: f64) -> String {
    format!("{}×", number(ratio))
}

fn chars(text: &str) -> usize {
    text.chars().count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::{Better, Target};

    fn results(samples: &[(&str, &str, &[f64])]) -> Results {
        let row = |key: &str, title: &str, unit: &str| Row {
            key: key.into(),
            group: key.split_once('/').unwrap().0.into(),
            title: title.into(),
            unit: unit.into(),
            better: Better::Higher,
        };
        let target = |key: &str| Target {
            key: key.into(),
            title: key.into(),
            detail: String::new(),
            missing: (key == "epoll").then(|| "no such flag".into()),
        };
        Results {
            started: String::new(),
            version: String::new(),
            machine: Vec::new(),
            settings: Vec::new(),
            targets: ["vxlan", "uring", "epoll"].map(target).into(),
            rows: vec![
                row("tcp/gbit", "throughput", "Gbit/s"),
                row("tcp/cpu", "CPU", "s/GB"),
                row("idle/cpu", "CPU", "%"),
            ],
            cells: samples
                .iter()
                .map(|(row, target, samples)| Cell {
                    row: row.to_string(),
                    target: target.to_string(),
                    samples: samples.to_vec(),
                })
                .collect(),
        }
    }

    #[test]
    fn groups_are_aligned() {
        let results = results(&[
            ("tcp/gbit", "vxlan", &[20.0, 30.0, 10.0]),
            ("tcp/gbit", "uring", &[9.0, 8.0, 10.5]),
            ("tcp/cpu", "uring", &[0.5]),
            ("idle/cpu", "uring", &[0.0]),
        ]);
        let expected = "
tcp
          throughput   min–max     /vxlan    CPU
              Gbit/s                        s/GB
  vxlan         20.0   10.0–30.0    1.00×      -
  uring         9.00   8.00–10.5   0.450×   0.50

idle
          CPU
            %
  uring     0

epoll was left out: no such flag
";
        let expected = expected
            .trim_start_matches('\n')
            .replace("0.450×", " 0.45×");
        assert_eq!(render(&results, "vxlan"), expected);
    }

    #[test]
    fn what_does_not_fit_goes_below() {
        let mut results = results(&[]);
        results.rows.clear();
        for number in 0..20 {
            let key = format!("tcp/figure-{number}");
            results.rows.push(Row {
                key: key.clone(),
                group: "TCP".into(),
                title: format!("figure {number}"),
                unit: "unit".into(),
                better: Better::Lower,
            });
            results.cells.push(Cell {
                row: key,
                target: "uring".into(),
                samples: vec![1.0, 2.0],
            });
        }
        let text = render(&results, "vxlan");
        assert!(text.lines().all(|line| chars(line) <= WIDTH_MAX), "{text}");
        for number in 0..20 {
            assert!(text.contains(&format!("figure {number} ")), "{text}");
        }
        assert_eq!(text.matches("TCP").count(), 1);
    }

    #[test]
    fn runs_are_compared_where_both_measured() {
        let old = results(&[
            ("tcp/gbit", "uring", &[8.0]),
            ("tcp/gbit", "vxlan", &[20.0]),
            ("idle/cpu", "uring", &[0.0]),
        ]);
        let new = results(&[
            ("tcp/gbit", "uring", &[12.0]),
            ("tcp/cpu", "uring", &[1.0]),
            ("idle/cpu", "uring", &[1.0]),
        ]);
        let expected = "
row        target    old    new   new/old
tcp/gbit   uring    8.00   12.0     1.50×
idle/cpu   uring       0   1.00
";
        assert_eq!(compare(&old, &new), expected.trim_start_matches('\n'));
        assert!(compare(&results(&[]), &new).contains("nothing"));
    }

    #[test]
    fn numbers_have_three_digits() {
        let cases = [
            (0.0, "0"),
            (0.0123, "0.012"),
            (0.5, "0.50"),
            (9.99, "9.99"),
            (9.999, "10.0"),
            (99.94, "99.9"),
            (99.96, "100"),
            (123_456.7, "123457"),
        ];
        for (value, text) in cases {
            assert_eq!(number(value), text);
        }
    }
}
