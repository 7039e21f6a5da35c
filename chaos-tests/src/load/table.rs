//! Columns for people.

/// Prints rows under heads; numbers stand to the right.
pub fn print(heads: &[&str], rows: &[Vec<String>]) {
    print!("{}", lay_out(heads, rows));
}

fn lay_out(heads: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain([heads[column].chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..heads.len()).map(width).collect();
    let heads: Vec<String> = heads.iter().map(|&head| head.to_owned()).collect();
    let mut text = String::new();
    for row in std::iter::once(&heads).chain(rows) {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, &width)| pad(cell, width)).collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

fn pad(cell: &str, width: usize) -> String {
    if cell.starts_with(|first: char| first.is_ascii_digit()) {
        format!("{cell:>width$}")
    } else {
        format!("{cell:<width$}")
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let text = super::lay_out(&["a", "n"], &[vec!["long".into(), "7".into()], vec!["x".into(), "123".into()]]);
        assert_eq!(text, "a     n\nlong    7\nx     123\n");
    }
}
