//! Rules on subject alternative names.
//!
//! A peer passes when one of its names matches one of the rules; rules of one type are asked of names of that type only. DNS rules
//! that want a whole name honour a wildcard in the certificate, as RFC 6125 has it.

use regex::Regex;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer as _, X509Certificate};

/// The names in a certificate.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Names {
    /// `uniformResourceIdentifier`.
    pub uri: Vec<String>,
    /// `dNSName`.
    pub dns: Vec<String>,
    /// `rfc822Name`.
    pub email: Vec<String>,
    /// `iPAddress`, as text.
    pub ip: Vec<String>,
    /// The subject (RFC 2253).
    pub subject: String,
}

/// Why a certificate is no certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a certificate")]
pub struct NotACertificate;

impl Names {
    /// Reads them off a certificate's DER.
    ///
    /// # Errors
    /// It is none, or its alternative names cannot be read.
    pub fn of(certificate: &[u8]) -> Result<Self, NotACertificate> {
        let (_, parsed) = X509Certificate::from_der(certificate).map_err(|_| NotACertificate)?;
        let mut names = Self {
            subject: super::leaf::rfc2253(parsed.subject()),
            ..Self::default()
        };
        let alternative = parsed.subject_alternative_name().map_err(|_| NotACertificate)?;
        for name in alternative.iter().flat_map(|san| &san.value.general_names) {
            match name {
                GeneralName::URI(uri) => names.uri.push((*uri).to_owned()),
                GeneralName::DNSName(dns) => names.dns.push((*dns).to_owned()),
                GeneralName::RFC822Name(email) => names.email.push((*email).to_owned()),
                GeneralName::IPAddress(octets) => names.ip.extend(address(octets)),
                _ => {}
            }
        }
        Ok(names)
    }
}

fn address(octets: &[u8]) -> Option<String> {
    if let Ok(v4) = <[u8; 4]>::try_from(octets) {
        return Some(std::net::Ipv4Addr::from(v4).to_string());
    }
    let v6 = <[u8; 16]>::try_from(octets).ok()?;
    Some(std::net::Ipv6Addr::from(v6).to_string())
}

/// Names of which type a rule is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// URIs: SPIFFE ids.
    Uri,
    /// DNS names.
    Dns,
    /// Mail addresses.
    Email,
    /// IP addresses.
    Ip,
    /// All of them (the untyped `match_subject_alt_names`).
    Any,
}

/// One rule.
#[derive(Debug, Clone)]
pub struct Rule {
    /// On which names.
    pub kind: Kind,
    /// What they must be.
    pub text: Text,
}

/// A rule on text.
#[derive(Debug, Clone)]
pub struct Text {
    /// What it must be; lower case where letter case is ignored.
    pub pattern: Pattern,
    /// Whether letter case is ignored.
    pub ignore_case: bool,
}

/// What text must be.
#[derive(Debug, Clone)]
pub enum Pattern {
    /// All of it.
    Exact(String),
    /// Its beginning.
    Prefix(String),
    /// Its end.
    Suffix(String),
    /// Any part.
    Contains(String),
    /// All of it matches.
    Regex(Regex),
}

impl Text {
    /// Whether `text` is as it must be. Allocates only where letter case is ignored.
    pub fn matches(&self, text: &str) -> bool {
        let lower;
        let text = if self.ignore_case {
            lower = text.to_ascii_lowercase();
            &lower
        } else {
            text
        };
        match &self.pattern {
            Pattern::Exact(all) => text == all,
            Pattern::Prefix(part) => text.starts_with(part),
            Pattern::Suffix(part) => text.ends_with(part),
            Pattern::Contains(part) => text.contains(part),
            Pattern::Regex(regex) => regex.is_match(text),
        }
    }
}

impl Rule {
    /// Whether one of `names` is as it must be.
    pub fn matches(&self, names: &Names) -> bool {
        let any = |names: &[String]| names.iter().any(|name| self.text.matches(name));
        match self.kind {
            Kind::Uri => any(&names.uri),
            Kind::Dns => self.dns(&names.dns),
            Kind::Email => any(&names.email),
            Kind::Ip => any(&names.ip),
            Kind::Any => any(&names.uri) || self.dns(&names.dns) || any(&names.email) || any(&names.ip),
        }
    }

    fn dns(&self, names: &[String]) -> bool {
        names.iter().any(|name| match &self.text.pattern {
            Pattern::Exact(wanted) => dns_matches(name, wanted),
            _ => self.text.matches(name),
        })
    }
}

/// Whether a certificate's `name` (perhaps `*.example.com`) stands for `wanted`.
fn dns_matches(name: &str, wanted: &str) -> bool {
    if name.eq_ignore_ascii_case(wanted) {
        return true;
    }
    let (Some(suffix), Some((label, rest))) = (name.strip_prefix("*."), wanted.split_once('.')) else {
        return false;
    };
    !label.is_empty() && suffix.contains('.') && rest.eq_ignore_ascii_case(suffix)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(kind: Kind, pattern: Pattern) -> Rule {
        Rule {
            kind,
            text: Text {
                pattern,
                ignore_case: false,
            },
        }
    }

    #[test]
    fn rules_look_at_their_own_kind() {
        let names = Names {
            uri: vec!["spiffe://td/ns/a/sa/b".into()],
            dns: vec!["*.example.com".into(), "spiffe://td/ns/x/sa/y".into()],
            ..Names::default()
        };
        let uri = |text: &str| rule(Kind::Uri, Pattern::Exact(text.into())).matches(&names);
        assert!(uri("spiffe://td/ns/a/sa/b"));
        assert!(!uri("spiffe://td/ns/a/sa/"));
        assert!(!uri("spiffe://td/ns/x/sa/y"), "a DNS name is no URI");
        assert!(rule(Kind::Uri, Pattern::Prefix("spiffe://td/".into())).matches(&names));
        let dns = |text: &str| rule(Kind::Dns, Pattern::Exact(text.into())).matches(&names);
        assert!(dns("a.example.com") && dns("A.EXAMPLE.com"));
        assert!(!dns("a.b.example.com") && !dns("example.com") && !dns(".example.com"));
        assert!(!dns_matches("*.com", "example.com"));
    }

    #[test]
    fn what_is_no_certificate_has_no_names() {
        assert_eq!(Names::of(b"").unwrap_err(), NotACertificate);
        assert_eq!(Names::of(&[0x30; 64]).unwrap_err(), NotACertificate);
    }
}
