//! `clean`: takes everything that this data directory's agent left off the host, and then out of the directory.

use std::fs;
use std::io;

use anyhow::Context;

use crate::agent::DataDir;
use crate::config::Config;
use crate::drivers;
use crate::fence::keeper;
use crate::storage::TEMPORARY_SUFFIX;

/// What the agent itself keeps, or was writing when it was killed; drivers clear up after themselves.
const OWN: [&str; 4] = ["journal", "templates", "ledger", "incarnation"];

/// Removes sandboxes first: while one is left, the journal must still know it.
pub async fn clean(config: &Config, data_dir: DataDir) -> anyhow::Result<()> {
    // First: a fence that goes on would freeze what is to be ended.
    keeper::remove(&data_dir.path).await.context("end the fence")?;
    let built = drivers::build(config).await?;
    let mut removed = 0;
    for driver in built.drivers.all() {
        for (key, _) in driver.list().await.with_context(|| format!("list sandboxes of driver {}", driver.name()))? {
            driver.remove(&key).await.with_context(|| format!("remove {} epoch {}", key.sandbox, key.epoch))?;
            removed += 1;
        }
    }
    if let Some(oci) = &built.oci {
        oci.clean().await.context("clean driver oci")?;
    }
    let torn = |name: &&str| format!("{name}{TEMPORARY_SUFFIX}");
    for name in OWN.iter().map(ToString::to_string).chain(OWN.iter().map(torn)) {
        let path = data_dir.path.join(name);
        let result = match fs::symlink_metadata(&path) {
            Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(&path),
            Ok(_) => fs::remove_file(&path),
            Err(error) => Err(error),
        };
        match result {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("remove {}", path.display()));
            }
            _ => {}
        }
    }
    tracing::info!(sandboxes = removed, data_dir = %data_dir.path.display(), "clean");
    Ok(())
}
