//! Who may do what: a token's signature, then that it was made for this ledger, this node and this call.

use metrics::counter;
use tonic::metadata::MetadataMap;
use warren_proto::ids::{Digest, Epoch, NodeId, SandboxName};
use warren_proto::token::{self, TokenError};
use warren_proto::v1::TokenClaims;
use warren_proto::v1::token_claims::Scope;

use crate::clock;
use crate::driver::InstanceKey;
use crate::metrics::TOKENS_REFUSED;
use crate::session::Membership;

/// Why a call is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AuthError {
    #[error("metadata `authorization: Bearer {{token}}` is missing")]
    Missing,
    #[error(transparent)]
    Token(#[from] TokenError),
    #[error("the token names no {0}")]
    Claims(&'static str),
    #[error("the token is for {what} `{claimed}`, not for {what} `{here}`")]
    OtherPlace { what: &'static str, claimed: String, here: String },
    #[error("the token does not allow this call")]
    OtherScope,
    #[error("the token is for template {claimed}, not for {asked}")]
    OtherTemplate { claimed: String, asked: Digest },
}

/// Checks tokens for one node. Clones share the keys.
#[derive(Debug, Clone)]
pub struct Authority {
    node: NodeId,
    membership: Membership,
}

impl Authority {
    pub fn new(node: NodeId, membership: Membership) -> Self {
        Self { node, membership }
    }

    /// The instance that the bearer may use.
    pub fn sandbox(&self, metadata: &MetadataMap) -> Result<InstanceKey, AuthError> {
        counted(self.claims(metadata, Scope::Sandbox).and_then(|claims| {
            let sandbox = SandboxName::parse(&claims.sandbox).map_err(|_| AuthError::Claims("sandbox"))?;
            Ok(InstanceKey { sandbox, epoch: Epoch(claims.epoch) })
        }))
    }

    pub fn upload(&self, metadata: &MetadataMap, asked: &Digest) -> Result<(), AuthError> {
        counted(self.template(metadata, Scope::TemplateUpload, asked))
    }

    pub fn download(&self, metadata: &MetadataMap, asked: &Digest) -> Result<(), AuthError> {
        counted(self.template(metadata, Scope::TemplateDownload, asked))
    }

    /// A token for imports is for no digest: nobody knows it before.
    pub fn import(&self, metadata: &MetadataMap) -> Result<(), AuthError> {
        counted(self.claims(metadata, Scope::TemplateImport).map(drop))
    }

    fn template(&self, metadata: &MetadataMap, scope: Scope, asked: &Digest) -> Result<(), AuthError> {
        let claims = self.claims(metadata, scope)?;
        if claims.template_digest == asked.to_string() {
            Ok(())
        } else {
            Err(AuthError::OtherTemplate { claimed: claims.template_digest, asked: *asked })
        }
    }

    fn claims(&self, metadata: &MetadataMap, scope: Scope) -> Result<TokenClaims, AuthError> {
        let value = metadata.get("authorization").and_then(|value| value.to_str().ok());
        let token = value.and_then(|text| text.strip_prefix("Bearer ")).ok_or(AuthError::Missing)?;
        let claims = token::verify(token, &self.membership.keys(), clock::unix_now_ms())?;
        let ledger = self.membership.ledger_id().unwrap_or_default();
        same_place("ledger", &claims.ledger_id, &ledger)?;
        // A download token is good at any holder.
        if !claims.node.is_empty() {
            let node = claims.node.strip_prefix("nodes/").unwrap_or(&claims.node);
            same_place("node", node, self.node.as_str())?;
        }
        if claims.scope() == scope { Ok(claims) } else { Err(AuthError::OtherScope) }
    }
}

fn same_place(what: &'static str, claimed: &str, here: &str) -> Result<(), AuthError> {
    if claimed == here {
        Ok(())
    } else {
        Err(AuthError::OtherPlace { what, claimed: claimed.to_owned(), here: here.to_owned() })
    }
}

fn counted<T>(result: Result<T, AuthError>) -> Result<T, AuthError> {
    if let Err(error) = &result {
        let reason = match error {
            AuthError::Missing => "missing",
            AuthError::Token(TokenError::Expired(_)) => "expired",
            AuthError::Token(TokenError::UnknownKey(_)) => "unknown_key",
            AuthError::Token(_) | AuthError::Claims(_) => "invalid",
            AuthError::OtherPlace { .. } | AuthError::OtherScope | AuthError::OtherTemplate { .. } => "other_purpose",
        };
        counter!(TOKENS_REFUSED, "reason" => reason).increment(1);
    }
    result
}
