//! Tables as kubectl draws them: aligned columns, no borders. And how quantities stand in them.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

use prost_types::Timestamp;
use warren_proto::units::{Bytes, MilliCpu};

/// Rows of text under headers.
#[derive(Debug)]
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub fn new(headers: &[&str]) -> Self {
        Self { rows: vec![headers.iter().map(|header| (*header).to_owned()).collect()] }
    }

    pub fn push(&mut self, row: Vec<String>) {
        self.rows.push(row);
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            self.rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                line += &format!("{cell:<width$}   ");
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

/// `name: value` lines.
pub fn details(pairs: &[(&str, String)]) -> String {
    let width = pairs.iter().map(|(name, _)| name.len()).max().unwrap_or(0) + 1;
    let shown = pairs.iter().filter(|(_, value)| !value.is_empty());
    shown.map(|(name, value)| format!("{:<width$}  {value}\n", format!("{name}:"))).collect()
}

/// How long ago: `12s`, `3m12s`, `5h2m`, `4d3h`.
pub fn age(time: Option<&Timestamp>) -> String {
    let Some(time) = time else { return "-".to_owned() };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let seconds = now.saturating_sub(u64::try_from(time.seconds).unwrap_or(0));
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h{}m", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{}d{}h", seconds / 86_400, seconds % 86_400 / 3600),
    }
}

pub fn cpu(milli: i64) -> String {
    MilliCpu(u64::try_from(milli).unwrap_or(0)).to_string()
}

pub fn bytes(bytes: i64) -> String {
    Bytes(u64::try_from(bytes).unwrap_or(0)).to_string()
}

/// `used / all`.
pub fn of(used: String, all: String) -> String {
    format!("{used} / {all}")
}

/// An enum's name without its prefix.
pub fn bare(name: &str, prefix: &str) -> String {
    name.strip_prefix(prefix).unwrap_or(name).to_owned()
}

/// What stands after the last `/`.
pub fn last_segment(name: &str) -> String {
    name.rsplit('/').next().unwrap_or_default().to_owned()
}

/// `a=1, b=2`.
pub fn joined(pairs: &BTreeMap<String, String>) -> String {
    pairs.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(", ")
}

/// The id of a replica, 0 for none.
pub fn none_or(id: u64) -> String {
    if id == 0 { "none".to_owned() } else { id.to_string() }
}

/// `-` for nothing.
pub fn or_dash(text: String) -> String {
    if text.is_empty() { "-".to_owned() } else { text }
}
