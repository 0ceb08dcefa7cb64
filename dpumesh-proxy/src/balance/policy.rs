//! What a request's hash is made of: `hash_policy` of routes and of TCP proxies.

use std::io::Write as _;
use std::net::{IpAddr, SocketAddr};

use regex::bytes::Regex;

use super::hash::{hash, hash_all};
use crate::route::RequestView;

/// One `HashPolicy`.
#[derive(Debug)]
pub struct HashPolicy {
    /// What is hashed.
    pub by: By,
    /// With a hash, those behind it are not asked.
    pub terminal: bool,
}

/// What is hashed.
#[derive(Debug)]
pub enum By {
    /// The values of a header (lower case), whatever their order; each may be rewritten first.
    Header(Vec<u8>, Option<(Regex, Vec<u8>)>),
    /// A cookie.
    Cookie(Cookie),
    /// The client's address.
    SourceIp,
    /// A query parameter's first value.
    Query(Vec<u8>),
}

/// A cookie that keeps a client with an endpoint.
#[derive(Debug)]
pub struct Cookie {
    /// Its name.
    pub name: Vec<u8>,
    /// Clients without it are given one that lives so many seconds (0 is their session).
    pub ttl: Option<u64>,
    /// What follows the value when it is given: `; Path=/; HttpOnly` and the like.
    pub attributes: String,
}

/// Who sends the request.
#[derive(Debug, Clone, Copy)]
pub struct Sender {
    /// Whom it says it comes from.
    pub ip: IpAddr,
    /// Its end of the connection.
    pub remote: SocketAddr,
    /// Ours.
    pub local: SocketAddr,
}

/// The hash of a request, if any policy finds something to hash; a `Set-Cookie` value for each cookie that is given goes to `give`.
pub fn of_request(
    policies: &[HashPolicy],
    request: &impl RequestView,
    sender: &Sender,
    mut give: impl FnMut(Vec<u8>),
) -> Option<u64> {
    let mut mixed: Option<u64> = None;
    for policy in policies {
        let found = match &policy.by {
            By::Header(name, rewrite) => of_header(request, name, rewrite.as_ref()),
            By::Cookie(cookie) => of_cookie(request, cookie, sender, &mut give),
            By::SourceIp => Some(of_ip(sender.ip)),
            By::Query(name) => query(request.path(), name).map(hash),
        };
        if let Some(found) = found {
            mixed = Some(mixed.map_or(0, |m| m.rotate_left(1)) ^ found);
        }
        if policy.terminal && mixed.is_some() {
            break;
        }
    }
    mixed
}

/// The hash of an address.
pub fn of_ip(ip: IpAddr) -> u64 {
    let mut text = [0u8; 64];
    let room = text.len();
    let mut left = &mut text[..];
    // No address is as long as this.
    let _ = write!(left, "{ip}");
    let length = room - left.len();
    hash(&text[..length])
}

fn of_header(request: &impl RequestView, name: &[u8], rewrite: Option<&(Regex, Vec<u8>)>) -> Option<u64> {
    let pseudo = match name {
        b":path" => Some(request.path()),
        b":method" => Some(request.method()),
        b":authority" | b"host" => Some(request.host()),
        b":scheme" => Some(request.scheme()),
        _ => None,
    };
    let (mut first, mut more) = (pseudo, Vec::new());
    request.each_header(name, &mut |value| match first {
        None => first = Some(value),
        Some(_) => more.push(value),
    });
    let first = first?;
    if more.is_empty() && rewrite.is_none() {
        return Some(hash(first));
    }
    more.push(first);
    let rewritten = |value: &[u8]| match rewrite {
        Some((pattern, with)) => pattern.replace_all(value, with.as_slice()).into_owned(),
        None => value.to_vec(),
    };
    let mut values: Vec<Vec<u8>> = more.into_iter().map(rewritten).collect();
    values.sort();
    Some(hash_all(values.iter().map(Vec::as_slice)))
}

fn of_cookie(
    request: &impl RequestView,
    cookie: &Cookie,
    sender: &Sender,
    give: &mut impl FnMut(Vec<u8>),
) -> Option<u64> {
    let mut found = None;
    request.each_header(b"cookie", &mut |header| {
        found = found.or_else(|| cookie_value(header, &cookie.name));
    });
    if let Some(value) = found.filter(|v| !v.is_empty()) {
        return Some(hash(value));
    }
    let ttl = cookie.ttl?;
    // The same for all requests of a connection, should they race.
    let value = format!(
        "{:016x}",
        hash(format!("{}{}", sender.remote, sender.local).as_bytes())
    );
    let mut header = cookie.name.clone();
    header.extend_from_slice(format!("=\"{value}\"").as_bytes());
    if ttl > 0 {
        header.extend_from_slice(format!("; Max-Age={ttl}").as_bytes());
    }
    header.extend_from_slice(cookie.attributes.as_bytes());
    give(header);
    Some(hash(value.as_bytes()))
}

