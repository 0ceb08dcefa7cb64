//! `filter_chain_matcher`: the matcher tree of the xDS API, compiled once and asked once per connection, without allocating.
//!
//! An input without a value (no SNI, no application protocol) matches nothing. Where what a match leads to finds no chain itself, the
//! search goes on behind it: the next entry of a list, the next shorter prefix, at last `on_no_match`.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use super::inspect::{Seen, Transport};
use crate::tls::san::Text;

/// What a chain is chosen by.
#[derive(Debug, Clone, Copy)]
pub struct Facts<'a> {
    /// The client, or whom a PROXY header names.
    pub source: SocketAddr,
    /// The socket's other end.
    pub direct: SocketAddr,
    /// The address it meant.
    pub destination: SocketAddr,
    /// What its first octets say.
    pub seen: &'a Seen,
}

/// What is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Input {
    /// `DestinationPortInput`.
    DestinationPort,
    /// `SourcePortInput`.
    SourcePort,
    /// `DestinationIPInput`.
    DestinationIp,
    /// `SourceIPInput`.
    SourceIp,
    /// `DirectSourceIPInput`.
    DirectSourceIp,
    /// `ServerNameInput`.
    ServerName,
    /// `TransportProtocolInput`.
    TransportProtocol,
    /// `ApplicationProtocolInput`: each in quotes, with commas between.
    ApplicationProtocol,
}

/// A value as text, without allocating.
struct Line {
    text: [u8; 64],
    length: usize,
}

impl std::fmt::Write for Line {
    fn write_str(&mut self, part: &str) -> std::fmt::Result {
        let end = self.length + part.len();
        let room = self.text.get_mut(self.length..end).ok_or(std::fmt::Error)?;
        room.copy_from_slice(part.as_bytes());
        self.length = end;
        Ok(())
    }
}

impl Input {
    /// Calls `with` with the value, where there is one.
    fn text<T>(self, facts: &Facts<'_>, with: impl FnOnce(&str) -> Option<T>) -> Option<T> {
        let mut line = Line {
            text: [0; 64],
            length: 0,
        };
        // An address takes at most 45 octets.
        let written = match self {
            Self::ServerName | Self::ApplicationProtocol => {
                let text = if self == Self::ServerName {
                    &facts.seen.server_name
                } else {
                    &facts.seen.protocols
                };
                return if text.is_empty() { None } else { with(text) };
            }
            Self::TransportProtocol => {
                return with(match facts.seen.transport {
                    Transport::Raw => "raw_buffer",
                    Transport::Tls => "tls",
                });
            }
            Self::DestinationPort => write!(line, "{}", facts.destination.port()),
            Self::SourcePort => write!(line, "{}", facts.source.port()),
            Self::DestinationIp => write!(line, "{}", facts.destination.ip()),
            Self::SourceIp => write!(line, "{}", facts.source.ip()),
            Self::DirectSourceIp => write!(line, "{}", facts.direct.ip()),
        };
        written.ok()?;
        with(std::str::from_utf8(&line.text[..line.length]).ok()?)
    }

    fn address(self, facts: &Facts<'_>) -> Option<IpAddr> {
        match self {
            Self::DestinationIp => Some(facts.destination.ip()),
            Self::SourceIp => Some(facts.source.ip()),
            Self::DirectSourceIp => Some(facts.direct.ip()),
            _ => None,
        }
    }
}

/// A compiled tree. `T` is what it leads to: the index of a chain.
#[derive(Debug)]
pub struct Matcher<T> {
    /// How it looks.
    pub kind: Kind<T>,
    /// Where nothing matches.
    pub otherwise: Option<OnMatch<T>>,
}

