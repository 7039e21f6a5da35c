//! Names of things. Each is parsed once at the edge and trusted afterwards.
//!
//! An id is 1 to 63 characters: lower-case letters, digits and `-`, beginning and ending with a letter or digit
//! (a DNS label, RFC 1123; google.aip.dev/122). Clones are cheap: an id is a shared string.

use std::cmp::Ordering;
use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// Longest id, in characters: a DNS label.
pub const MAX_ID_LENGTH: usize = 63;

/// Why a string is not an id or a resource name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    #[error(
        "`{got}` is not a valid {kind}: use 1 to 63 lower-case letters, digits and `-`, beginning and ending with a letter or digit"
    )]
    Id { kind: &'static str, got: String },
    #[error("`{got}` is not a resource name: expected `{pattern}`")]
    Name { pattern: &'static str, got: String },
}

fn is_valid_id(text: &str) -> bool {
    let bytes = text.as_bytes();
    let inner = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-';
    (1..=MAX_ID_LENGTH).contains(&bytes.len())
        && bytes.iter().all(inner)
        && bytes.first() != Some(&b'-')
        && bytes.last() != Some(&b'-')
}

/// Orders by what the pointer points to, which is looked at only where the pointers differ: names are mostly compared with
/// their own clones.
macro_rules! ordered_by_content {
    ($name:ident) => {
        impl Ord for $name {
            fn cmp(&self, other: &Self) -> Ordering {
                if Arc::ptr_eq(&self.0, &other.0) { Ordering::Equal } else { self.0.cmp(&other.0) }
            }
        }

        impl PartialOrd for $name {
            fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
                Some(self.cmp(other))
            }
        }
    };
}

macro_rules! string_id {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(Arc<str>);

        ordered_by_content!($name);

        impl $name {
            /// Parses a bare id.
            pub fn parse(text: &str) -> Result<Self, IdError> {
                if is_valid_id(text) {
                    Ok(Self(Arc::from(text)))
                } else {
                    Err(IdError::Id { kind: $kind, got: text.chars().take(80).collect() })
                }
            }

            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;
            fn try_from(text: String) -> Result<Self, IdError> {
                Self::parse(&text)
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0.to_string()
            }
        }
    };
}

string_id!(
    /// Who owns sandboxes.
    TenantId,
    "tenant id"
);
string_id!(
    /// A host that runs sandboxes.
    NodeId,
    "node id"
);
string_id!(
    /// A template.
    TemplateId,
    "template id"
);
string_id!(
    /// A sandbox within its tenant.
    SandboxId,
    "sandbox id"
);

fn after<'a>(text: &'a str, prefix: &str, pattern: &'static str) -> Result<&'a str, IdError> {
    text.strip_prefix(prefix).ok_or_else(|| IdError::Name { pattern, got: text.chars().take(200).collect() })
}

impl TenantId {
    /// Parses `tenants/{tenant}`.
    pub fn from_name(name: &str) -> Result<Self, IdError> {
        Self::parse(after(name, "tenants/", "tenants/{tenant}")?)
    }

    /// `tenants/{tenant}`.
    pub fn name(&self) -> String {
        format!("tenants/{self}")
    }
}

impl NodeId {
    /// Parses `nodes/{node}`.
    pub fn from_name(name: &str) -> Result<Self, IdError> {
        Self::parse(after(name, "nodes/", "nodes/{node}")?)
    }

    /// `nodes/{node}`.
    pub fn name(&self) -> String {
        format!("nodes/{self}")
    }
}

impl TemplateId {
    /// Parses `templates/{template}`.
    pub fn from_name(name: &str) -> Result<Self, IdError> {
        Self::parse(after(name, "templates/", "templates/{template}")?)
    }

    /// `templates/{template}`.
    pub fn name(&self) -> String {
        format!("templates/{self}")
    }
}

/// A sandbox's full name: the key under which the ledger holds it. Ordered by tenant, then id.
///
/// One pointer, because the ledger's maps and indexes hold each name half a dozen times.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct SandboxName(Arc<SandboxKey>);

