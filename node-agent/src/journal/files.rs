//! How journals were kept before: one file a sandbox. Read once, then removed.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::JournalError;
use super::store::Read;
use crate::storage::{self, TEMPORARY_SUFFIX};

const SUFFIX: &str = ".record";

pub fn read(directory: &Path) -> Result<Read, JournalError> {
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source: io::Error| JournalError::Io { path, source: Arc::new(source) }
    };
    let mut read = Read::default();
    for path in all(directory, &[SUFFIX]).map_err(io(directory))? {
        let bytes = fs::read(&path).map_err(io(&path))?;
        read.take(&bytes).map_err(|version| JournalError::Version { path, version })?;
    }
    Ok(read)
}

/// Those that were read, and those that a crash left half written.
pub fn remove(directory: &Path) -> io::Result<()> {
    let torn = format!("{SUFFIX}{TEMPORARY_SUFFIX}");
    for path in all(directory, &[SUFFIX, &torn])? {
        storage::remove_durably(&path)?;
    }
    Ok(())
}

fn all(directory: &Path, suffixes: &[&str]) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if suffixes.iter().any(|suffix| path.to_string_lossy().ends_with(suffix)) {
            found.push(path);
        }
    }
    Ok(found)
}
