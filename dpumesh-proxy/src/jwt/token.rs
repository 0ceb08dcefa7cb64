//! A token in compact form (RFC 7515, 7519): `HEADER.CLAIMS.SIGNATURE`, each base64url without padding.
//!
//! Parsing verifies nothing. It refuses what two readers might read in two ways: padding and stray bits, names that
//! stand twice in an object, times that are no whole numbers.

use std::fmt;
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::Algorithm;
use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

/// What is wrong with a token. The texts are Envoy's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "each is told by its text in `text`")]
pub enum Fault {
    Missing,
    NotYetValid,
    Expired,
    Form,
    HeaderBase64,
    HeaderJson,
    Algorithm,
    UnknownAlgorithm,
    KeyId,
    ClaimsBase64,
    ClaimsJson,
    Issuer,
    Subject,
    IssuedAt,
    NotBefore,
    Expires,
    Audiences,
    SignatureBase64,
    UnknownIssuer,
    Audience,
    Signature,
    NoKey,
    Fetch,
}

impl Fault {
    /// The body of the refusal.
    pub fn text(self) -> &'static str {
        match self {
            Self::Missing => "Jwt is missing",
            Self::NotYetValid => "Jwt not yet valid",
            Self::Expired => "Jwt is expired",
            Self::Form => "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections",
            Self::HeaderBase64 => "Jwt header is an invalid Base64url encoded",
            Self::HeaderJson => "Jwt header is an invalid JSON",
            Self::Algorithm => "Jwt header [alg] field is required and must be a string",
            Self::UnknownAlgorithm => "Jwt header [alg] is not supported",
            Self::KeyId => "Jwt header [kid] field is not a string",
            Self::ClaimsBase64 => "Jwt payload is an invalid Base64url encoded",
            Self::ClaimsJson => "Jwt payload is an invalid JSON",
            Self::Issuer => "Jwt payload [iss] field is not a string",
            Self::Subject => "Jwt payload [sub] field is not a string",
            Self::IssuedAt => "Jwt payload [iat] field is not an integer",
            Self::NotBefore => "Jwt payload [nbf] field is not an integer",
            Self::Expires => "Jwt payload [exp] field is not an integer",
            Self::Audiences => "Jwt payload [aud] field is not a string or string list",
            Self::SignatureBase64 => "Jwt signature is an invalid Base64url encoded",
            Self::UnknownIssuer => "Jwt issuer is not configured",
            Self::Audience => "Audiences in Jwt are not allowed",
            Self::Signature => "Jwt verification fails",
            Self::Fetch => "Jwks remote fetch is failed",
            Self::NoKey => "Jwks doesn't have key to match kid or alg from Jwt",
        }
    }

    /// The status of the refusal.
    pub fn status(self) -> u16 {
        if self == Self::Audience { 403 } else { 401 }
    }

    /// What is logged.
    pub fn details(self) -> String {
        format!("jwt_authn_access_denied{{{}}}", self.text().replace(' ', "_"))
    }
}

/// A parsed token.
#[derive(Debug)]
pub struct Token {
    /// How it is signed.
    pub algorithm: Algorithm,
    /// `kid`.
    pub key: Option<String>,
    /// `iss`, or empty.
    pub issuer: String,
    /// `aud`.
    pub audiences: Vec<String>,
    /// `nbf`, seconds since 1970.
    pub not_before: Option<u64>,
    /// `exp`, seconds since 1970.
    pub expires: Option<u64>,
    /// All claims, an object.
    pub claims: Value,
    /// What is signed.
    pub signed: String,
    /// The signature, encoded.
    pub signature: String,
}

impl Token {
    /// Parses `text`.
    ///
    /// # Errors
    /// What is wrong with its form.
    pub fn parse(text: &str) -> Result<Self, Fault> {
        let mut sections = text.split('.');
        let (Some(header), Some(claims), Some(signature), None) =
            (sections.next(), sections.next(), sections.next(), sections.next())
        else {
            return Err(Fault::Form);
        };
        if header.is_empty() || claims.is_empty() || signature.is_empty() {
            return Err(Fault::Form);
        }
        let decode = |section: &str, fault| URL_SAFE_NO_PAD.decode(section).map_err(|_| fault);
        let fields = object(&decode(header, Fault::HeaderBase64)?).ok_or(Fault::HeaderJson)?;
        let algorithm = fields
            .get("alg")
            .and_then(Value::as_str)
            .ok_or(Fault::Algorithm)?;
        let algorithm = Algorithm::from_str(algorithm).map_err(|_| Fault::UnknownAlgorithm)?;
        // Extensions that a reader must understand: none are here (RFC 7515, 4.1.11).
        if fields.contains_key("crit") {
            return Err(Fault::HeaderJson);
        }
        let key = text_of(&fields, "kid", Fault::KeyId)?;
        let claims = object(&decode(claims, Fault::ClaimsBase64)?).ok_or(Fault::ClaimsJson)?;
        let issuer = text_of(&claims, "iss", Fault::Issuer)?.unwrap_or_default();
        text_of(&claims, "sub", Fault::Subject)?;
        time_of(&claims, "iat", Fault::IssuedAt)?;
        decode(signature, Fault::SignatureBase64)?;
        Ok(Self {
            algorithm,
            key,
            issuer,
            audiences: audiences(&claims)?,
            not_before: time_of(&claims, "nbf", Fault::NotBefore)?,
            expires: time_of(&claims, "exp", Fault::Expires)?,
            claims: Value::Object(claims),
            signed: text[..text.len() - signature.len() - 1].to_owned(),
            signature: signature.to_owned(),
        })
    }
}