/// The ways to look.
#[derive(Debug)]
pub enum Kind<T> {
    /// Only `on_no_match`.
    Nothing,
    /// `matcher_list`: the first predicate that holds.
    List(Vec<(Predicate, OnMatch<T>)>),
    /// `exact_match_map`.
    Exact(Input, HashMap<Box<str>, OnMatch<T>>),
    /// `prefix_match_map`: the longest key that begins the value; keys of one length together, the longest first.
    Prefix(Input, Vec<(Box<str>, OnMatch<T>)>),
    /// `exact_match_map` of ports, by number.
    Port(Input, HashMap<u16, OnMatch<T>>),
    /// `ip_range_matcher`: the longest prefix. One table for each prefix length, the longest first, into the leaves.
    Ranges(Input, Vec<(u8, HashMap<IpNet, usize>)>, Vec<OnMatch<T>>),
}

/// What a match leads to.
#[derive(Debug)]
pub enum OnMatch<T> {
    /// The end.
    Action(T),
    /// More to look at.
    Matcher(Box<Matcher<T>>),
}

/// A condition.
#[derive(Debug)]
pub enum Predicate {
    /// The input's value is as it must be.
    Single(Input, Text),
    /// One holds.
    Or(Vec<Self>),
    /// All hold.
    And(Vec<Self>),
    /// It does not hold.
    Not(Box<Self>),
}

impl Predicate {
    fn holds(&self, facts: &Facts<'_>) -> bool {
        match self {
            Self::Single(input, text) => input
                .text(facts, |value| text.matches(value).then_some(()))
                .is_some(),
            Self::Or(any) => any.iter().any(|p| p.holds(facts)),
            Self::And(all) => all.iter().all(|p| p.holds(facts)),
            Self::Not(not) => !not.holds(facts),
        }
    }
}

impl<T> OnMatch<T> {
    fn find(&self, facts: &Facts<'_>) -> Option<&T> {
        match self {
            Self::Action(found) => Some(found),
            Self::Matcher(matcher) => matcher.find(facts),
        }
    }
}

impl<T> Matcher<T> {
    /// Where a connection leads to.
    pub fn find(&self, facts: &Facts<'_>) -> Option<&T> {
        let found = match &self.kind {
            Kind::Nothing => None,
            Kind::List(list) => list
                .iter()
                .filter(|(predicate, _)| predicate.holds(facts))
                .find_map(|(_, next)| next.find(facts)),
            Kind::Exact(input, map) => input
                .text(facts, |value| map.get(value))
                .and_then(|next| next.find(facts)),
            Kind::Prefix(input, keys) => input.text(facts, |value| {
                keys.iter()
                    .filter(|(key, _)| value.starts_with(&**key))
                    .find_map(|(_, next)| next.find(facts))
            }),
            Kind::Port(input, map) => {
                let port = if *input == Input::SourcePort {
                    facts.source.port()
                } else {
                    facts.destination.port()
                };
                map.get(&port).and_then(|next| next.find(facts))
            }
            Kind::Ranges(input, lengths, leaves) => input.address(facts).and_then(|ip| {
                lengths.iter().find_map(|(length, table)| {
                    let net = IpNet::new(ip, *length).ok()?.trunc();
                    leaves[*table.get(&net)?].find(facts)
                })
            }),
        };
        found.or_else(|| self.otherwise.as_ref()?.find(facts))
    }

