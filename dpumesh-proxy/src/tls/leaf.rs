//! What a certificate says besides its names, read when somebody asks.

use std::fmt::Write as _;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use x509_parser::objects::{oid_registry, oid2abbrev};
use x509_parser::prelude::{FromDer as _, X509Certificate};
use x509_parser::x509::X509Name;

/// A certificate's issuer, serial number and validity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Leaf {
    /// The issuer (RFC 2253).
    pub(crate) issuer: String,
    /// The serial number, hexadecimal.
    pub(crate) serial: String,
    /// Valid from then.
    pub(crate) begin: SystemTime,
    /// Valid until then.
    pub(crate) end: SystemTime,
}

impl Leaf {
    /// Reads a certificate's DER; `None` for what is none.
    pub(crate) fn of(certificate: &[u8]) -> Option<Self> {
        let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
        let serial = parsed.raw_serial();
        let zeros = serial.iter().take_while(|octet| **octet == 0).count();
        let at = |timestamp: i64| UNIX_EPOCH + Duration::from_secs(u64::try_from(timestamp).unwrap_or(0));
        Some(Self {
            issuer: rfc2253(parsed.issuer()),
            serial: hex(&serial[zeros..]),
            begin: at(parsed.validity().not_before.timestamp()),
            end: at(parsed.validity().not_after.timestamp()),
        })
    }
}

fn hex(octets: &[u8]) -> String {
    octets.iter().fold(String::new(), |mut text, octet| {
        // Writing to memory does not fail.
        let _ = write!(text, "{octet:02x}");
        text
    })
}

/// A distinguished name as RFC 2253 writes it: the last part first, what means something else escaped, and what is not ASCII too.
pub(crate) fn rfc2253(name: &X509Name<'_>) -> String {
    let parts: Vec<_> = name.iter_rdn().collect();
    let part = |attributes: &x509_parser::x509::RelativeDistinguishedName<'_>| {
        let each = attributes.iter().map(|attribute| {
            let kind = oid2abbrev(attribute.attr_type(), oid_registry());
            let kind = kind.map_or_else(|_| attribute.attr_type().to_id_string(), str::to_owned);
            match attribute.as_str() {
                Ok(value) => format!("{kind}={}", escaped(value)),
                Err(_) => format!("{kind}=#{}", hex(attribute.attr_value().data)),
            }
        });
        each.collect::<Vec<_>>().join("+")
    };
    let parts: Vec<String> = parts.into_iter().rev().map(part).collect();
    parts.join(",")
}

fn escaped(value: &str) -> String {
    let mut text = String::new();
    for (at, octet) in value.bytes().enumerate() {
        let first = at == 0 && matches!(octet, b'#' | b' ');
        let last = at + 1 == value.len() && octet == b' ';
        if first || last || b",+\"\\<>;".contains(&octet) {
            text.push('\\');
            text.push(char::from(octet));
        } else if octet.is_ascii_graphic() || octet == b' ' {
            text.push(char::from(octet));
        } else {
            let _ = write!(text, "\\{octet:02X}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, DnType, KeyPair};

    #[test]
    fn a_certificate_tells() {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CountryName, "DE");
        params
            .distinguished_name
            .push(DnType::OrganizationName, "a, \"b\" + ü");
        params.distinguished_name.push(DnType::CommonName, "#front ");
        params.serial_number = Some(vec![0x00, 0x8f, 0x01].into());
        params.not_before = rcgen::date_time_ymd(2020, 1, 2);
        params.not_after = rcgen::date_time_ymd(2040, 1, 2);
        let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        let leaf = Leaf::of(certificate.der()).unwrap();
        assert_eq!(leaf.issuer, "CN=\\#front\\ ,O=a\\, \\\"b\\\" \\+ \\C3\\BC,C=DE");
        assert_eq!(leaf.serial, "8f01");
        assert_eq!(leaf.begin, UNIX_EPOCH + Duration::from_secs(1_577_923_200));
        assert_eq!(leaf.end, UNIX_EPOCH + Duration::from_secs(2_209_075_200));
        assert_eq!(Leaf::of(b"none"), None);
    }
}