fn text_of(fields: &Map<String, Value>, name: &str, fault: Fault) -> Result<Option<String>, Fault> {
    match fields.get(name) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(_) => Err(fault),
    }
}

fn time_of(fields: &Map<String, Value>, name: &str, fault: Fault) -> Result<Option<u64>, Fault> {
    match fields.get(name) {
        None => Ok(None),
        Some(value) => value.as_u64().map(Some).ok_or(fault),
    }
}

fn audiences(claims: &Map<String, Value>) -> Result<Vec<String>, Fault> {
    let text = |value: &Value| value.as_str().map(str::to_owned).ok_or(Fault::Audiences);
    match claims.get("aud") {
        None => Ok(Vec::new()),
        Some(Value::Array(items)) => items.iter().map(text).collect(),
        Some(value) => Ok(vec![text(value)?]),
    }
}

fn object(octets: &[u8]) -> Option<Map<String, Value>> {
    match serde_json::from_slice(octets) {
        Ok(Strict(Value::Object(map))) => Some(map),
        _ => None,
    }
}

/// A JSON value in which no object has a name twice.
struct Strict(Value);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(StrictVisitor).map(Self)
    }
}

struct StrictVisitor;

impl<'de> Visitor<'de> for StrictVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(Strict(item)) = items.next_element()? {
            list.push(item);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some((name, Strict(value))) = items.next_entry::<String, Strict>()? {
            if map.insert(name, value).is_some() {
                return Err(A::Error::custom("a name stands twice"));
            }
        }
        Ok(Value::Object(map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(header: &str, claims: &str, signature: &str) -> String {
        let part = |text: &str| URL_SAFE_NO_PAD.encode(text);
        format!("{}.{}.{}", part(header), part(claims), part(signature))
    }

    const HEADER: &str = r#"{"alg":"RS256","kid":"k"}"#;

    #[test]
    fn a_token_is_read_or_its_fault_is_named() {
        let whole = token(
            HEADER,
            r#"{"iss":"i","sub":"s","aud":["a","b"],"exp":2,"nbf":1}"#,
            "sig",
        );
        let read = Token::parse(&whole).unwrap();
        assert_eq!((read.issuer.as_str(), read.key.as_deref()), ("i", Some("k")));
        assert_eq!((read.not_before, read.expires), (Some(1), Some(2)));
        assert_eq!(read.audiences, ["a", "b"]);
        assert_eq!(format!("{}.{}", read.signed, read.signature), whole);
        for (header, claims, fault) in [
            ("", "{}", Fault::Form),
            ("[]", "{}", Fault::HeaderJson),
            (r#"{"alg":"RS256","alg":"none"}"#, "{}", Fault::HeaderJson),
            (r#"{"alg":"RS256","crit":["b64"]}"#, "{}", Fault::HeaderJson),
            ("{}", "{}", Fault::Algorithm),
            (r#"{"alg":1}"#, "{}", Fault::Algorithm),
            (r#"{"alg":"none"}"#, "{}", Fault::UnknownAlgorithm),
            (r#"{"alg":"NONE"}"#, "{}", Fault::UnknownAlgorithm),
            (r#"{"alg":"rs256"}"#, "{}", Fault::UnknownAlgorithm),
            (r#"{"alg":"RS256","kid":1}"#, "{}", Fault::KeyId),
            (HEADER, "", Fault::Form),
            (HEADER, "1", Fault::ClaimsJson),
            (HEADER, "{}{}", Fault::ClaimsJson),
            (HEADER, r#"{"iss":"a","iss":"b"}"#, Fault::ClaimsJson),
            (HEADER, r#"{"x":{"y":1,"y":2}}"#, Fault::ClaimsJson),
            (HEADER, r#"{"iss":1}"#, Fault::Issuer),
            (HEADER, r#"{"sub":[]}"#, Fault::Subject),
            (HEADER, r#"{"iat":"1"}"#, Fault::IssuedAt),
            (HEADER, r#"{"nbf":-1}"#, Fault::NotBefore),
            (HEADER, r#"{"exp":1e3}"#, Fault::Expires),
            (HEADER, r#"{"exp":99999999999999999999}"#, Fault::Expires),
            (HEADER, r#"{"aud":{}}"#, Fault::Audiences),
            (HEADER, r#"{"aud":["a",1]}"#, Fault::Audiences),
        ] {
            let got = Token::parse(&token(header, claims, "s")).unwrap_err();
            assert_eq!(got, fault, "{header} {claims}");
        }
        let good = token(HEADER, "{}", "s");
        for (text, fault) in [
            ("", Fault::Form),
            ("a.b", Fault::Form),
            ("a.b.c.d", Fault::Form),
            ("!.e30.e30", Fault::HeaderBase64),
            (&format!("{good}="), Fault::SignatureBase64),
            (&format!("{good}!"), Fault::SignatureBase64),
            (&good.replacen('.', "=.", 1), Fault::HeaderBase64),
        ] {
            assert_eq!(Token::parse(text).unwrap_err(), fault, "{text}");
        }
    }

    #[test]
    fn no_cut_of_a_token_is_that_token() {
        let whole = token(HEADER, r#"{"iss":"i"}"#, "signature");
        for length in 0..whole.len() {
            if let Ok(cut) = Token::parse(&whole[..length]) {
                assert_ne!(cut.signature, "c2lnbmF0dXJl", "{length}");
            }
        }
    }
}
