//! A root file system for tests: one static busybox and its names. Made in memory in milliseconds, the same bytes each time.

use std::io;
use std::path::Path;

use anyhow::Context;
use sha2::{Digest, Sha256};

/// Where Debian's `busybox-static` puts its program.
const BUSYBOX: &str = "/bin/busybox";

/// What tests call inside; each is a link to busybox.
const APPLETS: [&str; 14] =
    ["sh", "cat", "cut", "echo", "env", "false", "head", "hostname", "id", "ls", "mkdir", "sleep", "true", "wc"];

/// Directories with their modes; `/tmp` is everyone's.
const DIRECTORIES: [(&str, u32); 8] = [
    ("bin", 0o755),
    ("dev", 0o755),
    ("etc", 0o755),
    ("proc", 0o755),
    ("root", 0o700),
    ("sys", 0o755),
    ("tmp", 0o1777),
    ("var", 0o755),
];

/// A root file system as a tar, with the digest that templates name it by.
#[derive(Debug, Clone)]
pub struct Image {
    pub tar: Vec<u8>,
    pub digest: String,
}

impl Image {
    /// The bytes of any root file system tar.
    pub fn new(tar: Vec<u8>) -> Self {
        let hex: String = Sha256::digest(&tar).iter().map(|byte| format!("{byte:02x}")).collect();
        Self { tar, digest: format!("sha256:{hex}") }
    }

    /// A shell and a few commands.
    pub fn busybox() -> anyhow::Result<Self> {
        let program = std::fs::read(BUSYBOX).with_context(|| format!("read {BUSYBOX} (install busybox-static)"))?;
        Ok(Self::new(busybox_tar(&program).context("make the test image")?))
    }
}

/// Why no test image can be made here, if so.
pub fn missing() -> Option<String> {
    (!Path::new(BUSYBOX).exists()).then(|| format!("no {BUSYBOX} (install busybox-static)"))
}

fn busybox_tar(program: &[u8]) -> io::Result<Vec<u8>> {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, mode) in DIRECTORIES {
        let mut header = entry(tar::EntryType::Directory, mode, 0);
        tar.append_data(&mut header, format!("{name}/"), io::empty())?;
    }
    let mut header = entry(tar::EntryType::Regular, 0o755, program.len() as u64);
    tar.append_data(&mut header, "bin/busybox", program)?;
    for applet in APPLETS {
        let mut header = entry(tar::EntryType::Symlink, 0o777, 0);
        tar.append_link(&mut header, format!("bin/{applet}"), "busybox")?;
    }
    let users = b"root:x:0:0:root:/root:/bin/sh\n";
    let mut header = entry(tar::EntryType::Regular, 0o644, users.len() as u64);
    tar.append_data(&mut header, "etc/passwd", &users[..])?;
    tar.into_inner()
}

fn entry(kind: tar::EntryType, mode: u32, size: u64) -> tar::Header {
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(size);
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_program_gives_the_same_bytes() {
        let image = Image::new(busybox_tar(b"program").expect("tar"));
        assert_eq!(image.digest, Image::new(busybox_tar(b"program").expect("tar")).digest);
        let mut archive = tar::Archive::new(&image.tar[..]);
        let names: Vec<String> = archive
            .entries()
            .expect("entries")
            .map(|entry| entry.expect("entry").path().expect("path").display().to_string())
            .collect();
        assert!(names.contains(&"bin/busybox".to_owned()) && names.contains(&"bin/sh".to_owned()), "{names:?}");
    }
}
