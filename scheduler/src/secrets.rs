//! Seals what must not be seen in the ledger: values of `secret_environment`.
//!
//! A value is sealed with XChaCha20-Poly1305 under a key that the operator gives every replica and that is never in the ledger.
//! The nonce is derived from what is sealed (a synthetic nonce), so the same request seals to the same bytes and a retried
//! create is still the same create; name of the sandbox and of the variable are bound to the value.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use chacha20poly1305::aead::{Aead, KeyInit, Payload};
use chacha20poly1305::{XChaCha20Poly1305, XNonce};
use hmac::{Hmac, Mac};
use sha2::Sha256;
use warren_proto::ids::SandboxName;

const KEY_BYTES: usize = 32;
const NONCE_BYTES: usize = 24;

/// Why there is no key, or a value cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum SecretsError {
    #[error("read secrets key {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("secrets key {0}: must hold 32 random bytes in base64, for example from `openssl rand -base64 32`")]
    Malformed(PathBuf),
    #[error("secrets key {0} may be read by others: `chmod 600` it")]
    Open(PathBuf),
    #[error("`{variable}` of {sandbox} was sealed with another key than this replica has")]
    WrongKey { sandbox: SandboxName, variable: String },
}

/// Seals and opens. Clones share the key.
#[derive(Clone)]
pub struct Sealer(Arc<Keys>);

struct Keys {
    cipher: XChaCha20Poly1305,
    /// For nonces, and for what stands for a secret where only equality matters.
    mac: Hmac<Sha256>,
}

impl std::fmt::Debug for Sealer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Sealer")
    }
}

impl Sealer {
    /// Reads the key file.
    pub fn load(path: &Path) -> Result<Self, SecretsError> {
        use std::os::unix::fs::MetadataExt;
        let read = |source| SecretsError::Read { path: path.to_owned(), source };
        if fs::metadata(path).map_err(read)?.mode() & 0o077 != 0 {
            return Err(SecretsError::Open(path.to_owned()));
        }
        let text = fs::read_to_string(path).map_err(read)?;
        let malformed = || SecretsError::Malformed(path.to_owned());
        let key: [u8; KEY_BYTES] =
            STANDARD.decode(text.trim()).ok().and_then(|key| key.try_into().ok()).ok_or_else(malformed)?;
        Ok(Self::new(&key))
    }

    /// A key for encryption and one for nonces, both derived from `key`.
    pub fn new(key: &[u8; KEY_BYTES]) -> Self {
        let derived = |label: &[u8]| mac_of(key).chain_update(label).finalize().into_bytes();
        let cipher = XChaCha20Poly1305::new(&derived(b"warren secrets: encryption"));
        Self(Arc::new(Keys { cipher, mac: mac_of(&derived(b"warren secrets: nonces")) }))
    }

    /// Nonce and ciphertext of a variable's value.
    pub fn seal(&self, sandbox: &SandboxName, variable: &str, value: &str) -> Vec<u8> {
        let bound = bound(sandbox, variable);
        let mac = self.0.mac.clone().chain_update(&bound).chain_update([0]).chain_update(value).finalize().into_bytes();
        let nonce = &mac[..NONCE_BYTES];
        let payload = Payload { msg: value.as_bytes(), aad: &bound };
        let sealed = self.0.cipher.encrypt(XNonce::from_slice(nonce), payload);
        // Only a value of 256 GiB is refused; a specification has 16 KiB.
        [nonce, &sealed.unwrap_or_default()].concat()
    }

    pub fn open(&self, sandbox: &SandboxName, variable: &str, sealed: &[u8]) -> Result<String, SecretsError> {
        let wrong = || SecretsError::WrongKey { sandbox: sandbox.clone(), variable: variable.to_owned() };
        let (nonce, ciphertext) = sealed.split_at_checked(NONCE_BYTES).ok_or_else(wrong)?;
        let payload = Payload { msg: ciphertext, aad: &bound(sandbox, variable) };
        let value = self.0.cipher.decrypt(XNonce::from_slice(nonce), payload).map_err(|_| wrong())?;
        String::from_utf8(value).map_err(|_| wrong())
    }

    /// Stands for a value where only equality matters: in the hash of a request's payload.
    pub fn fingerprint(&self, value: &str) -> String {
        let mac = self.0.mac.clone().chain_update(b"fingerprint").chain_update(value).finalize().into_bytes();
        STANDARD.encode(mac)
    }
}

#[allow(clippy::expect_used, reason = "HMAC takes keys of any length (RFC 2104)")]
fn mac_of(key: &[u8]) -> Hmac<Sha256> {
    <Hmac<Sha256> as Mac>::new_from_slice(key).expect("HMAC takes keys of any length")
}

fn bound(sandbox: &SandboxName, variable: &str) -> Vec<u8> {
    [sandbox.to_string().as_bytes(), &[0], variable.as_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn name(id: &str) -> SandboxName {
        SandboxName::parse(&format!("tenants/t/sandboxes/{id}")).unwrap()
    }

    #[test]
    fn a_value_is_opened_by_its_key_for_its_sandbox_and_variable_alone() {
        let sealer = Sealer::new(&[7; 32]);
        let sealed = sealer.seal(&name("a"), "TOKEN", "hunter2");
        assert_eq!(sealed, sealer.seal(&name("a"), "TOKEN", "hunter2"), "a retried create is the same create");
        assert!(!sealed.windows(7).any(|window| window == b"hunter2"));
        assert_eq!(sealer.open(&name("a"), "TOKEN", &sealed).unwrap(), "hunter2");
        assert!(sealer.open(&name("b"), "TOKEN", &sealed).is_err());
        assert!(sealer.open(&name("a"), "OTHER", &sealed).is_err());
        assert!(Sealer::new(&[8; 32]).open(&name("a"), "TOKEN", &sealed).is_err());
        assert!(sealer.open(&name("a"), "TOKEN", &sealed[..10]).is_err());
    }

    #[test]
    fn a_key_file_must_hold_a_key_and_be_its_owners_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key");
        fs::write(&path, STANDARD.encode([1; 32])).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(Sealer::load(&path), Err(SecretsError::Open(_))));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        Sealer::load(&path).unwrap();
        fs::write(&path, "short").unwrap();
        assert!(matches!(Sealer::load(&path), Err(SecretsError::Malformed(_))));
    }
}
