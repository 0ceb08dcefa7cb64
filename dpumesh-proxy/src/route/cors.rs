//! Cross-origin requests (CORS): who may make them, and what a preflight is told.

use super::fault::Percentage;
use super::{AddHeader, AddHow, Text};

/// `envoy.extensions.filters.http.cors.v3.CorsPolicy`.
#[derive(Debug)]
pub struct Cors {
    /// How many requests it is for.
    pub enabled: Percentage,
    /// Origins that may; a rule that holds for `*` lets all.
    pub origins: Vec<Text>,
    /// `access-control-allow-methods`; empty leaves it out, as below.
    pub methods: Vec<u8>,
    /// `access-control-allow-headers`.
    pub headers: Vec<u8>,
    /// `access-control-expose-headers`.
    pub expose: Vec<u8>,
    /// `access-control-max-age`.
    pub max_age: Vec<u8>,
    /// `access-control-allow-credentials: true`.
    pub credentials: bool,
    /// A preflight of an origin that may not goes to the endpoint; else it is answered, without leave.
    pub forward_unmatched: bool,
}

impl Cors {
    /// Whether requests of `origin` may cross.
    pub fn allows(&self, origin: &[u8]) -> bool {
        self.origins.iter().any(|o| o.holds(b"*") || o.holds(origin))
    }

    /// What is added to the response to a request; `origin` is there if it may cross. A preflight is told what is
    /// allowed in any case, as Envoy does.
    pub fn response_headers(&self, origin: Option<&[u8]>, preflight: bool) -> Vec<AddHeader> {
        let mut all = Vec::new();
        let mut put = |name, value: &[u8]| {
            if !value.is_empty() {
                all.push(header(name, value));
            }
        };
        if let Some(origin) = origin {
            put("access-control-allow-origin", origin);
            put("access-control-expose-headers", &self.expose);
        }
        if self.credentials && (origin.is_some() || preflight) {
            put("access-control-allow-credentials", b"true");
        }
        if preflight {
            put("access-control-allow-methods", &self.methods);
            put("access-control-allow-headers", &self.headers);
            put("access-control-max-age", &self.max_age);
        }
        all
    }
}

fn header(name: &str, value: &[u8]) -> AddHeader {
    AddHeader {
        name: name.as_bytes().to_vec(),
        value: value.to_vec(),
        template: None,
        how: AddHow::Overwrite,
    }
}
