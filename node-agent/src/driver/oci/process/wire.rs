//! What the agent and a process's shim say to each other, over the Unix socket in the process's directory.
//!
//! ```text
//! frame    kind (1 byte) · length of the payload (4 bytes, little-endian) · payload
//! ```
//! Whoever connects sends one of `attach`, `query`, `watch`, `signal` or `resize` first. All get a `status` (or `failed`, where
//! the process did not start); then `attach` gets the output and at last `exited`, `watch` only `exited`, the others nothing.
//! An older agent's shims talk to newer agents: kinds and payloads may be added, never changed.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io;

use crate::driver::process::{AttachFrom, ProcessStatus, Stream, TerminalSize};

/// Longest payload that is taken: more than either side sends.
const MAX_PAYLOAD: usize = 2 << 20;
/// Most output or input in a frame: what a pipe holds.
pub const PIECE: usize = 64 << 10;
/// Before the payload.
pub const HEADER: usize = 5;
/// Before the bytes of an `output`: stream and offset.
const OUTPUT_HEADER: usize = 9;

/// Why a process did not start: what failed, and what the runtime said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NotStarted {
    pub what: String,
    pub output: String,
}

/// From the shim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Down {
    Status(Box<ProcessStatus>),
    Failed(NotStarted),
    Output { offset: u64, stream: Stream, data: Vec<u8> },
    Dropped { from: u64, to: u64 },
    Exited(Box<ProcessStatus>),
}

/// To the shim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Up {
    Attach(AttachFrom),
    Query,
    Watch,
    Stdin(Vec<u8>),
    CloseStdin,
    Resize(TerminalSize),
    Signal(u8),
}

const STATUS: u8 = 1;
const FAILED: u8 = 2;
const OUTPUT: u8 = 3;
const DROPPED: u8 = 4;
const EXITED: u8 = 5;
const ATTACH: u8 = 16;
const QUERY: u8 = 17;
const WATCH: u8 = 18;
const STDIN: u8 = 19;
const CLOSE_STDIN: u8 = 20;
const RESIZE: u8 = 21;
const SIGNAL: u8 = 22;

impl Down {
    /// Appends this frame.
    pub fn encode(&self, to: &mut Vec<u8>) {
        match self {
            Self::Status(status) => json(to, STATUS, status),
            Self::Failed(why) => json(to, FAILED, why),
            Self::Output { offset, stream, data } => output(to, *offset, *stream, (data, &[])),
            Self::Dropped { from, to: end } => frame(to, DROPPED, &[&from.to_le_bytes(), &end.to_le_bytes()]),
            Self::Exited(status) => json(to, EXITED, status),
        }
    }

    /// Takes the first whole frame out of `from`; what was taken is counted in `used`.
    pub fn decode(from: &[u8], used: &mut usize) -> io::Result<Option<Self>> {
        let Some((kind, payload)) = split(&from[*used..])? else { return Ok(None) };
        *used += HEADER + payload.len();
        Ok(Some(match kind {
            STATUS => Self::Status(parse(payload)?),
            FAILED => Self::Failed(parse(payload)?),
            EXITED => Self::Exited(parse(payload)?),
            DROPPED => Self::Dropped { from: number(payload, 0)?, to: number(payload, 8)? },
            OUTPUT => {
                let stream = match payload.first() {
                    Some(1) => Stream::Stdout,
                    Some(2) => Stream::Stderr,
                    _ => return Err(malformed()),
                };
                let offset = number(payload, 1)?;
                Self::Output { offset, stream, data: payload[OUTPUT_HEADER..].to_vec() }
            }
            _ => return Err(malformed()),
        }))
    }
}

impl Up {
    /// Appends this frame.
    pub fn encode(&self, to: &mut Vec<u8>) {
        match self {
            Self::Attach(from) => json(to, ATTACH, from),
            Self::Query => frame(to, QUERY, &[]),
            Self::Watch => frame(to, WATCH, &[]),
            Self::Stdin(bytes) => frame(to, STDIN, &[bytes]),
            Self::CloseStdin => frame(to, CLOSE_STDIN, &[]),
            Self::Resize(size) => json(to, RESIZE, size),
            Self::Signal(signal) => frame(to, SIGNAL, &[&[*signal]]),
        }
    }

