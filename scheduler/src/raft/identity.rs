//! Whose disk this is: replica id and a random number made with the data directory, in a small file beside the log.
//!
//! A replica that lost its disk has forgotten what it had promised: it could vote a second time in a term, or against entries that
//! it had acknowledged. So a replica's disk is announced in the ledger, other replicas refuse one that comes with another, and
//! it must join again under a new id.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use warren_proto::ids::ReplicaId;

const FILE_NAME: &str = "identity";

/// What is wrong with the file.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    #[error("{action} {path}: {source}")]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error("{0} is damaged: treat this replica's disk as lost, and let it join again, empty and under a new id")]
    Malformed(PathBuf),
    #[error("{path} belongs to replica {found}, not to replica {wanted}: give the right replica_id or data_dir")]
    OtherReplica { path: PathBuf, found: ReplicaId, wanted: ReplicaId },
}

/// This replica's disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    pub replica: ReplicaId,
    pub disk: u128,
}

impl Identity {
    /// Reads the file below `data_dir`, or makes one.
    pub fn load_or_create(data_dir: &Path, replica: ReplicaId) -> Result<Self, IdentityError> {
        if let Some(found) = Self::load(data_dir, replica)? {
            return Ok(found);
        }
        // 0 stands for "not told".
        let identity = Self { replica, disk: rand::random::<u128>() | 1 };
        let path = data_dir.join(FILE_NAME);
        identity.write(data_dir).map_err(|source| IdentityError::Io { action: "write", path, source })?;
        Ok(identity)
    }

    /// Reads the file below `data_dir`; `None` where there is none.
    pub fn load(data_dir: &Path, replica: ReplicaId) -> Result<Option<Self>, IdentityError> {
        let path = data_dir.join(FILE_NAME);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(IdentityError::Io { action: "read", path, source }),
        };
        let found = parse(&text).ok_or_else(|| IdentityError::Malformed(path.clone()))?;
        if found.replica == replica {
            Ok(Some(found))
        } else {
            Err(IdentityError::OtherReplica { path, found: found.replica, wanted: replica })
        }
    }

    fn write(self, data_dir: &Path) -> io::Result<()> {
        fs::create_dir_all(data_dir)?;
        let temporary = data_dir.join(format!("{FILE_NAME}.tmp"));
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        writeln!(file, "replica {}\ndisk {:032x}", self.replica, self.disk)?;
        file.sync_all()?;
        fs::rename(&temporary, data_dir.join(FILE_NAME))?;
        File::open(data_dir)?.sync_all()
    }
}

fn parse(text: &str) -> Option<Identity> {
    let mut lines = text.lines();
    let replica = lines.next()?.strip_prefix("replica ")?.parse().ok().map(ReplicaId)?;
    let disk = u128::from_str_radix(lines.next()?.strip_prefix("disk ")?, 16).ok()?;
    Some(Identity { replica, disk })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_keeps_its_identity_and_belongs_to_one_replica() {
        let directory = tempfile::tempdir().unwrap();
        let first = Identity::load_or_create(directory.path(), ReplicaId(2)).unwrap();
        assert_eq!(Identity::load_or_create(directory.path(), ReplicaId(2)).unwrap(), first);
        let other = Identity::load_or_create(directory.path(), ReplicaId(3)).unwrap_err();
        assert!(matches!(other, IdentityError::OtherReplica { found: ReplicaId(2), .. }), "{other}");
        fs::write(directory.path().join(FILE_NAME), "rubbish").unwrap();
        let damaged = Identity::load_or_create(directory.path(), ReplicaId(2)).unwrap_err();
        assert!(matches!(damaged, IdentityError::Malformed(_)), "{damaged}");
    }
}
