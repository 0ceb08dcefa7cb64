//! What must hold of any octets that come as a token. Run by the fuzzer's target `jwt`, and here over its corpus.

use super::keys::Keys;
use super::token::Token;

/// Reads `octets` as a token: no panic, what is read is what was signed, and without a key nothing is good.
///
/// # Panics
/// One of these does not hold.
pub fn token(octets: &[u8]) {
    let Ok(text) = std::str::from_utf8(octets) else {
        return;
    };
    let Ok(token) = Token::parse(text) else {
        return;
    };
    assert_eq!(format!("{}.{}", token.signed, token.signature), text);
    assert_eq!(text.matches('.').count(), 2);
    assert!(token.claims.is_object());
    let keys = Keys::parse(KEYS).expect("a key set");
    assert!(keys.verify(&token).is_err(), "nobody has the private halves");
}

/// Public keys whose private halves were thrown away.
const KEYS: &[u8] = br#"{"keys":[
{"kty":"RSA","e":"AQAB","n":"0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRXjBZCiFV4n3oknjhMstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6qMQvRL5hajrn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw"},
{"kty":"EC","crv":"P-256","x":"MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4","y":"4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM"}
]}"#;

#[cfg(test)]
mod tests {
    #[test]
    fn the_corpus_holds() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/corpus/jwt");
        let files: Vec<_> = std::fs::read_dir(folder).unwrap().map(Result::unwrap).collect();
        assert!(files.len() >= 8, "{} files", files.len());
        for file in files {
            let octets = std::fs::read(file.path()).unwrap();
            super::token(&octets);
            (0..octets.len()).for_each(|length| super::token(&octets[..length]));
        }
    }
}
