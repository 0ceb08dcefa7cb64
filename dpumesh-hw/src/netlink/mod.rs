//! What dpumesh needs of the kernel's network configuration, by netlink: no `ip` or `nft` program is run.
//!
//! A [`Netlink`] is one socket to rtnetlink (RFC 3549) in one network namespace. Calls are synchronous: one request,
//! its acknowledgement, done; each blocks for some microseconds up to milliseconds while the kernel works. The files
//! follow the objects: [`link`], [`address`], [`route`], [`rule`], [`neighbour`]; [`snapshot`] takes
//! them together, [`nft`] speaks to nf_tables and
//! [`sysctl`] writes below `/proc/sys/net`. Of SR-IOV cards, [`vf`] has the VFs as their PF administers them, [`bridge`]
//! the embedded switch, and [`devlink`] eswitch and ports. Reading ignores attributes it does not know, so that an exotic interface
//! beside ours disturbs nothing.

#![forbid(unsafe_code)]

pub mod address;
mod attribute;
pub mod bridge;
mod channel;
pub mod devlink;
pub mod link;
pub mod neighbour;
pub mod nft;
pub mod route;
pub mod rule;
pub mod snapshot;
pub mod sysctl;
pub mod vf;

use std::fmt;
use std::io;

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NlaBuffer, NlasIterator};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;

use crate::netns::Namespace;
use channel::{Channel, Failure, Reply};

pub use address::Address;
pub use bridge::BridgeMode;
pub use devlink::{Devlink, DevlinkPort, EswitchMode, PortFlavour};
pub use link::{Link, LinkChange, LinkIndex, LinkStatistics, VethEnd};
pub use neighbour::Neighbour;
pub use route::{Route, RouteKind, RouteMetrics};
pub use rule::Rule;
pub use snapshot::Snapshot;
pub use vf::{Vf, VfLinkState, VfSetting};

/// Marks the routes and rules that dpumesh made (`RTA_PROTOCOL`, `FRA_PROTOCOL`; shown as `proto 201`), so that they
/// can be told from an administrator's.
pub const PROTOCOL: u8 = 201;

/// A socket to rtnetlink in one namespace. It stays there, whichever thread uses it later.
#[derive(Debug)]
pub struct Netlink {
    channel: Channel,
}

impl Netlink {
    /// Opens a socket in the calling thread's namespace.
    ///
    /// # Errors
    /// If the kernel gives no netlink socket.
    pub fn open() -> Result<Self, NetlinkError> {
        let channel = Channel::open(NETLINK_ROUTE)
            .map_err(|failure| NetlinkError::new("open socket", "rtnetlink", failure))?;
        Ok(Self { channel })
    }

    /// Opens a socket inside `namespace`; the calling thread stays where it is.
    ///
    /// # Errors
    /// If the namespace cannot be entered or the kernel gives no netlink socket.
    pub fn open_in(namespace: &Namespace) -> Result<Self, NetlinkError> {
        namespace.run(Self::open).map_err(|error| {
            NetlinkError::new(
                "open socket in",
                namespace.id(),
                Failure::Io(io::Error::other(error)),
            )
        })?
    }

    /// Sends one request that changes something and waits for the acknowledgement.
    fn change(
        &mut self,
        operation: &'static str,
        object: impl fmt::Display,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<(), NetlinkError> {
        let request = encode(message, NLM_F_REQUEST | NLM_F_ACK | flags);
        let outcome = self.channel.request(request);
        outcome
            .map(drop)
            .map_err(|failure| NetlinkError::new(operation, object, failure))
    }

    /// Asks for one object.
    fn get(
        &mut self,
        operation: &'static str,
        object: impl fmt::Display,
        message: RouteNetlinkMessage,
    ) -> Result<Vec<Reply>, NetlinkError> {
        let request = encode(message, NLM_F_REQUEST | NLM_F_ACK);
        self.channel
            .request(request)
            .map_err(|failure| NetlinkError::new(operation, object, failure))
    }

    /// Asks, or changes something, with a message whose attributes were written by hand.
    fn ask(
        &mut self,
        operation: &'static str,
        object: impl fmt::Display,
        kind: u16,
        head: &[u8],
        body: &attribute::Attributes,
    ) -> Result<Vec<Reply>, NetlinkError> {
        self.channel
            .request(vf::message(kind, NLM_F_REQUEST | NLM_F_ACK, head, body))
            .map_err(|failure| NetlinkError::new(operation, object, failure))
    }

    /// Asks for everything of one kind, like [`Netlink::ask`].
    fn list(
        &mut self,
        operation: &'static str,
        object: impl fmt::Display,
        kind: u16,
        head: &[u8],
        body: &attribute::Attributes,
    ) -> Result<Vec<Reply>, NetlinkError> {
        self.channel
            .request(vf::message(kind, NLM_F_REQUEST | NLM_F_DUMP, head, body))
            .map_err(|failure| NetlinkError::new(operation, object, failure))
    }

    /// Asks for everything of one kind. The kernel marks a listing that changed under it; it is then asked again.
    fn dump(
        &mut self,
        operation: &'static str,
        object: impl fmt::Display,
        message: &RouteNetlinkMessage,
    ) -> Result<Vec<Reply>, NetlinkError> {
        const ATTEMPTS: usize = 16;
        for _ in 0..ATTEMPTS {
            match self
                .channel
                .request(encode(message.clone(), NLM_F_REQUEST | NLM_F_DUMP))
            {
                Err(Failure::Interrupted) => {}
                Err(failure) => return Err(NetlinkError::new(operation, object, failure)),
                Ok(replies) => return Ok(replies),
            }
        }
        Err(NetlinkError::new(operation, object, Failure::Interrupted))
    }
}

fn encode(message: RouteNetlinkMessage, flags: u16) -> Vec<u8> {
    let mut packet = NetlinkMessage::from(message);
    packet.header.flags = flags;
    packet.finalize();
    let mut bytes = vec![0; packet.buffer_len()];
    packet.serialize(&mut bytes);
    bytes
}

/// The attributes behind a message's fixed part; reading ends at the first malformed one.
fn attributes(payload: &[u8], header_length: usize) -> impl Iterator<Item = NlaBuffer<&[u8]>> {
    NlasIterator::new(payload.get(header_length..).unwrap_or_default()).map_while(Result::ok)
}

fn family_of(address: std::net::IpAddr) -> AddressFamily {
    if address.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    }
}

