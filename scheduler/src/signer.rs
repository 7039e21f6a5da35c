//! The key that this replica signs data plane tokens with. It never leaves the replica: agents get the public half.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ed25519_dalek::SigningKey;
use ed25519_dalek::pkcs8::spki::der::pem::LineEnding;
use ed25519_dalek::pkcs8::{DecodePrivateKey, EncodePrivateKey};
use warren_proto::ids::ReplicaId;
use warren_proto::token;
use warren_proto::v1::TokenClaims;

const FILE_NAME: &str = "token-key.pem";

/// Why the key cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SignerError {
    #[error("{action} token key {path}: {source}")]
    Io { action: &'static str, path: PathBuf, source: std::io::Error },
    #[error("token key {0} is no PKCS#8 PEM of an Ed25519 key: restore it, or remove it to have a new one made")]
    Malformed(PathBuf),
}

/// Signs tokens for one replica. Clones share the key.
#[derive(Clone)]
pub struct Signer {
    key: Arc<SigningKey>,
    replica: ReplicaId,
}

impl std::fmt::Debug for Signer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Signer").field("replica", &self.replica).finish_non_exhaustive()
    }
}

impl Signer {
    /// Reads the key below `data_dir`, or makes one there, readable by its owner alone.
    pub fn load_or_create(data_dir: &Path, replica: ReplicaId) -> Result<Self, SignerError> {
        let path = data_dir.join(FILE_NAME);
        let key = match fs::read_to_string(&path) {
            Ok(pem) => SigningKey::from_pkcs8_pem(&pem).map_err(|_| SignerError::Malformed(path))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => create(data_dir, &path)?,
            Err(source) => return Err(SignerError::Io { action: "read", path, source }),
        };
        Ok(Self { key: Arc::new(key), replica })
    }

    /// Signs `claims` as this replica.
    pub fn sign(&self, mut claims: TokenClaims) -> String {
        claims.key_id = self.replica.0;
        token::sign(&claims, &self.key)
    }

    pub fn public_key(&self) -> [u8; 32] {
        self.key.verifying_key().to_bytes()
    }
}

fn create(data_dir: &Path, path: &Path) -> Result<SigningKey, SignerError> {
    let error = |source| SignerError::Io { action: "write", path: path.to_owned(), source };
    let key = SigningKey::from_bytes(&rand::random());
    let pem = key.to_pkcs8_pem(LineEnding::LF).map_err(|_| SignerError::Malformed(path.to_owned()))?;
    fs::create_dir_all(data_dir).map_err(error)?;
    let temporary = path.with_extension("tmp");
    let mut file =
        OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary).map_err(error)?;
    file.write_all(pem.as_bytes()).and_then(|()| file.sync_all()).map_err(error)?;
    fs::rename(&temporary, path).map_err(error)?;
    File::open(data_dir).and_then(|directory| directory.sync_all()).map_err(error)?;
    Ok(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_survives_and_stays_private() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().expect("temporary directory");
        let first = Signer::load_or_create(directory.path(), ReplicaId(1)).expect("made");
        let again = Signer::load_or_create(directory.path(), ReplicaId(1)).expect("read");
        assert_eq!(first.public_key(), again.public_key());
        let mode = fs::metadata(directory.path().join(FILE_NAME)).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        fs::write(directory.path().join(FILE_NAME), "rubbish").expect("written");
        assert!(matches!(Signer::load_or_create(directory.path(), ReplicaId(1)), Err(SignerError::Malformed(_))));
    }
}
