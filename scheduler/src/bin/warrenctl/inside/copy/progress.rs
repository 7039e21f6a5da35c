//! How far a copy is: a bar on a terminal, nothing elsewhere.

use std::io::{IsTerminal, stderr};

use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

const BAR: &str = "{msg:20!} {bar:30} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left";
const ENDLESS: &str = "{msg:20!} {spinner} {bytes}, {bytes_per_sec}";

#[derive(Debug, Clone)]
pub struct Progress(ProgressBar);

impl Progress {
    /// Of so many bytes, or of nobody knows how many.
    pub fn new(what: &str, total: Option<u64>) -> Self {
        if !stderr().is_terminal() {
            return Self(ProgressBar::hidden());
        }
        let bar = total.map_or_else(ProgressBar::new_spinner, ProgressBar::new).with_message(what.to_owned());
        Self(match ProgressStyle::with_template(if total.is_some() { BAR } else { ENDLESS }) {
            Ok(style) => bar.with_style(style),
            Err(_) => bar,
        })
    }

    pub fn add(&self, bytes: u64) {
        self.0.inc(bytes);
    }

    /// Bytes that have to come once more.
    pub fn take_back(&self, bytes: u64) {
        self.0.dec(bytes);
    }

    /// Clears the bar; what was copied is said on a terminal.
    pub fn finish(&self, files: usize) {
        let bytes = HumanBytes(self.0.position());
        self.0.finish_and_clear();
        if stderr().is_terminal() {
            eprintln!("{files} {}, {bytes}", if files == 1 { "file" } else { "files" });
        }
    }
}
