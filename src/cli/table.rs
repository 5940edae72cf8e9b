//! Columns as wide as they need to be.

use crate::control::text::printable;

/// Rows of cells. Cells are made printable.
pub(super) struct Table<const N: usize> {
    /// Whether a column has numbers, which stand to the right.
    is_number: [bool; N],
    rows: Vec<[String; N]>,
}

impl<const N: usize> Table<N> {
    /// A table with a headline. `>` marks a column of numbers.
    pub(super) fn new(names: [&str; N]) -> Self {
        Self {
            is_number: names.map(|name| name.starts_with('>')),
            rows: vec![names.map(|name| name.trim_start_matches('>').into())],
        }
    }

    /// A table without a headline, of text.
    pub(super) fn without_names() -> Self {
        Self {
            is_number: [false; N],
            rows: Vec::new(),
        }
    }

    /// Adds a row.
    pub(super) fn push(&mut self, row: [String; N]) {
        self.rows.push(row.map(|cell| printable(&cell)));
    }

    /// All lines, each with its end.
    pub(super) fn text(&self) -> String {
        let lengths = |column: usize| self.rows.iter().map(move |row| row[column].chars().count());
        let widths: [_; N] = std::array::from_fn(|column| lengths(column).max().unwrap_or(0));
        let mut text = String::new();
        for row in &self.rows {
            let cells = (0..N).map(|column| {
                let (cell, width) = (&row[column], widths[column]);
                match self.is_number[column] {
                    true => format!("{cell:>width$}"),
                    false => format!("{cell:<width$}"),
                }
            });
            let line = cells.collect::<Vec<_>>().join("  ");
            text += line.trim_end();
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_stands_to_the_left_and_numbers_to_the_right() {
        let mut table = Table::new(["NAME", ">N", "WHY"]);
        table.push(["zürich".into(), "7".into(), String::new()]);
        table.push(["a\x07".into(), "1024".into(), "so".into()]);
        let expected = "
NAME       N  WHY
zürich     7
a\\u{7}  1024  so
";
        assert_eq!(table.text(), expected.trim_start_matches('\n'));
    }
}
