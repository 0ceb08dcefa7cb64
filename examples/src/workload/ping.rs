//! ICMP echo requests (RFC 792, RFC 4443) by an unprivileged ping socket, or a raw socket where the sysctl
//! `net.ipv4.ping_group_range` allows none.

use std::io::{self, ErrorKind, Read};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use etherparse::{
    IcmpEchoHeader, Icmpv4Header, Icmpv4Slice, Icmpv4Type, Icmpv6Header, Icmpv6Slice, Icmpv6Type,
};
use socket2::{Domain, Protocol, Socket, Type};

use super::udp::{Answers, left, question};

/// What a request carries.
const PAYLOAD: &[u8; 56] = b"abcdefghijklmnopqrstuvwabcdefghijklmnopqrstuvwabcdefghij";

/// Sends `count` echo requests one after the other and waits up to `timeout` for each answer. Blocks.
///
/// # Errors
/// If neither socket is allowed or there is no route; silence and unreachability are counts in the summary.
pub fn ping(address: IpAddr, count: u64, timeout: Duration) -> io::Result<Answers> {
    let (mut socket, raw) = open(address)?;
    socket.connect(&SocketAddr::new(address, 0).into())?;
    // A ping socket has its identifier chosen by the kernel; a raw one sees the answers of others, too.
    let id = std::process::id() as u16;
    question(count, timeout, |number, deadline| {
        let seq = number as u16;
        socket.send(&request(address, IcmpEchoHeader { id, seq }))?;
        let mut packet = [0; 2048];
        loop {
            socket.set_read_timeout(Some(left(deadline)?))?;
            let count = socket.read(&mut packet)?;
            let answer = answer(&packet[..count], address, raw);
            if answer.is_some_and(|answer| answer.seq == seq && (!raw || answer.id == id)) {
                return Ok(());
            }
        }
    })
}

fn open(address: IpAddr) -> io::Result<(Socket, bool)> {
    let (domain, protocol) = if address.is_ipv4() {
        (Domain::IPV4, Protocol::ICMPV4)
    } else {
        (Domain::IPV6, Protocol::ICMPV6)
    };
    match Socket::new(domain, Type::DGRAM, Some(protocol)) {
        Ok(socket) => Ok((socket, false)),
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            Ok((Socket::new(domain, Type::RAW, Some(protocol))?, true))
        }
        Err(error) => Err(error),
    }
}

fn request(address: IpAddr, echo: IcmpEchoHeader) -> Vec<u8> {
    let mut packet = if address.is_ipv4() {
        Icmpv4Header::with_checksum(Icmpv4Type::EchoRequest(echo), PAYLOAD)
            .to_bytes()
            .to_vec()
    } else {
        // The kernel knows the source address and fills in the checksum.
        Icmpv6Header::new(Icmpv6Type::EchoRequest(echo))
            .to_bytes()
            .to_vec()
    };
    packet.extend_from_slice(PAYLOAD);
    packet
}

/// The echo reply in `packet`, if it is one and carries the payload.
fn answer(packet: &[u8], address: IpAddr, raw: bool) -> Option<IcmpEchoHeader> {
    let (echo, payload) = if address.is_ipv4() {
        // A raw IPv4 socket delivers the IP header as well.
        let offset = if raw {
            usize::from(packet.first()? & 0x0f) * 4
        } else {
            0
        };
        let icmp = Icmpv4Slice::from_slice(packet.get(offset..)?).ok()?;
        let Icmpv4Type::EchoReply(echo) = icmp.icmp_type() else {
            return None;
        };
        (echo, packet.get(offset + 8..)?)
    } else {
        let Icmpv6Type::EchoReply(echo) = Icmpv6Slice::from_slice(packet).ok()?.icmp_type() else {
            return None;
        };
        (echo, packet.get(8..)?)
    };
    (payload == PAYLOAD).then_some(echo)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_replies_count() {
        for address in ["127.0.0.1", "::1"] {
            let address: IpAddr = address.parse().expect("address");
            let echo = IcmpEchoHeader { id: 7, seq: 9 };
            let mut packet = request(address, echo);
            assert_eq!(answer(&packet, address, false), None, "a request is no reply");
            packet[0] = if address.is_ipv4() { 0 } else { 129 };
            assert_eq!(answer(&packet, address, false), Some(echo));
            for cut in 0..packet.len() {
                assert_eq!(answer(&packet[..cut], address, false), None);
                assert_eq!(answer(&packet[..cut], address, true), None);
            }
        }
    }
}
