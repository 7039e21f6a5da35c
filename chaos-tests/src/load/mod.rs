//! How fast, how long and how much: figures of real processes under load, beside those of etcd where there is a counterpart.
//!
//! Every loop is bounded in count and time and ends by itself. What a measurement starts it ends, by process id, and its
//! directory goes with it; so a figure never stands on what an earlier run left behind.
//!
//! In reading order: `machine` (where and when), `stats`, `table`, `probe` (what a process used), `drive` (clients that call
//! without a pause), `clients` (those that go on through faults), `region` and `etcd` (the systems), and a file per
//! measurement: `create`, `failover`, `agents`, `state`, `exec` (beside `bare`; with `memory`).

pub mod agents;
mod bare;
pub mod clients;
pub mod create;
pub mod drive;
pub mod etcd;
pub mod exec;
pub mod failover;
pub mod machine;
pub mod memory;
pub mod probe;
pub mod region;
pub mod state;
pub mod stats;
pub mod table;

use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};

/// What every measurement is told.
#[derive(Debug, Clone)]
pub struct Place {
    /// Where data directories are made: on a file system whose syncs are real.
    pub root: PathBuf,
}

impl Place {
    /// Refuses memory: a sync costs nothing there, and a figure would say nothing.
    pub fn new(root: Option<PathBuf>) -> anyhow::Result<Self> {
        let root = match root {
            Some(root) => root,
            None => std::env::temp_dir(),
        };
        std::fs::create_dir_all(&root).with_context(|| format!("make {}", root.display()))?;
        let kind = machine::file_system(&root)?;
        ensure!(
            !["tmpfs", "ramfs"].contains(&kind.as_str()),
            "{} is on {kind}: a sync costs nothing there. Name a directory on a disk with --data-dir",
            root.display()
        );
        Ok(Self { root })
    }

    /// A directory that goes when it is dropped.
    pub(crate) fn directory(&self) -> anyhow::Result<tempfile::TempDir> {
        directory_in(&self.root)
    }
}

fn directory_in(root: &Path) -> anyhow::Result<tempfile::TempDir> {
    tempfile::Builder::new().prefix("warren-load-").tempdir_in(root).context("data directory")
}

/// A loopback network of this run's own: ports are the same everywhere and never taken.
pub(crate) fn network() -> String {
    format!("127.{}.{}", rand::random_range(1..=254u8), rand::random_range(0..=255u8))
}
