//! One number that the agent writes and the fence reads: until when the fenced group may run.
//!
//! The file has two slots that are written in turn, in place: no write needs new space on a disk, and a writer that is killed
//! in the middle leaves the other slot whole. The newest whole slot counts. The number is a moment of the boot-time clock, so
//! it belongs to one boot; a file of another boot says zero.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::clock::BootInstant;
use crate::storage;

/// Names the format and its version.
const MAGIC: [u8; 8] = *b"wfence1\0";
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Magic, boot, sequence, moment, checksum: 8 bytes each.
const SLOT: usize = 40;
const SLOTS: u64 = 2;
/// Slots lie far enough apart to share no sector.
const STRIDE: u64 = 512;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Slot {
    sequence: u64,
    until_ns: u64,
}

/// The file, open. The fence only reads it.
#[derive(Debug)]
pub struct Channel {
    path: PathBuf,
    file: File,
    boot: [u8; 8],
    sequence: u64,
}

impl Channel {
    /// Opens the file for writing, and makes it where there is none.
    pub fn open(path: &Path) -> io::Result<Self> {
        if !path.exists() {
            storage::write_atomically(path, &[0; (STRIDE * SLOTS) as usize])?;
        }
        Self::of(path, File::options().read(true).write(true).open(path)?)
    }

    /// Opens the file of an agent.
    pub fn open_to_read(path: &Path) -> io::Result<Self> {
        Self::of(path, File::open(path)?)
    }

    fn of(path: &Path, file: File) -> io::Result<Self> {
        let boot = checksum(&fs::read(BOOT_ID)?);
        let mut channel = Self { path: path.to_owned(), file, boot, sequence: 0 };
        channel.sequence = channel.newest().map_or(0, |slot| slot.sequence);
        Ok(channel)
    }

    /// The last moment that was written; zero where nothing of this boot can be read.
    pub fn read(&self) -> BootInstant {
        BootInstant::from_nanos(self.newest().map_or(0, |slot| slot.until_ns))
    }

    pub fn write(&mut self, until: BootInstant) -> io::Result<()> {
        let slot = Slot { sequence: self.sequence + 1, until_ns: until.as_nanos() };
        self.file.write_all_at(&self.encode(slot), (slot.sequence % SLOTS) * STRIDE)?;
        self.sequence = slot.sequence;
        Ok(())
    }

    /// Whether the file is still where it was opened.
    pub fn is_in_place(&self) -> bool {
        use std::os::unix::fs::MetadataExt;
        let same = |there: fs::Metadata| self.file.metadata().is_ok_and(|ours| ours.ino() == there.ino());
        fs::metadata(&self.path).is_ok_and(same)
    }

    fn newest(&self) -> Option<Slot> {
        (0..SLOTS).filter_map(|n| self.slot(n)).max()
    }

    fn slot(&self, number: u64) -> Option<Slot> {
        let mut bytes = [0; SLOT];
        self.file.read_exact_at(&mut bytes, number * STRIDE).ok()?;
        let word = |n: usize| -> [u8; 8] { std::array::from_fn(|i| bytes[n * 8 + i]) };
        let whole = word(0) == MAGIC && word(1) == self.boot && word(4) == checksum(&bytes[..SLOT - 8]);
        whole.then(|| Slot { sequence: u64::from_le_bytes(word(2)), until_ns: u64::from_le_bytes(word(3)) })
    }

    fn encode(&self, slot: Slot) -> [u8; SLOT] {
        let mut bytes = [0; SLOT];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..16].copy_from_slice(&self.boot);
        bytes[16..24].copy_from_slice(&slot.sequence.to_le_bytes());
        bytes[24..32].copy_from_slice(&slot.until_ns.to_le_bytes());
        let sum = checksum(&bytes[..SLOT - 8]);
        bytes[32..].copy_from_slice(&sum);
        bytes
    }
}

fn checksum(bytes: &[u8]) -> [u8; 8] {
    let digest: [u8; 32] = Sha256::digest(bytes).into();
    std::array::from_fn(|i| digest[i])
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn at(ms: u64) -> BootInstant {
        BootInstant(Duration::from_millis(ms))
    }

    #[test]
    fn the_last_write_counts_also_after_a_restart() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("channel");
        let mut writer = Channel::open(&path).expect("open");
        let reader = Channel::open_to_read(&path).expect("open");
        assert_eq!(reader.read(), at(0));
        for n in 1..5 {
            writer.write(at(n)).expect("write");
            assert_eq!(reader.read(), at(n));
        }
        let mut next = Channel::open(&path).expect("open");
        assert_eq!(next.read(), at(4));
        // The moment may go back: a new ledger may grant less.
        next.write(at(2)).expect("write");
        assert_eq!(reader.read(), at(2));
        assert!(reader.is_in_place());
        fs::remove_file(&path).expect("remove");
        assert!(!reader.is_in_place());
    }

    #[test]
    fn a_torn_write_leaves_the_one_before() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("channel");
        let mut writer = Channel::open(&path).expect("open");
        writer.write(at(7)).expect("write");
        writer.write(at(8)).expect("write");
        for (byte, slot) in [(30, 0), (20, 1)] {
            let before = fs::read(&path).expect("read");
            writer.file.write_all_at(&[0xff], slot * STRIDE + byte).expect("tear");
            let left = Channel::open_to_read(&path).expect("open").read();
            assert_eq!(left, if slot == 0 { at(7) } else { at(8) });
            fs::write(&path, before).expect("mend");
        }
    }

    #[test]
    fn what_another_boot_wrote_says_nothing() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("channel");
        let mut before = Channel::open(&path).expect("open");
        before.boot = [1; 8];
        before.write(at(1_000_000)).expect("write");
        assert_eq!(Channel::open(&path).expect("open").read(), at(0));
    }
}
