//! Columns as wide as they need to be.

use crate::control::text::printable;

/// A table with a headline. Cells are made printable.
pub(super) struct Table<const N: usize> {
    /// Each column's name, and whether it has numbers, which stand to the right.
    columns: [(&'static str, bool); N],
    rows: Vec<[String; N]>,
}

impl<const N: usize> Table<N> {
    /// A table with these columns and no rows. A name behind `>` is that of a column
    /// of numbers.
    pub(super) fn new(names: [&'static str; N]) -> Self {
        Self {
            columns: names.map(|name| match name.strip_prefix('>') {
                Some(name) => (name, true),
                None => (name, false),
            }),
            rows: Vec::new(),
        }
    }

    /// Adds a row.
    pub(super) fn push(&mut self, row: [String; N]) {
        self.rows
            .push(row.map(|cell| printable(&cell).into_owned()));
    }

    /// All lines, each with its end.
    pub(super) fn text(&self) -> String {
        let mut widths = self.columns.map(|(name, _)| width(name));
        for row in &self.rows {
            for (widest, cell) in widths.iter_mut().zip(row) {
                *widest = (*widest).max(width(cell));
            }
        }
        let mut text = String::new();
        self.line(&mut text, widths, self.columns.map(|(name, _)| name));
        for row in &self.rows {
            self.line(&mut text, widths, row.each_ref().map(String::as_str));
        }
        text
    }

    fn line(&self, text: &mut String, widths: [usize; N], cells: [&str; N]) {
        let start = text.len();
        for (index, (cell, column_width)) in cells.into_iter().zip(widths).enumerate() {
            if index > 0 {
                text.push_str("  ");
            }
            let padding = column_width - width(cell);
            let (before, after) = match self.columns[index].1 {
                true => (padding, 0),
                false => (0, padding),
            };
            text.extend(std::iter::repeat_n(' ', before));
            text.push_str(cell);
            text.extend(std::iter::repeat_n(' ', after));
        }
        let end = start + text[start..].trim_end().len();
        text.truncate(end);
        text.push('\n');
    }
}

fn width(text: &str) -> usize {
    text.chars().count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_to_the_left_and_numbers_to_the_right() {
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
