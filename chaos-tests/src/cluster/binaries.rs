//! Where the servers' programs are: in `WARREN_BIN_DIR`, or beside this program, where cargo puts them.

use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};

/// Programs of a cluster.
#[derive(Debug, Clone)]
pub struct Binaries {
    pub scheduler: PathBuf,
    /// A build of the scheduler that knows only the first level of the ledger's rules, if there is one.
    pub first_level_scheduler: Option<PathBuf>,
    pub agent: PathBuf,
    pub ctl: PathBuf,
}

impl Binaries {
    /// Finds them; says how to build them when they are not there.
    pub fn find() -> anyhow::Result<Self> {
        let directory = match std::env::var_os("WARREN_BIN_DIR") {
            Some(directory) => PathBuf::from(directory),
            None => beside_this_program()?,
        };
        let find = |name: &str| {
            let path = directory.join(name);
            ensure!(path.is_file(), "no {}: build it with `cargo build --workspace --bins`", path.display());
            Ok(path)
        };
        Ok(Self {
            scheduler: find("warren-scheduler")?,
            first_level_scheduler: find("warren-scheduler-first-level").ok(),
            agent: find("warren-node-agent")?,
            ctl: find("warrenctl")?,
        })
    }
}

/// Test programs lie in `deps` below the directory of the binaries.
fn beside_this_program() -> anyhow::Result<PathBuf> {
    let program = std::env::current_exe().context("find this program's own file")?;
    let directory = program.parent().unwrap_or(Path::new("/"));
    let above = directory.parent().unwrap_or(directory);
    Ok(if directory.ends_with("deps") { above } else { directory }.to_owned())
}
