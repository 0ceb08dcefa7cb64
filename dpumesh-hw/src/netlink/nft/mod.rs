//! The interception table: nf_tables spoken over raw netlink, for exactly one chain.
//!
//! The table `dpumesh` (family inet, so one rule serves IPv4 and IPv6) has one base chain on prerouting at priority
//! −150, which looks only at packets from the stack interface, in this order:
//!
//! 1. the source MAC is an ingress port's → its number becomes the packet's mark (see [`crate::stream::IngressPort`]);
//! 2. TCP, and somebody listens transparently on the proxy's port or owns the connection → to that socket; where the proxy
//!    has a port of its own for what comes to pods ([`Inbound`]), what came in by the network goes to that one;
//! 3. other TCP → refused with a RST, so that a client without a proxy fails at once and never hangs;
//! 4. ICMP "fragmentation needed" and ICMPv6 "packet too big" → accepted: path MTU discovery (RFC 1191, RFC 8201)
//!    of the proxy's own connections needs them, and TCP checks them against its sequence numbers (RFC 5927);
//! 5. everything else → dropped.
//!
//! The tproxy expression takes only sockets marked transparent; TCP that finds none never reaches local delivery.
//! So no other listener of the namespace, not even one on a wildcard address, can be reached through the stack
//! interface. Each outcome is counted ([`InterceptionCounters`]).
//!
//! With [`Inbound`] the chain also looks at the loopback interface, at packets with the hairpin's mark and nothing else: what the
//! proxy sends a pod of this node for another pod of this node goes to the proxy's inbound port, or is refused.
//!
//! Rules are replaced in one netfilter transaction: no packet sees none, or half, of them.

mod encode;

use std::io;

use netlink_packet_core::{NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REQUEST, NlasIterator};
use netlink_sys::protocols::NETLINK_NETFILTER;

use super::channel::{Channel, Failure};
use super::link::check_name;
use super::{NetlinkError, attributes};
use crate::netns::Namespace;
use crate::stream::IngressPort;
use encode::{Attributes, Expressions, message};

/// Name of the table and of its chain.
const TABLE: &str = "dpumesh";
const CHAIN: &str = "intercept";
/// After connection tracking would have run (−200), where mangling is expected.
const PRIORITY: i32 = -150;
/// Octets of `struct nfgenmsg`.
const NFGENMSG: usize = 4;

/// What to intercept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interception {
    /// The stack interface, by which frames come from the dataplane.
    pub interface: String,
    /// The proxy's TCP port; its listeners are transparent sockets.
    pub port: u16,
    /// Where what comes to pods goes instead; `None`: to `port` as well.
    pub inbound: Option<Inbound>,
}

/// A port of the proxy's for what comes to pods, whoever sent it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inbound {
    /// The proxy's TCP port for it; its listeners are transparent sockets.
    pub port: u16,
    /// The ingress port by which the network's packets come.
    pub network: IngressPort,
    /// Mark of what the proxy sends for a pod and that another pod of this node shall get.
    pub hairpin: u32,
}

/// What the interception chain has done since it was last replaced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InterceptionCounters {
    /// TCP handed to a transparent socket.
    pub intercepted: Counter,
    /// TCP refused with a RST because no transparent socket would take it.
    pub refused: Counter,
    /// Path MTU messages let through.
    pub path_mtu: Counter,
    /// Everything else, dropped.
    pub dropped: Counter,
}

/// Packets and octets, IP headers included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counter {
    /// Packets.
    pub packets: u64,
    /// Octets.
    pub octets: u64,
}

impl Counter {
    fn add(&mut self, other: Self) {
        self.packets += other.packets;
        self.octets += other.octets;
    }
}

/// A socket to nf_tables in one namespace.
#[derive(Debug)]
pub struct NfTables {
    channel: Channel,
}

impl NfTables {
    /// Opens a socket in the calling thread's namespace.
    ///
    /// # Errors
    /// If the kernel has no nfnetlink.
    pub fn open() -> Result<Self, NetlinkError> {
        let channel = Channel::open(NETLINK_NETFILTER)
            .map_err(|failure| NetlinkError::new("open socket", "nfnetlink", failure))?;
        Ok(Self { channel })
    }

    /// Opens a socket inside `namespace`; the calling thread stays where it is.
    ///
    /// # Errors
    /// If the namespace cannot be entered or the kernel has no nfnetlink.
    pub fn open_in(namespace: &Namespace) -> Result<Self, NetlinkError> {
        namespace.run(Self::open).map_err(|error| {
            NetlinkError::new(
                "open socket in",
                namespace.id(),
                Failure::Io(io::Error::other(error)),
            )
        })?
    }

