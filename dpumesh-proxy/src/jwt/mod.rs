//! JSON Web Tokens (`envoy.filters.http.jwt_authn`): who a request says it is for, and whether that is signed.
//!
//! ```text
//! request ─► rule ─► requirement ─► provider ─► token found ─► parsed ─► issuer, time, audience ─► key ─► claims
//! ```
//! [`token`] parses, [`keys`] verifies; this file decides. Whatever cannot be read in one way is no token: a name that
//! stands twice in an object, an algorithm that does not fit the key's type, `none`. Of several tokens at one place all
//! must be good: an endpoint might take another one than was looked at here.

pub mod fuzz;
pub mod keys;
pub mod remote;
pub mod token;

use std::sync::Arc;

use serde_json::Value;

use self::keys::Keys;
use self::remote::Remote;
use self::token::{Fault, Token};
use crate::route::{RequestView, RouteMatch};
use crate::stats::Scope;

/// `JwtAuthentication`: the filter of one connection manager.
#[derive(Debug)]
pub struct Filter {
    /// Who issues tokens.
    pub providers: Vec<Provider>,
    /// What requests need; the first that takes a request counts.
    pub rules: Vec<(RouteMatch, Option<Requirement>)>,
    /// CORS preflights need nothing.
    pub bypass_preflight: bool,
    /// `http.PREFIX.jwt_authn.*`
    pub stats: Arc<Scope>,
}

/// `JwtProvider`: one issuer.
#[derive(Debug)]
pub struct Provider {
    /// What `iss` says; empty is anything.
    pub issuer: String,
    /// One of these must be in `aud`; empty is anything.
    pub audiences: Vec<String>,
    /// Its keys.
    pub keys: KeySet,
    /// By how many seconds clocks may differ.
    pub skew: u64,
    /// Where its tokens stand.
    pub sources: Vec<Source>,
    /// The token goes on to the endpoint.
    pub forward: bool,
    /// The claims go on to the endpoint, encoded, in this header (lower case); with padding or without.
    pub payload_header: Option<(Vec<u8>, bool)>,
    /// What the claims are called by access rules; `None` keeps them from there.
    pub payload_key: Option<String>,
    /// Claims that are lists written as words.
    pub words: Vec<String>,
}

/// Where a provider's keys come from.
#[derive(Debug)]
pub enum KeySet {
    /// The configuration.
    Local(Keys),
    /// A service, which is asked when a token is to be verified.
    Remote(Box<Remote>),
}

impl KeySet {
    fn verify(&self, token: &Token) -> Result<(), Fault> {
        match self {
            Self::Local(keys) => keys.verify(token),
            Self::Remote(remote) => remote.verify(token),
        }
    }
}

/// Where a token stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A header (lower case), behind this text.
    Header(Vec<u8>, Vec<u8>),
    /// A query parameter.
    Parameter(Vec<u8>),
    /// A cookie.
    Cookie(Vec<u8>),
}

/// `JwtRequirement`.
#[derive(Debug)]
pub enum Requirement {
    /// A token of this provider; with audiences, for one of these instead of the provider's.
    Provider(usize, Option<Vec<String>>),
    /// One of them holds.
    Any(Vec<Self>),
    /// All of them hold.
    All(Vec<Self>),
    /// There is no token, or it is good.
    Missing,
    /// Always holds; a good token's claims are taken.
    MissingOrFailed,
}

/// The claims of a request's good tokens, by name.
#[derive(Debug, Default)]
pub struct Claims(Vec<(String, Value)>);

/// What came of a request's tokens.
#[derive(Debug, Default)]
pub struct Verified {
    /// For access rules.
    pub claims: Claims,
    /// Provider and token, as it stood.
    pub tokens: Vec<(usize, String)>,
}

impl Claims {
    /// Adds those of another filter; a name that is there already stays what it is.
    pub fn add(&mut self, others: Self) {
        for (name, claims) in others.0 {
            if !self.0.iter().any(|(known, _)| *known == name) {
                self.0.push((name, claims));
            }
        }
    }

    /// What stands at the end of a path of names, the first being the provider's own for the claims.
    pub fn get(&self, path: &[String]) -> Option<&Value> {
        let (first, rest) = path.split_first()?;
        let (_, claims) = self.0.iter().find(|(name, _)| name == first)?;
        rest.iter().try_fold(claims, |value, name| value.get(name))
    }
}