ordered_by_content!(SandboxName);

/// The parts of a [`SandboxName`].
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SandboxKey {
    pub tenant: TenantId,
    pub id: SandboxId,
}

impl Deref for SandboxName {
    type Target = SandboxKey;

    fn deref(&self) -> &SandboxKey {
        &self.0
    }
}

impl SandboxName {
    pub fn new(tenant: TenantId, id: SandboxId) -> Self {
        Self(Arc::new(SandboxKey { tenant, id }))
    }

    /// Parses `tenants/{tenant}/sandboxes/{sandbox}`.
    pub fn parse(name: &str) -> Result<Self, IdError> {
        const PATTERN: &str = "tenants/{tenant}/sandboxes/{sandbox}";
        let rest = after(name, "tenants/", PATTERN)?;
        let (tenant, id) = rest
            .split_once("/sandboxes/")
            .ok_or_else(|| IdError::Name { pattern: PATTERN, got: name.chars().take(200).collect() })?;
        Ok(Self::new(TenantId::parse(tenant)?, SandboxId::parse(id)?))
    }
}

impl fmt::Display for SandboxName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "tenants/{}/sandboxes/{}", self.tenant, self.id)
    }
}

impl fmt::Debug for SandboxName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Ownership number of a sandbox: +1 each time it is placed. 0: never placed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The epoch of the next placement. 2^64 placements do not happen; the last epoch stays.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Version of a node's assignment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Generation(pub u64);

impl Generation {
    /// The next version.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

/// One scheduler process of a region's Raft group. Never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct ReplicaId(pub u64);

impl fmt::Display for ReplicaId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// SHA-256 of a template's tar.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// Parses `sha256:` and 64 lower-case hexadecimal digits.
    pub fn parse(text: &str) -> Result<Self, IdError> {
        let error = || IdError::Name {
            pattern: "sha256:{64 lower-case hexadecimal digits}",
            got: text.chars().take(80).collect(),
        };
        let hex = text.strip_prefix("sha256:").ok_or_else(error)?.as_bytes();
        if hex.len() != 64 {
            return Err(error());
        }
        let digit = |b: u8| match b {
            b'0'..=b'9' => Some(b - b'0'),
            b'a'..=b'f' => Some(b - b'a' + 10),
            _ => None,
        };
        let mut bytes = [0u8; 32];
        for (byte, pair) in bytes.iter_mut().zip(hex.chunks_exact(2)) {
            let (high, low) = digit(pair[0]).zip(digit(pair[1])).ok_or_else(error)?;
            *byte = high << 4 | low;
        }
        Ok(Self(bytes))
    }

    /// The 64 hexadecimal digits alone, as a file name.
    pub fn hex(&self) -> String {
        self.0.iter().map(|b| format!("{b:02x}")).collect()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_dns_labels() {
        for good in ["a", "0", "web-1", &"x".repeat(63)] {
            assert!(NodeId::parse(good).is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a.b", "a/b", "ä", &"x".repeat(64)] {
            assert!(NodeId::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_sandbox_name_round_trips_and_rejects_anything_else() {
        let name = SandboxName::parse("tenants/acme/sandboxes/s-1").expect("valid");
        assert_eq!(name.to_string(), "tenants/acme/sandboxes/s-1");
        for bad in [
            "",
            "tenants/acme",
            "tenants/acme/sandboxes/",
            "sandboxes/x",
            "tenants//sandboxes/x",
            "tenants/a/sandboxes/x/y",
        ] {
            assert!(SandboxName::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_digest_round_trips_and_rejects_anything_else() {
        let text = format!("sha256:{}", "0f".repeat(32));
        assert_eq!(Digest::parse(&text).expect("valid").to_string(), text);
        for bad in ["", "sha256:", &text.to_uppercase(), &text[..70], "sha512:00"] {
            assert!(Digest::parse(bad).is_err(), "{bad}");
        }
    }
}
