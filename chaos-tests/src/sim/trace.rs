//! What happened, as lines that are hashed always and printed if asked: two runs of a seed are the same if the hashes are.

use std::fmt::{self, Write};

use super::clock::At;

/// FNV-1a, 64 bits (http://www.isthe.com/chongo/tech/comp/fnv/): a fingerprint, not a protection.
#[derive(Debug, Clone)]
pub struct Trace {
    hash: u64,
    printed: Option<Vec<String>>,
}

impl Trace {
    pub fn new(print: bool) -> Self {
        Self { hash: 0xCBF2_9CE4_8422_2325, printed: print.then(Vec::new) }
    }

    pub fn note(&mut self, now: At, what: fmt::Arguments<'_>) {
        // Writing into a hash cannot fail.
        let _ = writeln!(self, "{now} {what}");
        if let Some(lines) = &mut self.printed {
            lines.push(format!("{:>12.6} {what}", Seconds(now)));
        }
    }

    pub fn hash(&self) -> u64 {
        self.hash
    }

    pub fn into_lines(self) -> Vec<String> {
        self.printed.unwrap_or_default()
    }
}

impl Write for Trace {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            self.hash = (self.hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3);
        }
        Ok(())
    }
}

/// Microseconds, shown as seconds.
struct Seconds(At);

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = format!("{}.{:06}", self.0 / 1_000_000, self.0 % 1_000_000);
        f.pad_integral(true, "", &text)
    }
}