impl Filter {
    /// The requirement for a request; `None` where it needs nothing.
    pub fn requirement(&self, request: &impl RequestView) -> Option<&Requirement> {
        let rule = self.rules.iter().find(|(matcher, _)| matcher.takes(request));
        rule.and_then(|(_, requirement)| requirement.as_ref())
    }

    /// The providers whose keys are to be fetched before this request's tokens can be verified.
    pub fn unfetched(&self, requirement: &Requirement, request: &impl RequestView) -> Vec<&Remote> {
        let mut concerned = Vec::new();
        self.concerned(requirement, &mut concerned);
        let remote = |index: usize| match &self.providers[index].keys {
            KeySet::Remote(remote) => Some(&**remote),
            KeySet::Local(_) => None,
        };
        let has_token = |index: usize| {
            let mut sources = self.providers[index].sources.iter();
            sources.any(|source| !source.find(request).is_empty())
        };
        let due = |index: &usize| remote(*index).is_some_and(Remote::is_due) && has_token(*index);
        concerned.into_iter().filter(due).filter_map(remote).collect()
    }

    /// The providers that a requirement may look at.
    fn concerned(&self, requirement: &Requirement, out: &mut Vec<usize>) {
        match requirement {
            Requirement::Provider(index, _) => out.push(*index),
            Requirement::Any(list) | Requirement::All(list) => {
                list.iter().for_each(|one| self.concerned(one, out));
            }
            Requirement::Missing | Requirement::MissingOrFailed => out.extend(0..self.providers.len()),
        }
    }

    /// Decides at `now` (seconds since 1970). Keys that come from a service must have been fetched.
    ///
    /// # Errors
    /// What is wrong with the token, or that there is none.
    pub fn verify(
        &self,
        requirement: &Requirement,
        request: &impl RequestView,
        now: u64,
    ) -> Result<Verified, Fault> {
        let mut verified = Verified::default();
        self.meet(requirement, request, now, &mut verified)?;
        Ok(verified)
    }

    fn meet(
        &self,
        requirement: &Requirement,
        request: &impl RequestView,
        now: u64,
        verified: &mut Verified,
    ) -> Result<(), Fault> {
        match requirement {
            Requirement::Provider(index, audiences) => {
                let asked = Some((*index, audiences.as_deref()));
                self.tokens(asked, request, now, verified)
            }
            Requirement::All(all) => all.iter().try_for_each(|r| self.meet(r, request, now, verified)),
            Requirement::Any(any) => {
                let mut fault = Fault::Missing;
                for requirement in any {
                    match self.meet(requirement, request, now, verified) {
                        Ok(()) => return Ok(()),
                        // What is wrong with a token says more than that another one is not there.
                        Err(other) if matches!(fault, Fault::Missing | Fault::UnknownIssuer) => fault = other,
                        Err(_) => {}
                    }
                }
                Err(fault)
            }
            Requirement::Missing => match self.tokens(None, request, now, verified) {
                Err(Fault::Missing) => Ok(()),
                other => other,
            },
            Requirement::MissingOrFailed => {
                // Good ones count, bad ones do not matter.
                let _ = self.tokens(None, request, now, verified);
                Ok(())
            }
        }
    }

    /// Verifies all tokens that stand where the provider's (or any provider's) do.
    fn tokens(
        &self,
        asked: Option<(usize, Option<&[String]>)>,
        request: &impl RequestView,
        now: u64,
        verified: &mut Verified,
    ) -> Result<(), Fault> {
        let mut found: Vec<(String, Vec<usize>)> = Vec::new();
        for (index, provider) in self.providers.iter().enumerate() {
            if asked.is_some_and(|(wanted, _)| wanted != index) {
                continue;
            }
            for text in provider.sources.iter().flat_map(|s| s.find(request)) {
                match found.iter_mut().find(|(known, _)| *known == text) {
                    Some((_, providers)) => providers.push(index),
                    None => found.push((text, vec![index])),
                }
            }
        }
        if found.is_empty() {
            return Err(Fault::Missing);
        }
        let mut good = Vec::new();
        for (text, providers) in found {
            let token = Token::parse(&text)?;
            let mut issuers = providers.into_iter();
            let issuer = issuers.find(|i| self.providers[*i].issues(&token));
            let index = issuer.ok_or(Fault::UnknownIssuer)?;
            let provider = &self.providers[index];
            let audiences = asked.and_then(|(_, audiences)| audiences);
            provider.check(&token, audiences.unwrap_or(&provider.audiences), now)?;
            good.push((index, text, token));
        }
        for (index, text, token) in good {
            if let Some(key) = &self.providers[index].payload_key {
                let known = verified.claims.0.iter().any(|(name, _)| name == key);
                if !known {
                    let claims = self.providers[index].normalized(token.claims);
                    verified.claims.0.push((key.clone(), claims));
                }
            }
            if !verified.tokens.iter().any(|(i, t)| *i == index && *t == text) {
                verified.tokens.push((index, text));
            }
        }
        Ok(())
    }
}

