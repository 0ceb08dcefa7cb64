//! Frames that an honest pod would not send, by a packet socket: a wrong source MAC, a wrong source IP address.
//! Honest ones go beside them, so that a test can tell "dropped for what they are" from "nothing gets through".
//!
//! Each frame is a UDP datagram whose payload says what it is: [`HONEST`], [`WRONG_MAC`] or [`WRONG_IP`].

use std::io::{self, ErrorKind, IoSlice};
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use clap::Args;
use etherparse::PacketBuilder;
use nix::ifaddrs::getifaddrs;
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, bind, sendmsg, socket,
};
use serde::{Deserialize, Serialize};
use std::os::fd::{AsRawFd, OwnedFd};

/// Payload of a frame with the interface's own addresses.
pub const HONEST: &str = "honest frame";
/// Payload of a frame with another's source MAC.
pub const WRONG_MAC: &str = "frame with a wrong source MAC";
/// Payload of a frame with another's source IP address.
pub const WRONG_IP: &str = "frame with a wrong source IP address";

/// What to send, and where to.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// The interface to send from
    pub interface: String,
    /// Destination address and UDP port
    #[arg(long)]
    pub to: SocketAddr,
    /// Destination MAC (the gateway's); broadcast if absent
    #[arg(long, default_value = "ff:ff:ff:ff:ff:ff")]
    pub to_mac: Mac,
    /// The forged source address; it must be of the destination's family
    #[arg(long)]
    pub as_ip: IpAddr,
    /// The forged source MAC
    #[arg(long, default_value = "02:00:00:00:00:66")]
    pub as_mac: Mac,
    /// How many frames of each kind
    #[arg(long, default_value_t = 1)]
    pub count: u64,
    /// Print one line of JSON
    #[arg(long)]
    pub json: bool,
}

/// An Ethernet address, written `02:00:00:00:00:01`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mac(pub [u8; 6]);

impl FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let octets: Option<Vec<u8>> = text
            .split(':')
            .map(|part| {
                u8::from_str_radix(part, 16)
                    .ok()
                    .filter(|_| part.len() == 2 && !part.starts_with('+'))
            })
            .collect();
        octets
            .and_then(|octets| octets.try_into().ok())
            .map(Self)
            .ok_or_else(|| format!("{text:?} is no MAC such as 02:00:00:00:00:01"))
    }
}

/// How many frames left.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spoofed {
    /// With the interface's own addresses.
    pub honest: u64,
    /// With another's source MAC.
    pub wrong_mac: u64,
    /// With another's source IP address.
    pub wrong_ip: u64,
}

/// Sends the frames.
///
/// # Errors
/// If the interface or an address of the right family on it is missing, or packet sockets are not allowed.
pub fn spoof(options: &Options) -> io::Result<Spoofed> {
    let own = Own::of(&options.interface, options.to.is_ipv4())?;
    let socket = open(&own.link)?;
    let as_ip = options.as_ip;
    if as_ip.is_ipv4() != options.to.is_ipv4() {
        return Err(invalid(format!(
            "--as-ip {as_ip} is not of the family of --to {}",
            options.to
        )));
    }
    let send = |mac: [u8; 6], ip: IpAddr, text: &str| {
        let frame = frame(mac, options.to_mac.0, ip, options.to, text)?;
        let address: Option<&LinkAddr> = None;
        sendmsg(
            socket.as_raw_fd(),
            &[IoSlice::new(&frame)],
            &[],
            MsgFlags::empty(),
            address,
        )
        .map_err(io::Error::from)
    };
    let mut sent = Spoofed::default();
    for _ in 0..options.count {
        send(own.mac, own.ip, HONEST)?;
        sent.honest += 1;
        send(options.as_mac.0, own.ip, WRONG_MAC)?;
        sent.wrong_mac += 1;
        send(own.mac, as_ip, WRONG_IP)?;
        sent.wrong_ip += 1;
    }
    Ok(sent)
}

/// An interface's own addresses.
struct Own {
    link: LinkAddr,
    mac: [u8; 6],
    ip: IpAddr,
}

impl Own {
    fn of(interface: &str, v4: bool) -> io::Result<Self> {
        let (mut link, mut ip) = (None, None);
        for entry in getifaddrs()?.filter(|entry| entry.interface_name == interface) {
            let Some(address) = entry.address else { continue };
            if let Some(found) = address.as_link_addr() {
                link = Some(*found);
            } else if let Some(found) = address.as_sockaddr_in().filter(|_| v4) {
                ip = Some(IpAddr::from(found.ip()));
            } else if let Some(found) = address.as_sockaddr_in6().filter(|_| !v4) {
                // A link-local address is on every interface; one that was given is the pod's.
                if ip.is_none() || !found.ip().is_unicast_link_local() {
                    ip = Some(IpAddr::from(found.ip()));
                }
            }
        }
        let link = link.ok_or_else(|| invalid("no such interface".to_owned()))?;
        let mac = link
            .addr()
            .ok_or_else(|| invalid("the interface has no MAC".to_owned()))?;
        let family = if v4 { "IPv4" } else { "IPv6" };
        let ip = ip.ok_or_else(|| invalid(format!("the interface has no {family} address")))?;
        Ok(Self { link, mac, ip })
    }
}

fn invalid(reason: String) -> io::Error {
    io::Error::new(ErrorKind::InvalidInput, reason)
}

/// A packet socket that only sends: protocol 0 receives nothing.
fn open(link: &LinkAddr) -> io::Result<OwnedFd> {
    let protocol: Option<SockProtocol> = None;
    let socket = socket(
        AddressFamily::Packet,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        protocol,
    )?;
    bind(socket.as_raw_fd(), link)?;
    Ok(socket)
}

fn frame(mac: [u8; 6], to_mac: [u8; 6], from: IpAddr, to: SocketAddr, text: &str) -> io::Result<Vec<u8>> {
    let ethernet = PacketBuilder::ethernet2(mac, to_mac);
    let ip = match (from, to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => ethernet.ipv4(from.octets(), to.octets(), 64),
        (IpAddr::V6(from), IpAddr::V6(to)) => ethernet.ipv6(from.octets(), to.octets(), 64),
        _ => return Err(invalid("addresses of two families".to_owned())),
    };
    let udp = ip.udp(50_000, to.port());
    let mut frame = Vec::with_capacity(udp.size(text.len()));
    udp.write(&mut frame, text.as_bytes()).map_err(io::Error::other)?;
    Ok(frame)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn macs_are_read() {
        assert_eq!("02:00:00:00:00:0a".parse(), Ok(Mac([2, 0, 0, 0, 0, 10])));
        for bad in [
            "",
            "02:00:00:00:00",
            "02:00:00:00:00:0a:0b",
            "2:0:0:0:0:a",
            "02:00:00:00:00:+1",
            "02:00:00:00:00:0g",
        ] {
            assert!(bad.parse::<Mac>().is_err(), "{bad:?}");
        }
    }
}
