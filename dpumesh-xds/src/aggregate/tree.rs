//! The choice of a filter chain as a tree, made of listeners and their chains' criteria.
//!
//! Envoy's own rules are written out level by level: destination port, destination prefix, server name, transport protocol,
//! application protocol; at each level the most specific value that some chain names decides, without ever coming back. Each node knows what
//! to do with every connection, so that no evaluator has to fall through from one level to another.
//!
//! What a listener does not look into is settled here: in a shared listener another pod may have asked for it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use crate::ir::{Detection, Listener, Role};

/// What happens to a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tree {
    /// It goes to the chain of this name.
    Chain(String),
    /// It is closed.
    Deny,
    /// By original destination port.
    Ports {
        /// Per port.
        ports: BTreeMap<u16, Self>,
        /// For every other.
        other: Box<Self>,
    },
    /// By original destination address, the longest prefix.
    Destinations {
        /// Prefixes with the same choice.
        groups: Vec<(Vec<IpNet>, Self)>,
        /// For every other.
        other: Box<Self>,
    },
    /// By source address.
    Sources {
        /// Addresses with the same choice.
        groups: Vec<(Vec<IpAddr>, Self)>,
        /// For every other.
        other: Box<Self>,
    },
    /// By the server name of a ClientHello.
    ServerNames {
        /// This very name.
        exact: BTreeMap<String, Self>,
        /// Names that end in `.b`, the longest first.
        below: Vec<(String, Self)>,
        /// Every other, and none.
        other: Box<Self>,
    },
    /// By transport protocol.
    Transport {
        /// TLS.
        tls: Box<Self>,
        /// Anything else.
        plain: Box<Self>,
    },
    /// By the first application protocol of the connection that is in one of the groups.
    Protocols {
        /// Disjoint groups.
        groups: Vec<(BTreeSet<String>, Self)>,
        /// None of them.
        other: Box<Self>,
    },
}

/// A tree cannot be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TreeError {
    /// Two chains ask for the same connections.
    #[error("listener {listener:?}: chains {first:?} and {second:?} match the same connections")]
    Duplicate {
        /// The listener.
        listener: String,
        /// One chain.
        first: String,
        /// The other.
        second: String,
    },
    /// Two listeners claim one address.
    #[error("listeners {first:?} and {second:?} have the same address {address}")]
    SameAddress {
        /// One listener.
        first: String,
        /// The other.
        second: String,
        /// The address.
        address: std::net::SocketAddr,
    },
    /// Too many ports are treated differently.
    #[error("listener {0:?}: protocol detection differs on more than {MAX_EXCEPTIONS} ports")]
    TooManyPorts(String),
    /// A listener of this role is missing or there are several.
    #[error("there must be one listener of role {0:?}, not {1}")]
    Count(Role, usize),
}

/// Ports whose protocol detection differs from that of most ports.
const MAX_EXCEPTIONS: usize = 1024;

/// Names the chain with this index in its listener; `None` is the default chain.
pub(super) type Leaf<'a> = &'a dyn Fn(&Listener, Option<usize>) -> Tree;

/// The tree of everything that leaves a pod.
pub(super) fn outbound(listeners: &[&Listener], leaf: Leaf<'_>) -> Result<Tree, TreeError> {
    let catch_all = single(listeners, Role::CatchAll)?;
    let mut by_port: BTreeMap<u16, BTreeMap<IpNet, &Listener>> = BTreeMap::new();
    for listener in listeners.iter().filter(|l| l.role == Role::Outbound) {
        for address in &listener.addresses {
            let length = match (address.ip().is_unspecified(), address.is_ipv4()) {
                (true, _) => 0,
                (false, true) => 32,
                (false, false) => 128,
            };
            let net = IpNet::new_assert(address.ip(), length);
            if let Some(first) = by_port.entry(address.port()).or_default().insert(net, listener) {
                return Err(TreeError::SameAddress {
                    first: first.name.clone(),
                    second: listener.name.clone(),
                    address: *address,
                });
            }
        }
    }
    let rest = every_port(catch_all, leaf)?;
    let (mut ports, other) = match rest {
        Tree::Ports { ports, other } => (ports, other),
        other => (BTreeMap::new(), Box::new(other)),
    };
    for (port, by_address) in by_port {
        let otherwise = at_port(catch_all, port, leaf)?;
        let mut groups = Vec::new();
        for (net, listener) in by_address {
            groups.push((vec![net], at_port(listener, port, leaf)?));
        }
        ports.insert(port, destinations(groups, otherwise));
    }
    Ok(Tree::Ports { ports, other }.simplified())
}

