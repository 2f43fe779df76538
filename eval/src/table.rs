//! Tables for people: aligned in a terminal, and still aligned as Markdown.

/// A table under construction.
#[derive(Debug, Clone)]
pub(crate) struct Table {
    head: Vec<String>,
    /// Numbers are flush right.
    right: Vec<bool>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these columns; a name that begins with `>` is flush right.
    pub(crate) fn new<S: AsRef<str>>(columns: &[S]) -> Self {
        let names = columns.iter().map(AsRef::as_ref);
        Self {
            head: names.clone().map(|name| name.strip_prefix('>').unwrap_or(name).to_string()).collect(),
            right: names.map(|name| name.starts_with('>')).collect(),
            rows: Vec::new(),
        }
    }

    /// Adds a row; cells that are missing are empty.
    pub(crate) fn row(&mut self, mut cells: Vec<String>) {
        cells.resize(self.head.len(), String::new());
        self.rows.push(cells);
    }

    /// Whether there is no row.
    pub(crate) fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// For a terminal: columns two spaces apart.
    pub(crate) fn plain(&self) -> String {
        let widths = self.widths(str::to_string);
        let line = |cells: &[String]| {
            let padded: Vec<String> =
                cells.iter().enumerate().map(|(i, cell)| pad(cell, widths[i], self.right[i])).collect();
            padded.join("  ").trim_end().to_string()
        };
        std::iter::once(&self.head).chain(&self.rows).map(|row| line(row) + "\n").collect()
    }

    /// As a Markdown table.
    pub(crate) fn markdown(&self) -> String {
        let widths = self.widths(escape);
        let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
        let cells = |row: &[String]| {
            let padded = row.iter().enumerate().map(|(i, cell)| pad(&escape(cell), widths[i], self.right[i]));
            line(padded.collect())
        };
        let rule = widths.iter().zip(&self.right).map(|(&width, &right)| {
            if right { format!("{}:", "-".repeat(width.max(2) - 1)) } else { "-".repeat(width) }
        });
        let rule = line(rule.collect());
        cells(&self.head) + &rule + &self.rows.iter().map(|row| cells(row)).collect::<String>()
    }

    fn widths(&self, shown: impl Fn(&str) -> String) -> Vec<usize> {
        let width = |column: usize| {
            let cells = std::iter::once(&self.head).chain(&self.rows).map(|row| shown(&row[column]).chars().count());
            cells.max().unwrap_or(0).max(3)
        };
        (0..self.head.len()).map(width).collect()
    }
}

fn pad(cell: &str, width: usize, right: bool) -> String {
    if right { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
}

/// What would end a cell or a line does not.
fn escape(cell: &str) -> String {
    cell.replace('|', "\\|").replace(['\n', '\r'], " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Table {
        let mut table = Table::new(&["run", ">top-1"]);
        table.row(vec!["a".into(), "9.5".into()]);
        table.row(vec!["long|name".into(), "62.50".into()]);
        table.row(vec!["b".into()]);
        table
    }

    #[test]
    fn plain_columns_line_up() {
        assert_eq!(example().plain(), "run        top-1\na            9.5\nlong|name  62.50\nb\n");
    }

    #[test]
    fn markdown_columns_line_up_and_bars_are_escaped() {
        let lines = [
            "| run        | top-1 |",
            "| ---------- | ----: |",
            "| a          |   9.5 |",
            "| long\\|name | 62.50 |",
            "| b          |       |",
        ];
        assert_eq!(example().markdown().lines().collect::<Vec<_>>(), lines);
    }
}
