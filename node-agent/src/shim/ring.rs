//! PURE: the newest output of a process, by offset.
//!
//! Invariants: `start <= end`; exactly `end - start` bytes are held; pieces cover them without a gap, neighbours differ in
//! their stream.

use std::collections::VecDeque;

use crate::driver::process::Stream;

/// Pieces of alternating streams: a process that writes single bytes to both in turn must not cost more than its bytes do.
const MAX_PIECES: usize = 32 << 10;

/// Bytes that lie in two parts.
pub type Parts<'a> = (&'a [u8], &'a [u8]);

/// A piece of one stream ends at `end`; it begins where the one before ends.
#[derive(Debug, Clone, Copy)]
struct Piece {
    end: u64,
    stream: Stream,
}

/// Holds at most `capacity` bytes.
#[derive(Debug)]
pub struct Ring {
    bytes: VecDeque<u8>,
    pieces: VecDeque<Piece>,
    start: u64,
    end: u64,
    capacity: usize,
}

impl Ring {
    pub fn new(capacity: usize) -> Self {
        Self { bytes: VecDeque::new(), pieces: VecDeque::new(), start: 0, end: 0, capacity }
    }

    /// Offset of the oldest byte held.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Offset of the next byte to come.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// How much can be pushed without dropping what lies at `needed` or later.
    pub fn room(&self, needed: u64) -> usize {
        let held = usize::try_from(self.end.saturating_sub(needed)).unwrap_or(usize::MAX);
        let full = self.pieces.len() >= MAX_PIECES && needed < self.pieces[0].end;
        if full { 0 } else { self.capacity.saturating_sub(held) }
    }

    /// Appends; the oldest makes room.
    pub fn push(&mut self, stream: Stream, data: &[u8]) {
        let skipped = data.len().saturating_sub(self.capacity);
        let kept = &data[skipped..];
        self.end += data.len() as u64;
        self.bytes.extend(kept);
        match self.pieces.back_mut() {
            Some(last) if last.stream == stream => last.end = self.end,
            _ => self.pieces.push_back(Piece { end: self.end, stream }),
        }
        let mut excess = self.bytes.len().saturating_sub(self.capacity);
        self.start = self.end - self.bytes.len() as u64;
        if self.pieces.len() > MAX_PIECES {
            let first = self.pieces[0].end.saturating_sub(self.start);
            excess = excess.max(usize::try_from(first).unwrap_or(usize::MAX)).min(self.bytes.len());
        }
        self.bytes.drain(..excess);
        self.start += excess as u64;
        while self.pieces.front().is_some_and(|piece| piece.end <= self.start) {
            self.pieces.pop_front();
        }
    }

    /// At most `most` bytes of one stream from `from` on, in two parts; `from` must be held.
    pub fn read(&self, from: u64, most: usize) -> Option<(Stream, Parts<'_>)> {
        if from < self.start || from >= self.end {
            return None;
        }
        let piece = self.pieces[self.pieces.partition_point(|piece| piece.end <= from)];
        let begin = usize::try_from(from - self.start).ok()?;
        let length = usize::try_from(piece.end - from).unwrap_or(usize::MAX).min(most);
        let (first, second) = self.bytes.as_slices();
        let in_first = first.get(begin..).unwrap_or_default();
        let in_first = &in_first[..in_first.len().min(length)];
        let skip = begin.saturating_sub(first.len());
        Some((piece.stream, (in_first, &second[skip..skip + length - in_first.len()])))
    }

    /// All that is held, in two parts.
    pub fn bytes(&self) -> Parts<'_> {
        self.bytes.as_slices()
    }

    /// Lengths of the pieces that are held.
    pub fn pieces(&self) -> Vec<(Stream, u64)> {
        let mut at = self.start;
        let length = |piece: &Piece| (piece.stream, piece.end - std::mem::replace(&mut at, piece.end));
        self.pieces.iter().map(length).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Reads all that is held.
    fn all(ring: &Ring, most: usize) -> Vec<(Stream, u8)> {
        let (mut at, mut seen) = (ring.start(), Vec::new());
        while let Some((stream, (first, second))) = ring.read(at, most) {
            assert!((1..=most).contains(&(first.len() + second.len())));
            seen.extend(first.iter().chain(second).map(|byte| (stream, *byte)));
            at += (first.len() + second.len()) as u64;
        }
        assert_eq!(at, ring.end());
        seen
    }

    proptest! {
        #[test]
        fn the_newest_bytes_are_held_each_with_its_stream(
            pushes in proptest::collection::vec((any::<bool>(), proptest::collection::vec(any::<u8>(), 0..40)), 0..40),
            capacity in 1usize..64, most in 1usize..50,
        ) {
            let (mut ring, mut model) = (Ring::new(capacity), Vec::new());
            for (error, data) in pushes {
                let stream = if error { Stream::Stderr } else { Stream::Stdout };
                ring.push(stream, &data);
                model.extend(data.iter().map(|byte| (stream, *byte)));
                prop_assert_eq!(ring.end(), model.len() as u64);
                prop_assert_eq!(all(&ring, most), &model[model.len().saturating_sub(capacity)..]);
                prop_assert_eq!(ring.pieces().iter().map(|(_, length)| length).sum::<u64>(), ring.end() - ring.start());
            }
        }
    }

    #[test]
    fn room_is_what_can_come_without_loss() {
        let mut ring = Ring::new(10);
        ring.push(Stream::Stdout, b"12345678");
        assert_eq!((ring.room(0), ring.room(3), ring.room(8)), (2, 5, 10));
        assert!(ring.read(8, 1).is_none());
    }

    #[test]
    fn alternating_single_bytes_are_bounded_too() {
        let mut ring = Ring::new(1 << 20);
        for n in 0..MAX_PIECES * 3 {
            ring.push(if n % 2 == 0 { Stream::Stdout } else { Stream::Stderr }, b"x");
        }
        assert_eq!(ring.end() - ring.start(), MAX_PIECES as u64);
        assert_eq!(ring.room(ring.start()), 0);
    }
}