    /// Puts the interception table in place, instead of an earlier one of ours. All or nothing.
    ///
    /// # Errors
    /// If the kernel lacks nf_tables, tproxy or reject for this family: then nothing has changed.
    pub fn replace(&mut self, interception: &Interception) -> Result<(), NetlinkError> {
        let object = format!(
            "interception of {} to port {}",
            interception.interface, interception.port
        );
        check_name("install", &interception.interface)?;
        if interception.port == 0 {
            return Err(NetlinkError::missing("install", object, libc::EINVAL));
        }
        let mut messages = vec![new_table(), delete_table(), new_table(), new_chain()];
        messages.extend(rules(interception));
        self.transaction("install", &object, &messages)
    }

    /// Removes the interception table; not there: no error.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn delete(&mut self) -> Result<(), NetlinkError> {
        // Creating it first makes the deletion of what is not there succeed.
        self.transaction("delete", "interception table", &[new_table(), delete_table()])
    }

    /// The counters; `None` if there is no interception table.
    ///
    /// # Errors
    /// If the kernel refuses the question.
    pub fn counters(&mut self) -> Result<Option<InterceptionCounters>, NetlinkError> {
        let question = message(
            encode::GET_RULE,
            NLM_F_REQUEST | NLM_F_DUMP,
            &table_and_chain().into_bytes(),
        );
        let replies = match self.channel.request(question) {
            Ok(replies) => replies,
            Err(Failure::Kernel {
                errno: libc::ENOENT, ..
            }) => return Ok(None),
            Err(failure) => return Err(NetlinkError::new("list", "interception rules", failure)),
        };
        if replies.is_empty() {
            return Ok(None);
        }
        let mut counters = InterceptionCounters::default();
        for reply in &replies {
            let Some((outcome, counter)) = counted(reply) else {
                continue;
            };
            match outcome.as_str() {
                INTERCEPTED | FROM_NETWORK | HAIRPIN => counters.intercepted.add(counter),
                REFUSED | HAIRPIN_REFUSED => counters.refused.add(counter),
                PATH_MTU_V4 | PATH_MTU_V6 => counters.path_mtu.add(counter),
                DROPPED => counters.dropped = counter,
                _ => {}
            }
        }
        Ok(Some(counters))
    }

    fn transaction(
        &mut self,
        operation: &'static str,
        object: &str,
        messages: &[Vec<u8>],
    ) -> Result<(), NetlinkError> {
        let mut batch = message(encode::BATCH_BEGIN, NLM_F_REQUEST, &[]);
        messages.iter().for_each(|message| batch.extend(message));
        batch.extend(message(encode::BATCH_END, NLM_F_REQUEST, &[]));
        match self.channel.request(batch) {
            Ok(_) => Ok(()),
            Err(Failure::Kernel {
                errno: libc::ENOENT,
                message: None,
            }) => {
                let hint = "this kernel lacks an expression (tproxy, reject or byteorder)".to_owned();
                let failure = Failure::Kernel {
                    errno: libc::ENOENT,
                    message: Some(hint),
                };
                Err(NetlinkError::new(operation, object, failure))
            }
            Err(failure) => Err(NetlinkError::new(operation, object, failure)),
        }
    }
}

fn new_table() -> Vec<u8> {
    let mut table = Attributes::default();
    table.text(1, TABLE);
    message(
        encode::NEW_TABLE,
        NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE,
        &table.into_bytes(),
    )
}

fn delete_table() -> Vec<u8> {
    let mut table = Attributes::default();
    table.text(1, TABLE);
    message(
        encode::DELETE_TABLE,
        NLM_F_REQUEST | NLM_F_ACK,
        &table.into_bytes(),
    )
}

fn new_chain() -> Vec<u8> {
    const PREROUTING: u32 = 0;
    const ACCEPT: u32 = 1;
    let mut chain = Attributes::default();
    chain.text(1, TABLE);
    chain.text(3, CHAIN);
    chain.nest(4, |hook| {
        hook.word(1, PREROUTING);
        hook.word(2, PRIORITY.cast_unsigned());
    });
    // Packets by other interfaces are none of our business.
    chain.word(5, ACCEPT);
    chain.text(7, "filter");
    message(
        encode::NEW_CHAIN,
        NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE,
        &chain.into_bytes(),
    )
}

fn table_and_chain() -> Attributes {
    let mut rule = Attributes::default();
    rule.text(1, TABLE);
    rule.text(2, CHAIN);
    rule
}

const MARKED: &str = "ingress port to mark";
const INTERCEPTED: &str = "to the proxy";
const FROM_NETWORK: &str = "from the network to the proxy";
const HAIRPIN: &str = "from pod to pod to the proxy";
const HAIRPIN_REFUSED: &str = "from pod to pod, no proxy: refused";
const REFUSED: &str = "no proxy: refused";
const PATH_MTU_V4: &str = "fragmentation needed";
const PATH_MTU_V6: &str = "packet too big";
const DROPPED: &str = "everything else";

