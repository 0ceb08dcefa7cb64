//! Key sets (RFC 7517) and signatures by them. Cryptography is `jsonwebtoken`'s on aws-lc-rs.

use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk};
use jsonwebtoken::{Algorithm, DecodingKey, crypto};
use serde_json::Value;

use super::token::{Fault, Token};

/// A provider's keys.
#[derive(Debug)]
pub struct Keys(Vec<Key>);

struct Key {
    id: Option<String>,
    /// What it may have signed.
    algorithms: Vec<Algorithm>,
    key: DecodingKey,
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // A key may be a secret one.
        f.debug_struct("Key")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl Keys {
    /// Reads a key set; keys of kinds that are not known here are left out.
    ///
    /// # Errors
    /// It is no key set, or none of its keys can be used.
    pub fn parse(text: &[u8]) -> Result<Self, String> {
        let set: Value = serde_json::from_slice(text).map_err(|e| e.to_string())?;
        let list = set.get("keys").and_then(Value::as_array);
        let list = list.ok_or("has no list of keys")?;
        let keys: Vec<Key> = list.iter().filter_map(key).collect();
        if keys.is_empty() {
            return Err("has no key that can be used".to_owned());
        }
        Ok(Self(keys))
    }

    /// Whether one of the keys signed the token. A token that names its key is held against no other.
    ///
    /// # Errors
    /// None did, or none could have.
    pub fn verify(&self, token: &Token) -> Result<(), Fault> {
        let mut fault = Fault::NoKey;
        for key in &self.0 {
            let named = match (&token.key, &key.id) {
                (Some(asked), Some(id)) => asked == id,
                _ => true,
            };
            if !named || !key.algorithms.contains(&token.algorithm) {
                continue;
            }
            fault = Fault::Signature;
            let signed = token.signed.as_bytes();
            if let Ok(true) = crypto::verify(&token.signature, signed, &key.key, token.algorithm) {
                return Ok(());
            }
        }
        Err(fault)
    }
}

/// A key of the set, if it is of a kind known here.
fn key(value: &Value) -> Option<Key> {
    let jwk: Jwk = serde_json::from_value(value.clone()).ok()?;
    let algorithms: &[Algorithm] = match &jwk.algorithm {
        AlgorithmParameters::RSA(_) => &[
            Algorithm::RS256,
            Algorithm::RS384,
            Algorithm::RS512,
            Algorithm::PS256,
            Algorithm::PS384,
            Algorithm::PS512,
        ],
        AlgorithmParameters::EllipticCurve(ec) => match ec.curve {
            EllipticCurve::P256 => &[Algorithm::ES256],
            EllipticCurve::P384 => &[Algorithm::ES384],
            _ => return None,
        },
        AlgorithmParameters::OctetKeyPair(pair) if pair.curve == EllipticCurve::Ed25519 => {
            &[Algorithm::EdDSA]
        }
        AlgorithmParameters::OctetKey(_) => &[Algorithm::HS256, Algorithm::HS384, Algorithm::HS512],
        _ => return None,
    };
    let only = match value.get("alg").and_then(Value::as_str) {
        Some(name) => Some(name.parse::<Algorithm>().ok()?),
        None => None,
    };
    let algorithms: Vec<Algorithm> = algorithms
        .iter()
        .copied()
        .filter(|a| only.is_none_or(|only| only == *a))
        .collect();
    if algorithms.is_empty() {
        return None;
    }
    Some(Key {
        id: jwk.common.key_id.clone(),
        algorithms,
        key: DecodingKey::from_jwk(&jwk).ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An RSA key whose private half is gone, and tokens that it signed.
    const N: &str = "mm7MZ7UPNUGYi3nphJFneiPg3M-UdOYfleSL52pvoaQyXjUbTUdM9FvKSTaN7zu9Lv1QWux8oZCxnzzoX9gu5gu56n45JGcGnwCSdrT-k2lyaTdphLi_4CYWquPeeNVN2TT8TSHqrwnll5pyNzU3ZfM1vsC_Ob8fY2-2_cb4-5vSQeLrEo4wUo73b05W4aFAO2obQUvJbMlB7x5XlAWaLoA3rvWdcc1kY7XmoAXmuLVnY1XkgR6RkE27J5DNv_j2gI1zQhRcQ4vSJonwWAZ1GN9LeFTjSnxIRCp398DsawQNMoN8X1CyzLm9jgY4XPxXwTIU9zcbnHdgGw8wkaKazQ";
    const RS256: &str = "eyJhbGciOiJSUzI1NiIsImtpZCI6ImsifQ.eyJpc3MiOiJpIn0.KPZlHtnkBjRsWPPVhPX-yac_LSa-C21B67j6NcyzA8bTWYgu400VTR_lZbBs3SPMriYlhr-_J8pwXssU53nZYw2rQca-2TTqegndoQ8jCVJgrw9advGTh3cntD5xc1d8Udq9xJufdz6ZQo2hNSGmO0trB_UfAEVJh4U27Wq9afX_qGybtCZOd5vEc8W7x9QTpCMNt1T1n5CDkk0XSy0LJe9ngYzFWGmwxZA9pDXFFmEdig0EVhiZaoHbTWamAayUfQV1k-dGCi8NLtKu4uA9Qa4pjZRhjbMOPz9vMKw7RrVfNi3P6ErPrSznIh_doEjA7OnIry-ufPjpaS5BqoQfyg";
    const PS256: &str = "eyJhbGciOiJQUzI1NiIsImtpZCI6ImsifQ.eyJpc3MiOiJpIn0.mW6-s7UBfWlEibcqKIMXTW_87NQYM1MzemzbQa2nPe8P_j86534OcMfncjZBnjw7JdteOYD70CRD56u2F4AjZTVb4qhrNleVgcsFNzmamJcQIQ767CnbJ60GjbJja14_F8tv2LFkMqyg6JOjhkBcYYQxxoq3QTtjRnnqNbR9nrvLZ3QEhLFY5PjdAVR-bbcBozHA0uHWXwHRoi0SmG3dbfAPSiGg0TfKiPDILOubPTYixpbSsdqw2VHRxqwaSO6XnmjFS6QSkwJalqHIL6qHVI5cYcbMXOSEsLgvI6ghq7PGfehn9tfeNYCVaSF2DBH__WHDFn8csCcxEmWW77q4Jw";
    /// Signed with the public key's text as if that were a secret.
    const CONFUSED: &str =
        "eyJhbGciOiJIUzI1NiIsImtpZCI6ImsifQ.eyJpc3MiOiJpIn0.z2-ZqdjpQ5dIVpIGyF0MSeW9_heTNCiyn4jQUS1IqzE";

    fn set(more: &str) -> String {
        format!(r#"{{"keys":[{{"kty":"new"}},{{"kty":"RSA","e":"AQAB","n":"{N}"{more}}}]}}"#)
    }

    #[test]
    fn a_key_verifies_what_it_signed_and_is_for() {
        let not_its = RS256.replacen("eyJpc3MiOiJpIn0", "eyJpc3MiOiJqIn0", 1);
        assert_ne!(not_its, RS256);
        let short = format!("{}.AAAA", RS256.rsplit_once('.').unwrap().0);
        for (more, token, wanted) in [
            ("", RS256, Ok(())),
            ("", PS256, Ok(())),
            (r#","kid":"k","alg":"RS256""#, RS256, Ok(())),
            (r#","kid":"k","alg":"RS256""#, PS256, Err(Fault::NoKey)),
            (r#","kid":"other""#, RS256, Err(Fault::NoKey)),
            ("", &not_its, Err(Fault::Signature)),
            ("", &short, Err(Fault::Signature)),
            ("", CONFUSED, Err(Fault::NoKey)),
        ] {
            let keys = Keys::parse(set(more).as_bytes()).unwrap();
            let token = Token::parse(token).unwrap();
            assert_eq!(keys.verify(&token), wanted, "{more} {token:?}");
        }
    }

    #[test]
    fn a_set_without_a_key_is_none() {
        for text in [
            "",
            "{}",
            r#"{"keys":[]}"#,
            r#"{"keys":[{"kty":"new"}]}"#,
            r#"{"keys":[{"kty":"RSA","e":"AQAB","n":"AQAB","alg":"ES256"}]}"#,
        ] {
            assert!(Keys::parse(text.as_bytes()).is_err(), "{text}");
        }
    }
}