/// The value of a cookie in a `cookie` header, without the quotes around it.
fn cookie_value<'a>(header: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let pair = |part: &'a [u8]| {
        let at = memchr::memchr(b'=', part)?;
        (part[..at].trim_ascii() == name).then(|| part[at + 1..].trim_ascii())
    };
    let value = header.split(|b| *b == b';').find_map(pair)?;
    let unquoted = value.strip_prefix(b"\"").and_then(|v| v.strip_suffix(b"\""));
    Some(unquoted.unwrap_or(value))
}

/// The first value of a query parameter, as it stands.
fn query<'a>(path: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let at = memchr::memchr(b'?', path)?;
    let query = path[at + 1..].split(|b| *b == b'#').next()?;
    query.split(|b| *b == b'&').find_map(|pair| {
        let at = memchr::memchr(b'=', pair).unwrap_or(pair.len());
        (pair[..at] == *name).then(|| pair.get(at + 1..).unwrap_or_default())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Request(&'static str, Vec<(&'static str, &'static str)>);

    impl RequestView for Request {
        fn host(&self) -> &[u8] {
            b"host"
        }

        fn path(&self) -> &[u8] {
            self.0.as_bytes()
        }

        fn method(&self) -> &[u8] {
            b"GET"
        }

        fn each_header<'a>(&'a self, name: &[u8], see: &mut dyn FnMut(&'a [u8])) {
            let named = self.1.iter().filter(|(n, _)| n.as_bytes() == name);
            named.for_each(|(_, value)| see(value.as_bytes()));
        }
    }

    fn sender() -> Sender {
        Sender {
            ip: [10, 0, 0, 7].into(),
            remote: ([10, 0, 0, 7], 40_000).into(),
            local: ([10, 0, 0, 1], 80).into(),
        }
    }

    fn of(by: Vec<(By, bool)>, request: &Request) -> (Option<u64>, Vec<String>) {
        let policy = |(by, terminal)| HashPolicy { by, terminal };
        let policies: Vec<_> = by.into_iter().map(policy).collect();
        let mut given = Vec::new();
        let hash = of_request(&policies, request, &sender(), |cookie| {
            given.push(String::from_utf8(cookie).unwrap());
        });
        (hash, given)
    }

    fn header(name: &str) -> By {
        By::Header(name.as_bytes().to_vec(), None)
    }

    #[test]
    fn headers_are_mixed_in_order_and_their_values_are_not() {
        let request = Request("/", vec![("a", "1"), ("b", "2"), ("c", "2"), ("c", "1")]);
        assert_eq!(of(vec![(header("a"), false)], &request).0, Some(hash(b"1")));
        let two = hash_all([b"1".as_slice(), b"2"]);
        assert_eq!(of(vec![(header("c"), false)], &request).0, Some(two));
        assert_eq!(of(vec![(header(":path"), false)], &request).0, Some(hash(b"/")));
        assert_eq!(of(vec![(header("x"), false)], &request).0, None);
        let both = of(vec![(header("a"), false), (header("b"), false)], &request).0;
        assert_eq!(both, Some(hash(b"1").rotate_left(1) ^ hash(b"2")));
        let first = of(vec![(header("a"), true), (header("b"), false)], &request).0;
        assert_eq!(first, Some(hash(b"1")));
        let second = of(vec![(header("x"), true), (header("b"), false)], &request).0;
        assert_eq!(second, Some(hash(b"2")));
    }

    #[test]
    fn parameters_and_addresses() {
        let query = |name: &str| vec![(By::Query(name.as_bytes().to_vec()), false)];
        let request = Request("/p?a=1&b=&a=2&c", vec![]);
        assert_eq!(of(query("a"), &request).0, Some(hash(b"1")));
        assert_eq!(of(query("b"), &request).0, Some(hash(b"")));
        assert_eq!(of(query("c"), &request).0, Some(hash(b"")));
        assert_eq!(of(query("d"), &request).0, None);
        assert_eq!(of(query("a"), &Request("/p", vec![])).0, None);
        assert_eq!(
            of(vec![(By::SourceIp, false)], &request).0,
            Some(hash(b"10.0.0.7"))
        );
    }

    #[test]
    fn a_cookie_is_read_or_given() {
        let cookie = |ttl| {
            let cookie = Cookie {
                name: b"who".to_vec(),
                ttl,
                attributes: "; Path=/; HttpOnly".to_owned(),
            };
            vec![(By::Cookie(cookie), false)]
        };
        let with = Request("/", vec![("cookie", "x=1; who=\"me\"; y=2")]);
        assert_eq!(of(cookie(Some(9)), &with), (Some(hash(b"me")), vec![]));
        let without = Request("/", vec![("cookie", "whose=1")]);
        assert_eq!(of(cookie(None), &without), (None, vec![]));
        let (found, given) = of(cookie(Some(9)), &without);
        let value = format!("{:016x}", hash(b"10.0.0.7:4000010.0.0.1:80"));
        assert_eq!(found, Some(hash(value.as_bytes())));
        assert_eq!(given, [format!("who=\"{value}\"; Max-Age=9; Path=/; HttpOnly")]);
        let (_, given) = of(cookie(Some(0)), &without);
        assert!(!given[0].contains("Max-Age"));
    }
}