/// The tree of everything that comes to a pod.
pub(super) fn inbound(listeners: &[&Listener], leaf: Leaf<'_>) -> Result<Tree, TreeError> {
    every_port(single(listeners, Role::Inbound)?, leaf)
}

fn single<'a>(listeners: &[&'a Listener], role: Role) -> Result<&'a Listener, TreeError> {
    let mut of_role = listeners.iter().filter(|l| l.role == role);
    match (of_role.next(), of_role.count()) {
        (Some(only), 0) => Ok(only),
        (first, more) => Err(TreeError::Count(role, more + usize::from(first.is_some()))),
    }
}

/// What one port's connections show before a chain is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Seen {
    tls: bool,
    http: bool,
}

fn seen(detection: &Detection, port: u16) -> Seen {
    Seen {
        tls: detection.tls.contains(port),
        http: detection.http.contains(port),
    }
}

/// What most ports show.
fn usual(detection: &Detection) -> Seen {
    let most = |ports: &crate::ir::PortSet| {
        ports.ranges().iter().map(|(start, end)| end - start).sum::<u32>() > 32_768
    };
    Seen {
        tls: most(&detection.tls),
        http: most(&detection.http),
    }
}

/// One chain under one combination of its criteria.
#[derive(Debug, Clone)]
struct Entry {
    chain: usize,
    port: Option<u16>,
    prefix: Option<IpNet>,
    server_name: Option<String>,
    transport: Option<String>,
    protocol: Option<String>,
}

fn entries(listener: &Listener) -> Vec<Entry> {
    fn each<T: Clone>(values: &[T]) -> Vec<Option<T>> {
        if values.is_empty() {
            vec![None]
        } else {
            values.iter().cloned().map(Some).collect()
        }
    }
    let mut entries = Vec::new();
    for (chain, filter_chain) in listener.chains.iter().enumerate() {
        let matches = &filter_chain.matches;
        for prefix in each(&matches.prefixes) {
            for server_name in each(&matches.server_names) {
                for protocol in each(&matches.alpn) {
                    entries.push(Entry {
                        chain,
                        port: matches.destination_port,
                        prefix,
                        server_name: server_name.clone(),
                        transport: matches.transport.clone(),
                        protocol,
                    });
                }
            }
        }
    }
    entries
}

/// Compiles the levels below the port.
struct Below<'a> {
    listener: &'a Listener,
    leaf: Leaf<'a>,
    seen: Seen,
}

fn at_port(listener: &Listener, port: u16, leaf: Leaf<'_>) -> Result<Tree, TreeError> {
    let all = entries(listener);
    let own: Vec<&Entry> = all.iter().filter(|e| e.port == Some(port)).collect();
    let chosen = if own.is_empty() {
        all.iter().filter(|e| e.port.is_none()).collect()
    } else {
        own
    };
    let below = Below {
        listener,
        leaf,
        seen: seen(&listener.detection, port),
    };
    below.by_prefix(&chosen)
}

fn every_port(listener: &Listener, leaf: Leaf<'_>) -> Result<Tree, TreeError> {
    let usual = usual(&listener.detection);
    let mut ports: BTreeSet<u16> = listener
        .chains
        .iter()
        .filter_map(|c| c.matches.destination_port)
        .collect();
    let unusual = (0..=u16::MAX).filter(|port| seen(&listener.detection, *port) != usual);
    ports.extend(unusual.take(MAX_EXCEPTIONS + 1));
    if ports.len() > MAX_EXCEPTIONS + listener.chains.len() {
        return Err(TreeError::TooManyPorts(listener.name.clone()));
    }
    let mut by_port = BTreeMap::new();
    for port in ports {
        by_port.insert(port, at_port(listener, port, leaf)?);
    }
    let all = entries(listener);
    let any_port: Vec<&Entry> = all.iter().filter(|e| e.port.is_none()).collect();
    let below = Below {
        listener,
        leaf,
        seen: usual,
    };
    let tree = Tree::Ports {
        ports: by_port,
        other: Box::new(below.by_prefix(&any_port)?),
    };
    Ok(tree.simplified())
}