    /// [`Kind::Ranges`] of prefixes and what they lead to; of equal prefixes the first counts.
    pub fn ranges(input: Input, groups: Vec<(Vec<IpNet>, OnMatch<T>)>) -> Kind<T> {
        let mut tables: std::collections::BTreeMap<u8, HashMap<IpNet, usize>> = Default::default();
        let mut leaves = Vec::with_capacity(groups.len());
        for (nets, leaf) in groups {
            for net in nets {
                let table = tables.entry(net.prefix_len()).or_default();
                table.entry(net.trunc()).or_insert(leaves.len());
            }
            leaves.push(leaf);
        }
        Kind::Ranges(input, tables.into_iter().rev().collect(), leaves)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::san::Pattern;

    fn text(pattern: Pattern) -> Text {
        Text {
            pattern,
            ignore_case: false,
        }
    }

    fn seen(transport: Transport, server_name: &str, protocols: &str) -> Seen {
        Seen {
            transport,
            server_name: server_name.to_owned(),
            protocols: protocols.to_owned(),
        }
    }

    fn find(tree: &Matcher<u8>, source: &str, destination: &str, seen: &Seen) -> Option<u8> {
        let facts = Facts {
            source: source.parse().unwrap(),
            direct: source.parse().unwrap(),
            destination: destination.parse().unwrap(),
            seen,
        };
        tree.find(&facts).copied()
    }

    fn leaf(kind: Kind<u8>, otherwise: u8) -> OnMatch<u8> {
        OnMatch::Matcher(Box::new(Matcher {
            kind,
            otherwise: Some(OnMatch::Action(otherwise)),
        }))
    }

    #[test]
    fn the_longest_prefix_leads_and_what_finds_nothing_falls_back() {
        let inner = Matcher {
            kind: Kind::Port(
                Input::DestinationPort,
                [(80, OnMatch::Action(1))].into_iter().collect(),
            ),
            otherwise: None,
        };
        let groups = vec![
            (
                vec!["10.0.0.1/32".parse().unwrap()],
                OnMatch::Matcher(Box::new(inner)),
            ),
            (
                vec!["10.0.0.0/8".parse().unwrap(), "fd00::/64".parse().unwrap()],
                OnMatch::Action(2),
            ),
        ];
        let tree = Matcher {
            kind: Matcher::ranges(Input::SourceIp, groups),
            otherwise: Some(OnMatch::Action(9)),
        };
        let at = |source: &str, destination: &str| find(&tree, source, destination, &Seen::default());
        assert_eq!(at("10.0.0.1:5", "1.1.1.1:80"), Some(1));
        assert_eq!(at("10.0.0.1:5", "1.1.1.1:81"), Some(2));
        assert_eq!(at("10.9.0.1:5", "1.1.1.1:80"), Some(2));
        assert_eq!(at("[fd00::7]:5", "[fd00::8]:80"), Some(2));
        assert_eq!(at("[fd01::7]:5", "[fd00::8]:80"), Some(9));
        assert_eq!(at("11.0.0.1:5", "1.1.1.1:80"), Some(9));
    }

    #[test]
    fn an_input_without_value_matches_nothing_not_even_its_negation_alone() {
        let contains =
            |p: &str| Predicate::Single(Input::ApplicationProtocol, text(Pattern::Contains(p.into())));
        let tree = Matcher {
            kind: Kind::List(vec![
                (
                    Predicate::And(vec![
                        contains("'istio'"),
                        Predicate::Not(Box::new(contains("'h2'"))),
                    ]),
                    OnMatch::Action(1),
                ),
                (
                    Predicate::Single(Input::ServerName, text(Pattern::Suffix(".b".into()))),
                    OnMatch::Action(2),
                ),
            ]),
            otherwise: Some(leaf(
                Kind::Exact(
                    Input::TransportProtocol,
                    [("tls".into(), OnMatch::Action(3))].into_iter().collect(),
                ),
                4,
            )),
        };
        let at = |seen: &Seen| find(&tree, "1.1.1.1:1", "2.2.2.2:2", seen);
        assert_eq!(at(&seen(Transport::Tls, "", "'istio'")), Some(1));
        assert_eq!(at(&seen(Transport::Tls, "a.b", "'istio','h2'")), Some(2));
        assert_eq!(at(&seen(Transport::Tls, "", "")), Some(3));
        assert_eq!(at(&Seen::default()), Some(4));
    }

    #[test]
    fn addresses_and_ports_can_be_read_as_text() {
        let tree = Matcher {
            kind: Kind::Prefix(
                Input::DestinationIp,
                vec![
                    ("fd00:".into(), OnMatch::Action(1)),
                    ("f".into(), OnMatch::Action(2)),
                ],
            ),
            otherwise: None,
        };
        let at = |destination: &str| find(&tree, "1.1.1.1:1", destination, &Seen::default());
        assert_eq!(at("[fd00::1]:1"), Some(1));
        assert_eq!(at("[fe00:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:1"), Some(2));
        assert_eq!(at("9.9.9.9:1"), None);
    }
}