fn rules(interception: &Interception) -> Vec<Vec<u8>> {
    const TCP: u8 = libc::IPPROTO_TCP as u8;
    const ICMP: u8 = libc::IPPROTO_ICMP as u8;
    const ICMPV6: u8 = libc::IPPROTO_ICMPV6 as u8;
    const IPV4: u8 = 2;
    const IPV6: u8 = 10;
    let from_stack = || Expressions::from_interface(&interception.interface);
    let prefix = IngressPort::MAC_PREFIX;
    let marked = rule(
        MARKED,
        from_stack()
            .source_mac(0, prefix.len())
            .equals(&prefix)
            .source_mac(prefix.len(), 4)
            .in_host_order()
            .set_mark(),
    );
    let mut rules = vec![marked];
    if let Some(inbound) = &interception.inbound {
        rules.extend(inbound_rules(&from_stack, inbound));
    }
    rules.extend([
        rule(
            INTERCEPTED,
            from_stack()
                .transport_protocol(TCP)
                .tproxy(interception.port)
                .counter()
                .accept(),
        ),
        rule(
            REFUSED,
            from_stack().transport_protocol(TCP).counter().tcp_reset(),
        ),
        rule(
            PATH_MTU_V4,
            from_stack()
                .network_protocol(IPV4)
                .transport_protocol(ICMP)
                .transport(0, 2)
                .equals(&[3, 4])
                .counter()
                .accept(),
        ),
        rule(
            PATH_MTU_V6,
            from_stack()
                .network_protocol(IPV6)
                .transport_protocol(ICMPV6)
                .transport(0, 1)
                .equals(&[2])
                .counter()
                .accept(),
        ),
        rule(DROPPED, from_stack().counter().drop()),
    ]);
    rules
}

fn inbound_rules(from_stack: &impl Fn() -> Expressions, inbound: &Inbound) -> [Vec<u8>; 3] {
    const TCP: u8 = libc::IPPROTO_TCP as u8;
    let hairpin = || {
        let looped = Expressions::from_interface("lo").marked(inbound.hairpin);
        looped.transport_protocol(TCP)
    };
    let from_network = from_stack().marked(inbound.network.get());
    [
        rule(
            FROM_NETWORK,
            from_network
                .transport_protocol(TCP)
                .tproxy(inbound.port)
                .counter()
                .accept(),
        ),
        rule(HAIRPIN, hairpin().tproxy(inbound.port).counter().accept()),
        rule(HAIRPIN_REFUSED, hairpin().counter().tcp_reset()),
    ]
}

fn rule(comment: &str, expressions: Expressions) -> Vec<u8> {
    let mut rule = table_and_chain();
    rule.bytes(4, &expressions.into_bytes());
    rule.bytes(7, &encode::comment(comment));
    message(
        encode::NEW_RULE,
        NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_APPEND,
        &rule.into_bytes(),
    )
}

/// Comment and counter of a listed rule, if it has both.
fn counted(payload: &[u8]) -> Option<(String, Counter)> {
    let (mut name, mut counter) = (None, None);
    for attribute in attributes(payload, NFGENMSG) {
        match attribute.kind() {
            4 => {
                counter = NlasIterator::new(attribute.value())
                    .map_while(Result::ok)
                    .find_map(|e| read_counter(e.value()))
            }
            7 => name = encode::read_comment(attribute.value()),
            _ => {}
        }
    }
    Some((name?, counter?))
}

fn read_counter(expression: &[u8]) -> Option<Counter> {
    if value(expression, 1)?.strip_suffix(&[0])? != b"counter" {
        return None;
    }
    let data = value(expression, 2)?;
    let number = |kind| {
        value(&data, kind)?
            .first_chunk()
            .map(|octets| u64::from_be_bytes(*octets))
    };
    Some(Counter {
        octets: number(1)?,
        packets: number(2)?,
    })
}

fn value(attributes: &[u8], kind: u16) -> Option<Vec<u8>> {
    let mut attributes = NlasIterator::new(attributes).map_while(Result::ok);
    attributes
        .find(|found| found.kind() == kind)
        .map(|found| found.value().to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_is_read_back_and_no_truncation_panics() {
        let mut listed = vec![0; NFGENMSG];
        let mut body = table_and_chain();
        body.nest(4, |list| {
            list.nest(1, |expression| {
                expression.text(1, "counter");
                expression.nest(2, |data| {
                    data.bytes(1, &900u64.to_be_bytes());
                    data.bytes(2, &3u64.to_be_bytes());
                });
            });
        });
        body.bytes(7, &encode::comment(DROPPED));
        listed.extend(body.into_bytes());
        let whole = counted(&listed).expect("complete");
        assert_eq!(
            whole,
            (
                DROPPED.to_owned(),
                Counter {
                    packets: 3,
                    octets: 900
                }
            )
        );
        for length in 0..listed.len() {
            let _ = counted(&listed[..length]);
        }
    }
}
