//! Data plane tokens: what a client or agent shows to a node agent (see `TokenClaims` in `data_plane.proto`).
//!
//! A token is `wt1.{base64url(claims)}.{base64url(signature)}`; the signature, Ed25519, covers the bytes before the second
//! dot. Each replica signs with a key that never leaves it; agents hold the public keys of all replicas.

use std::collections::BTreeMap;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};
use prost::Message;

use crate::v1::TokenClaims;

const VERSION: &str = "wt1";

/// Longest token that is looked at, in bytes: the longest names give about 600.
const MAX_TOKEN_LENGTH: usize = 2048;

/// Why a token is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    #[error("the token is malformed")]
    Malformed,
    #[error("the token is signed by key {0}, which this node does not know")]
    UnknownKey(u64),
    #[error("the token's signature is wrong")]
    BadSignature,
    #[error("the token expired {0} ms ago")]
    Expired(i64),
}

/// Signs `claims`; `claims.key_id` must name `key`.
pub fn sign(claims: &TokenClaims, key: &SigningKey) -> String {
    let signed = format!("{VERSION}.{}", URL_SAFE_NO_PAD.encode(claims.encode_to_vec()));
    let signature = key.sign(signed.as_bytes());
    format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature.to_bytes()))
}

/// Checks the signature and the expiry at `now_ms` (Unix time); what the claims allow is for the caller to check.
pub fn verify(token: &str, keys: &BTreeMap<u64, VerifyingKey>, now_ms: i64) -> Result<TokenClaims, TokenError> {
    if token.len() > MAX_TOKEN_LENGTH {
        return Err(TokenError::Malformed);
    }
    let (signed, signature) = token.rsplit_once('.').ok_or(TokenError::Malformed)?;
    let (version, claims) = signed.split_once('.').ok_or(TokenError::Malformed)?;
    if version != VERSION {
        return Err(TokenError::Malformed);
    }
    let decode = |text: &str| URL_SAFE_NO_PAD.decode(text).map_err(|_| TokenError::Malformed);
    let claims = TokenClaims::decode(decode(claims)?.as_slice()).map_err(|_| TokenError::Malformed)?;
    let signature = Signature::from_slice(&decode(signature)?).map_err(|_| TokenError::Malformed)?;
    let key = keys.get(&claims.key_id).ok_or(TokenError::UnknownKey(claims.key_id))?;
    key.verify_strict(signed.as_bytes(), &signature).map_err(|_| TokenError::BadSignature)?;
    match now_ms.saturating_sub(claims.expire_time_ms) {
        late if late >= 0 => Err(TokenError::Expired(late)),
        _ => Ok(claims),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(seed: u8) -> SigningKey {
        SigningKey::from_bytes(&[seed; 32])
    }

    fn claims() -> TokenClaims {
        TokenClaims {
            key_id: 1,
            sandbox: "tenants/a/sandboxes/b".into(),
            epoch: 3,
            expire_time_ms: 1000,
            ..Default::default()
        }
    }

    #[test]
    fn a_token_is_good_for_whom_it_was_made_until_it_expires() {
        let keys = BTreeMap::from([(1, key(1).verifying_key())]);
        let token = sign(&claims(), &key(1));
        assert_eq!(verify(&token, &keys, 999), Ok(claims()));
        assert_eq!(verify(&token, &keys, 1000), Err(TokenError::Expired(0)));
    }

    #[test]
    fn a_forged_or_garbled_token_is_refused() {
        let keys = BTreeMap::from([(1, key(1).verifying_key())]);
        assert_eq!(verify(&sign(&claims(), &key(2)), &keys, 0), Err(TokenError::BadSignature));
        assert_eq!(verify(&sign(&claims(), &key(1)), &BTreeMap::new(), 0), Err(TokenError::UnknownKey(1)));
        let good = sign(&claims(), &key(1));
        let other = sign(&TokenClaims { epoch: 4, ..claims() }, &key(1));
        let spliced = format!("{}.{}", other.rsplit_once('.').expect("dot").0, good.rsplit_once('.').expect("dot").1);
        assert_eq!(verify(&spliced, &keys, 0), Err(TokenError::BadSignature));
        for bad in ["", "..", "wt1.a.b", "wt2.a.b", &good[1..], &"x".repeat(5000)] {
            assert_eq!(verify(bad, &keys, 0), Err(TokenError::Malformed), "{bad}");
        }
    }
}
