//! What one sidecar does, by Envoy's documented rules: which listener, then which filter chain, by elimination.

use crate::ir::{FilterChain, Listener, PodView, Role};

use super::{Connection, FirstOctets};

/// `None`: the connection is closed. Also whether it offers protocols of several chains and first of all one of none.
pub(super) fn chain<'a>(view: &'a PodView, inbound: bool, c: &Connection) -> (Option<&'a FilterChain>, bool) {
    let Some(listener) = listener(view, inbound, c) else {
        return (None, false);
    };
    let tls_seen = listener.detection.tls.contains(c.port);
    let http_seen = listener.detection.http.contains(c.port);
    let (mut transport, mut name, mut protocols) = ("raw_buffer", None, Vec::new());
    match &c.first_octets {
        FirstOctets::Tls {
            server_name,
            protocols: offered,
        } if tls_seen => {
            transport = "tls";
            name = server_name.clone();
            protocols.clone_from(offered);
        }
        FirstOctets::Http(protocol) if http_seen => protocols = vec![(*protocol).to_owned()],
        _ => {}
    }
    let mut left: Vec<&FilterChain> = listener.chains.iter().collect();
    narrow(
        &mut left,
        |f| f.matches.destination_port == Some(c.port),
        |f| f.matches.destination_port.is_none(),
    );
    let longest = left
        .iter()
        .flat_map(|f| &f.matches.prefixes)
        .filter(|p| p.contains(&c.destination))
        .max_by_key(|p| p.prefix_len())
        .copied();
    narrow(
        &mut left,
        |f| longest.is_some_and(|longest| f.matches.prefixes.contains(&longest)),
        |f| f.matches.prefixes.is_empty(),
    );
    let best = best_name(&left, name.as_deref());
    narrow(
        &mut left,
        |f| {
            best.as_ref()
                .is_some_and(|best| f.matches.server_names.contains(best))
        },
        |f| f.matches.server_names.is_empty(),
    );
    narrow(
        &mut left,
        |f| f.matches.transport.as_deref() == Some(transport),
        |f| f.matches.transport.is_none(),
    );
    let known = |p: &&String| left.iter().any(|f| f.matches.alpn.contains(p));
    let first = protocols.iter().find(known).cloned();
    let undecided = first.as_ref() != protocols.first() && protocols.iter().filter(known).count() > 1;
    narrow(
        &mut left,
        |f| first.as_ref().is_some_and(|first| f.matches.alpn.contains(first)),
        |f| f.matches.alpn.is_empty(),
    );
    assert!(
        left.len() < 2,
        "Envoy refuses a listener with two chains for the same connections"
    );
    (
        left.first().copied().or(listener.default_chain.as_ref()),
        undecided,
    )
}

fn narrow(
    left: &mut Vec<&FilterChain>,
    exactly: impl Fn(&FilterChain) -> bool,
    indifferent: impl Fn(&FilterChain) -> bool,
) {
    if left.iter().any(|f| exactly(f)) {
        left.retain(|f| exactly(f));
    } else {
        left.retain(|f| indifferent(f));
    }
}

fn best_name(left: &[&FilterChain], name: Option<&str>) -> Option<String> {
    let name = name?;
    let all: Vec<&String> = left.iter().flat_map(|f| &f.matches.server_names).collect();
    if let Some(exact) = all.iter().find(|n| n.as_str() == name) {
        return Some((*exact).clone());
    }
    let wild = |n: &&&String| n.strip_prefix('*').is_some_and(|suffix| name.ends_with(suffix));
    all.iter()
        .filter(wild)
        .max_by_key(|n| n.len())
        .map(|n| (*n).clone())
}

fn listener<'a>(view: &'a PodView, inbound: bool, c: &Connection) -> Option<&'a Listener> {
    let all = || view.listeners.values().map(|l| &**l);
    if inbound {
        return all().find(|l| l.role == Role::Inbound);
    }
    let outbound = |take: &dyn Fn(&std::net::SocketAddr) -> bool| {
        all().find(|l| l.role == Role::Outbound && l.addresses.iter().any(|a| a.port() == c.port && take(a)))
    };
    outbound(&|a| a.ip() == c.destination)
        .or_else(|| outbound(&|a| a.ip().is_unspecified() && a.is_ipv4() == c.destination.is_ipv4()))
        .or_else(|| all().find(|l| l.role == Role::CatchAll))
}