impl Provider {
    fn issues(&self, token: &Token) -> bool {
        self.issuer.is_empty() || self.issuer == token.issuer
    }

    fn check(&self, token: &Token, audiences: &[String], now: u64) -> Result<(), Fault> {
        if token
            .not_before
            .is_some_and(|from| now.saturating_add(self.skew) < from)
        {
            return Err(Fault::NotYetValid);
        }
        if token
            .expires
            .is_some_and(|end| now > end.saturating_add(self.skew))
        {
            return Err(Fault::Expired);
        }
        let meant = |audience: &String| audiences.iter().any(|a| same_audience(a, audience));
        if !audiences.is_empty() && !token.audiences.iter().any(meant) {
            return Err(Fault::Audience);
        }
        self.keys.verify(token)
    }

    /// The claims with lists of words made lists.
    fn normalized(&self, mut claims: Value) -> Value {
        for name in &self.words {
            if let Some(value) = claims.get_mut(name)
                && let Some(text) = value.as_str()
            {
                *value = text.split(' ').filter(|w| !w.is_empty()).collect();
            }
        }
        claims
    }
}

/// Audiences are the same with `http://`, `https://` and a slash at the end left out, as in Envoy.
fn same_audience(a: &str, b: &str) -> bool {
    fn bare(audience: &str) -> &str {
        let rest = audience
            .strip_prefix("https://")
            .or_else(|| audience.strip_prefix("http://"))
            .unwrap_or(audience);
        rest.strip_suffix('/').unwrap_or(rest)
    }
    bare(a) == bare(b)
}

impl Source {
    /// The tokens that stand here.
    fn find(&self, request: &impl RequestView) -> Vec<String> {
        let mut found = Vec::new();
        let mut add = |text: &[u8]| found.push(String::from_utf8_lossy(text).into_owned());
        match self {
            Self::Header(name, front) => request.each_header(name, &mut |value| {
                let at = memchr::memmem::find(value, front);
                if let Some(at) = at {
                    add(token_text(&value[at + front.len()..]));
                }
            }),
            Self::Parameter(name) => {
                let path = request.path();
                let query = path
                    .iter()
                    .position(|b| *b == b'?')
                    .map_or(&[][..], |at| &path[at + 1..]);
                for pair in query.split(|b| *b == b'&') {
                    let mut parts = pair.splitn(2, |b| *b == b'=');
                    if parts.next() == Some(name) {
                        add(parts.next().unwrap_or_default());
                    }
                }
            }
            Self::Cookie(name) => request.each_header(b"cookie", &mut |value| {
                for pair in value.split(|b| *b == b';').map(<[u8]>::trim_ascii) {
                    let mut parts = pair.splitn(2, |b| *b == b'=');
                    if parts.next() == Some(name) {
                        let value = parts.next().unwrap_or_default();
                        let bare = value.strip_prefix(b"\"").and_then(|v| v.strip_suffix(b"\""));
                        add(bare.unwrap_or(value));
                    }
                }
            }),
        }
        found
    }
}

/// From the first octet that a token may have to the last one in a row.
fn token_text(value: &[u8]) -> &[u8] {
    let part = |b: &u8| b.is_ascii_alphanumeric() || b"-_.".contains(b);
    let begin = value.iter().position(part).unwrap_or(value.len());
    let rest = &value[begin..];
    let end = rest.iter().position(|b| !part(b)).unwrap_or(rest.len());
    &rest[..end]
}
