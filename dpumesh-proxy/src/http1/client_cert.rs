//! `x-forwarded-client-cert`: what the endpoint is told of the client's certificate, written as Envoy writes it.
//!
//! `By=` who we answered as; `Hash=` SHA-256 of the client's certificate; then, as configured, `Subject`, `URI`, `DNS`.
//! Elements of earlier hops stand before ours, separated by commas.

use super::head::{FieldKind, RequestHead};
use super::policy::{ClientCert, Forwarding};
use crate::tls::{Connection, PeerIdentity};

/// Whether the client's own header passes.
pub(super) fn passes(policy: ClientCert, connection: &Connection) -> bool {
    match policy.forwarding {
        Forwarding::Always => true,
        Forwarding::Forward | Forwarding::Append => connection.peer.is_some(),
        Forwarding::Sanitize | Forwarding::Set => false,
    }
}

/// Writes the header for the endpoint, if there is to be one.
pub(super) fn write(
    policy: ClientCert,
    connection: &Connection,
    request: &RequestHead,
    head: &[u8],
    out: &mut Vec<u8>,
) {
    if policy.forwarding == Forwarding::Sanitize {
        return;
    }
    let begin = out.len();
    out.extend_from_slice(b"x-forwarded-client-cert: ");
    let empty = out.len();
    if passes(policy, connection) {
        let fields = request.fields.fields.iter();
        for field in fields.filter(|f| f.kind == FieldKind::ClientCert) {
            separate(b",", empty, out);
            out.extend_from_slice(field.value.of_head(head));
        }
    }
    if let (Forwarding::Append | Forwarding::Set, Some(peer)) = (policy.forwarding, &connection.peer) {
        separate(b",", empty, out);
        element(policy, connection, peer, out);
    }
    if out.len() == empty {
        out.truncate(begin);
    } else {
        out.extend_from_slice(b"\r\n");
    }
}

fn separate(by: &[u8], empty: usize, out: &mut Vec<u8>) {
    if out.len() > empty {
        out.extend_from_slice(by);
    }
}

fn element(policy: ClientCert, connection: &Connection, peer: &PeerIdentity, out: &mut Vec<u8>) {
    let begin = out.len();
    let pair = |name: &[u8], value: &[u8], out: &mut Vec<u8>| {
        separate(b";", begin, out);
        out.extend_from_slice(name);
        out.extend_from_slice(value);
    };
    for uri in connection.local.iter().flat_map(|l| &l.uri_sans) {
        pair(b"By=", uri.as_bytes(), out);
    }
    pair(b"Hash=", &hex(&peer.sha256), out);
    if policy.subject {
        pair(b"Subject=\"", peer.subject.as_bytes(), out);
        out.push(b'"');
    }
    if policy.uri {
        if peer.uri_sans.is_empty() {
            pair(b"URI=", b"", out);
        }
        for uri in &peer.uri_sans {
            pair(b"URI=", uri.as_bytes(), out);
        }
    }
    if policy.dns {
        for name in &peer.dns_sans {
            pair(b"DNS=", name.as_bytes(), out);
        }
    }
}

fn hex(digest: &[u8; 32]) -> [u8; 64] {
    let mut text = [0; 64];
    for (place, octet) in digest.iter().enumerate() {
        text[place * 2] = b"0123456789abcdef"[usize::from(octet >> 4)];
        text[place * 2 + 1] = b"0123456789abcdef"[usize::from(octet & 15)];
    }
    text
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::tls::LocalIdentity;

    fn written(forwarding: Forwarding, peer: bool, own: &str) -> String {
        let mut head = format!("GET / HTTP/1.1\r\nhost: a\r\n{own}\r\n").into_bytes();
        let mut request = RequestHead::default();
        request.parse(&mut head).unwrap();
        let connection = Connection {
            tls: peer,
            peer: peer.then(|| {
                Arc::new(PeerIdentity {
                    uri_sans: vec!["spiffe://td/ns/a/sa/client".to_owned()],
                    sha256: [0xab; 32],
                    ..PeerIdentity::default()
                })
            }),
            local: peer.then(|| {
                Arc::new(LocalIdentity {
                    uri_sans: vec!["spiffe://td/ns/a/sa/server".to_owned()],
                    ..LocalIdentity::default()
                })
            }),
            ..Connection::default()
        };
        let policy = ClientCert {
            forwarding,
            subject: true,
            uri: true,
            dns: true,
        };
        let mut out = Vec::new();
        write(policy, &connection, &request, &head, &mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn elements_are_written_as_envoy_does() {
        let own = "x-forwarded-client-cert: By=x\r\nX-Forwarded-Client-Cert: By=y\r\n";
        let hash = "ab".repeat(32);
        let element =
            format!("By=spiffe://td/ns/a/sa/server;Hash={hash};Subject=\"\";URI=spiffe://td/ns/a/sa/client");
        let line = |value: &str| format!("x-forwarded-client-cert: {value}\r\n");
        for (forwarding, peer, wanted) in [
            (Forwarding::Sanitize, true, String::new()),
            (Forwarding::Sanitize, false, String::new()),
            (Forwarding::Forward, true, line("By=x,By=y")),
            (Forwarding::Forward, false, String::new()),
            (Forwarding::Append, true, line(&format!("By=x,By=y,{element}"))),
            (Forwarding::Append, false, String::new()),
            (Forwarding::Set, true, line(&element)),
            (Forwarding::Set, false, String::new()),
            (Forwarding::Always, false, line("By=x,By=y")),
        ] {
            assert_eq!(written(forwarding, peer, own), wanted, "{forwarding:?} {peer}");
        }
        assert_eq!(written(Forwarding::Append, true, ""), line(&element));
        assert_eq!(written(Forwarding::Always, false, ""), "");
    }
}