/// A netlink operation that failed: which, on what, why, and what to look at.
#[derive(Debug, thiserror::Error)]
#[error("{operation} {object}: {failure}{}", advice(.failure))]
pub struct NetlinkError {
    operation: &'static str,
    object: String,
    #[source]
    failure: Failure,
}

impl NetlinkError {
    fn new(operation: &'static str, object: impl fmt::Display, failure: Failure) -> Self {
        Self {
            operation,
            object: object.to_string(),
            failure,
        }
    }

    fn missing(operation: &'static str, object: impl fmt::Display, errno: i32) -> Self {
        Self::new(operation, object, Failure::Kernel { errno, message: None })
    }

    /// The kernel's errno, if the kernel refused.
    pub fn errno(&self) -> Option<i32> {
        match &self.failure {
            Failure::Kernel { errno, .. } => Some(*errno),
            Failure::Io(error) => error.raw_os_error(),
            Failure::Interrupted | Failure::Malformed(_) => None,
        }
    }

    /// The object exists already.
    pub fn is_exists(&self) -> bool {
        self.errno() == Some(libc::EEXIST)
    }

    /// The object, or the interface or table it belongs to, does not exist (any more).
    pub fn is_missing(&self) -> bool {
        matches!(
            self.errno(),
            Some(libc::ENOENT | libc::ENODEV | libc::ESRCH | libc::EADDRNOTAVAIL | libc::ENXIO)
        )
    }
}

fn advice(failure: &Failure) -> &'static str {
    let Failure::Kernel { errno, .. } = failure else {
        return "";
    };
    match *errno {
        libc::EPERM | libc::EACCES => " (needs CAP_NET_ADMIN in this namespace)",
        libc::EOPNOTSUPP => " (this kernel was built without it)",
        libc::ENODEV => " (no such interface in this namespace)",
        libc::ENETUNREACH => {
            " (the gateway is not reachable by that interface; is it up, or is `onlink` meant?)"
        }
        libc::ENETDOWN => " (bring the interface up first)",
        libc::EBUSY => " (in use; an interface must be down for this)",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    /// An attribute whose length may be wrong.
    fn attribute() -> impl Strategy<Value = Vec<u8>> {
        (0u8..70, vec(any::<u8>(), 0..40), -3i32..3).prop_map(|(kind, value, lie)| {
            let length = (4 + value.len() as i32 + lie).max(0) as u16;
            let mut octets = length.to_ne_bytes().to_vec();
            octets.extend([kind, 0]);
            octets.extend(value);
            octets.resize(channel::aligned(octets.len()), 0);
            octets
        })
    }

    proptest! {
        #[test]
        fn no_answer_of_the_kernel_panics(
            header in vec(any::<u8>(), 0..24),
            attributes in vec(attribute(), 0..8),
        ) {
            for family in [libc::AF_INET, libc::AF_INET6] {
                let mut payload = header.clone();
                if let Some(first) = payload.first_mut() {
                    *first = family as u8;
                }
                attributes.iter().for_each(|attribute| payload.extend(attribute));
                link::parse(&payload);
                vf::parse(&payload);
                address::parse(&payload);
                route::parse(&payload);
                rule::parse(&payload);
                neighbour::parse(&payload);
            }
        }
    }
}