    /// Takes the first whole frame out of `from`; what was taken is counted in `used`.
    pub fn decode(from: &[u8], used: &mut usize) -> io::Result<Option<Self>> {
        let Some((kind, payload)) = split(&from[*used..])? else { return Ok(None) };
        *used += HEADER + payload.len();
        Ok(Some(match kind {
            ATTACH => Self::Attach(parse(payload)?),
            QUERY => Self::Query,
            WATCH => Self::Watch,
            STDIN => Self::Stdin(payload.to_vec()),
            CLOSE_STDIN => Self::CloseStdin,
            RESIZE => Self::Resize(parse(payload)?),
            SIGNAL => Self::Signal(*payload.first().ok_or_else(malformed)?),
            _ => return Err(malformed()),
        }))
    }
}

/// Appends an `output` whose bytes lie in two parts.
pub fn output(to: &mut Vec<u8>, offset: u64, stream: Stream, (first, second): (&[u8], &[u8])) {
    let stream = match stream {
        Stream::Stdout => 1u8,
        Stream::Stderr => 2,
    };
    frame(to, OUTPUT, &[&[stream], &offset.to_le_bytes(), first, second]);
}

fn json(to: &mut Vec<u8>, kind: u8, value: &impl Serialize) {
    frame(to, kind, &[&serde_json::to_vec(value).expect("plain data becomes JSON")]);
}

fn frame(to: &mut Vec<u8>, kind: u8, parts: &[&[u8]]) {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    to.reserve(HEADER + length);
    to.push(kind);
    to.extend(u32::try_from(length).expect("frames are small").to_le_bytes());
    parts.iter().for_each(|part| to.extend_from_slice(part));
}

fn split(from: &[u8]) -> io::Result<Option<(u8, &[u8])>> {
    let Some((header, rest)) = from.split_first_chunk::<HEADER>() else { return Ok(None) };
    let length = u32::from_le_bytes([header[1], header[2], header[3], header[4]]) as usize;
    if length > MAX_PAYLOAD {
        return Err(malformed());
    }
    Ok(rest.get(..length).map(|payload| (header[0], payload)))
}

fn number(payload: &[u8], at: usize) -> io::Result<u64> {
    let bytes = payload.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
    bytes.map(u64::from_le_bytes).ok_or_else(malformed)
}

fn parse<T: DeserializeOwned>(payload: &[u8]) -> io::Result<T> {
    Ok(serde_json::from_slice(payload)?)
}

fn malformed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "a frame between agent and shim is malformed")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_back_whole_and_in_order_however_they_are_cut() {
        let all = [
            Up::Attach(AttachFrom { offset: 7, lossless: true }),
            Up::Query,
            Up::Watch,
            Up::Stdin(vec![0, 255]),
            Up::CloseStdin,
            Up::Resize(TerminalSize { columns: 80, rows: 24 }),
            Up::Signal(64),
        ];
        let mut bytes = Vec::new();
        all.iter().for_each(|up| up.encode(&mut bytes));
        let (mut seen, mut here, mut used) = (Vec::new(), Vec::new(), 0);
        for byte in bytes {
            here.push(byte);
            seen.extend(Up::decode(&here, &mut used).expect("well formed"));
        }
        assert_eq!((seen.as_slice(), used), (&all[..], here.len()));
    }

    #[test]
    fn output_in_two_parts_is_one_and_nonsense_is_refused() {
        let mut bytes = Vec::new();
        output(&mut bytes, 9, Stream::Stderr, (b"ab", b"c"));
        Down::Dropped { from: 1, to: 2 }.encode(&mut bytes);
        let mut used = 0;
        let whole = Down::Output { offset: 9, stream: Stream::Stderr, data: b"abc".to_vec() };
        assert_eq!(Down::decode(&bytes, &mut used).expect("well formed"), Some(whole));
        assert_eq!(Down::decode(&bytes, &mut used).expect("well formed"), Some(Down::Dropped { from: 1, to: 2 }));
        assert!(Down::decode(&[OUTPUT, 1, 0, 0, 0, 9], &mut 0).is_err());
        assert!(Down::decode(&[99, 0, 0, 0, 0], &mut 0).is_err());
        assert!(Up::decode(&[STDIN, 255, 255, 255, 255], &mut 0).is_err());
    }
}
