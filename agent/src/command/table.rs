//! Rows in columns.

use std::io::{self, Write};

use unicode_width::UnicodeWidthStr;

/// What stands for nothing.
pub(super) fn dash() -> String {
    "-".to_owned()
}

/// Writes rows in columns, which are a terminal's: a character of Chinese takes two. The last one is as wide as it is.
pub(super) fn table<const N: usize>(
    out: &mut impl Write,
    head: &[&str; N],
    rows: impl Iterator<Item = [String; N]>,
) -> io::Result<()> {
    let rows: Vec<[String; N]> = std::iter::once(head.map(str::to_owned))
        .chain(rows)
        .collect();
    let mut widths = [0; N];
    for row in &rows {
        for (widest, cell) in widths.iter_mut().zip(row) {
            *widest = (*widest).max(cell.width());
        }
    }
    for row in &rows {
        let mut line = String::new();
        for (cell, widest) in row.iter().zip(widths) {
            line.push_str(cell);
            line.extend(std::iter::repeat_n(' ', widest + 2 - cell.width()));
        }
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_those_of_a_terminal() {
        let rows = [
            ["日本語", "a"],
            ["e\u{301}", "b"],
            ["😀", "c"],
            ["plain", "d"],
        ];
        let mut out = Vec::new();
        let rows = rows.map(|row| row.map(str::to_owned)).into_iter();
        table(&mut out, &["APP", "UNIT"], rows).unwrap();
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "APP     UNIT\n日本語  a\ne\u{301}       b\n😀      c\nplain   d\n"
        );
    }
}