impl Below<'_> {
    fn by_prefix(&self, entries: &[&Entry]) -> Result<Tree, TreeError> {
        let prefixes: BTreeSet<IpNet> = entries.iter().filter_map(|e| e.prefix).collect();
        let other = self.by_server_name(&only(entries, |e| e.prefix.is_none()))?;
        let mut groups = Vec::new();
        for prefix in prefixes {
            groups.push((
                vec![prefix],
                self.by_server_name(&only(entries, |e| e.prefix == Some(prefix)))?,
            ));
        }
        Ok(destinations(groups, other))
    }

    fn by_server_name(&self, entries: &[&Entry]) -> Result<Tree, TreeError> {
        let other = self.by_transport(&only(entries, |e| e.server_name.is_none()))?;
        if !self.seen.tls {
            return Ok(other);
        }
        let names: BTreeSet<&String> = entries.iter().filter_map(|e| e.server_name.as_ref()).collect();
        let (mut exact, mut below) = (BTreeMap::new(), Vec::new());
        for name in names {
            let tree = self.by_transport(&only(entries, |e| e.server_name.as_ref() == Some(name)))?;
            match name.strip_prefix('*') {
                Some(suffix) => below.push((suffix.to_owned(), tree)),
                None => drop(exact.insert(name.clone(), tree)),
            }
        }
        below.sort_by(|a, b| b.0.len().cmp(&a.0.len()).then_with(|| a.0.cmp(&b.0)));
        let other = Box::new(other);
        Ok(Tree::ServerNames { exact, below, other }.simplified())
    }

    fn by_transport(&self, entries: &[&Entry]) -> Result<Tree, TreeError> {
        let of = |transport: &str| {
            let own = only(entries, |e| e.transport.as_deref() == Some(transport));
            if own.is_empty() {
                only(entries, |e| e.transport.is_none())
            } else {
                own
            }
        };
        let plain = of("raw_buffer");
        // Unseen TLS is a raw buffer, and has no protocol that could be seen.
        let tls = if self.seen.tls {
            self.by_protocol(&of("tls"), true)?
        } else {
            self.by_protocol(&plain, false)?
        };
        let tree = Tree::Transport {
            tls: Box::new(tls),
            plain: Box::new(self.by_protocol(&plain, self.seen.http)?),
        };
        Ok(tree.simplified())
    }

    fn by_protocol(&self, entries: &[&Entry], seen: bool) -> Result<Tree, TreeError> {
        let other = self.chain(&only(entries, |e| e.protocol.is_none()))?;
        if !seen {
            return Ok(other);
        }
        let protocols: BTreeSet<&String> = entries.iter().filter_map(|e| e.protocol.as_ref()).collect();
        let mut groups: Vec<(BTreeSet<String>, Tree)> = Vec::new();
        for protocol in protocols {
            let tree = self.chain(&only(entries, |e| e.protocol.as_ref() == Some(protocol)))?;
            match groups.iter_mut().find(|(_, known)| *known == tree) {
                Some((group, _)) => drop(group.insert(protocol.clone())),
                None => groups.push(([protocol.clone()].into(), tree)),
            }
        }
        let other = Box::new(other);
        Ok(Tree::Protocols { groups, other }.simplified())
    }

    fn chain(&self, entries: &[&Entry]) -> Result<Tree, TreeError> {
        match entries {
            [] => Ok((self.leaf)(self.listener, None)),
            [only] => Ok((self.leaf)(self.listener, Some(only.chain))),
            [first, second, ..] => Err(TreeError::Duplicate {
                listener: self.listener.name.clone(),
                first: self.listener.chains[first.chain].name.clone(),
                second: self.listener.chains[second.chain].name.clone(),
            }),
        }
    }
}

fn only<'a>(entries: &[&'a Entry], keep: impl Fn(&Entry) -> bool) -> Vec<&'a Entry> {
    entries.iter().copied().filter(|entry| keep(entry)).collect()
}

fn destinations(groups: Vec<(Vec<IpNet>, Tree)>, other: Tree) -> Tree {
    let other = Box::new(other);
    Tree::Destinations { groups, other }.simplified()
}

impl Tree {
    /// Leaves out a node all of whose branches are the same.
    fn simplified(self) -> Self {
        let other = match &self {
            Self::Ports { ports, other } if ports.values().all(|tree| *tree == **other) => other,
            Self::Destinations { groups, other } if groups.iter().all(|(_, tree)| *tree == **other) => other,
            Self::ServerNames { exact, below, other }
                if exact
                    .values()
                    .chain(below.iter().map(|(_, t)| t))
                    .all(|tree| *tree == **other) =>
            {
                other
            }
            Self::Transport { tls, plain } if tls == plain => plain,
            Self::Protocols { groups, other } if groups.iter().all(|(_, tree)| *tree == **other) => other,
            _ => return self,
        };
        (**other).clone()
    }
}
