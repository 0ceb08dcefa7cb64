//! Frames that the dataplane sends by itself: answers to ARP and neighbour discovery, ICMP errors, TCP resets.
//!
//! Each is written into the caller's frame, complete with checksums ([`Checksum::Verified`]), addressed back to the
//! sender of the frame it answers and tagged like it. It is not padded to Ethernet's smallest frame: that is the
//! port's work. Whether an answer is due (whose address that is, which MTU holds) and how many are sent in a second
//! (RFC 1812 §4.3.2.8, RFC 4443 §2.4 f) is the caller's decision; what an answer must never be sent for is refused
//! here, as [`NoAnswer`].

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use dpumesh_core::{Checksum, Frame, HEADROOM, MacAddr, Mtu};

use super::checksum::{self, Verdict};
use super::ethernet::{self, ethertype};
use super::field::{array, put16};
use super::fragment::Fragment;
use super::headers::{Headers, L3};
use super::icmpv6::{NdOption, NeighborRepr};
use super::malformed::{Malformed, NoRoom};
use super::{arp, icmpv4, icmpv6, ipv4, ipv6, protocol, tcp};

/// Why there is no answer; the frame to be written is empty or unchanged then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoAnswer {
    /// The frame breaks its protocol's rules.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// The frame must not be answered; the text names the rule.
    #[error("not answered: {0}")]
    Forbidden(&'static str),
    /// The answer does not fit the frame it was to be written into.
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
}

/// Octets of an ICMPv4 error at most, IP header included (RFC 1812 §4.3.2.3).
pub const MAX_ICMPV4: usize = 576;

/// Octets of an ICMPv6 error at most, IP header included (RFC 4443 §3.1).
pub const MAX_ICMPV6: usize = 1280;

/// Hops of an answer: the default that RFC 1700 gives.
const TTL: u8 = 64;

/// Class selector 6, which RFC 1812 §4.3.2.5 wants for ICMP errors.
const NETWORK_CONTROL: u8 = 48;

/// Answers an ARP request: the target address is at `mac` (RFC 826). A probe (RFC 5227) is answered as well.
///
/// # Errors
/// `octets` are no request, or an announcement of the sender's own address.
pub fn arp_reply(octets: &[u8], headers: &Headers, mac: MacAddr, out: &mut Frame) -> Result<(), NoAnswer> {
    let request = arp::Packet::new(l3(octets, headers))?;
    if headers.l3 != L3::Arp || request.operation() != arp::Operation::Request {
        return Err(NoAnswer::Forbidden("not an ARP request"));
    }
    if request.sender_ip() == request.target_ip() {
        return Err(NoAnswer::Forbidden("an announcement asks nothing (RFC 5227)"));
    }
    let reply = arp::Repr {
        operation: arp::Operation::Reply,
        sender_mac: mac,
        sender_ip: request.target_ip(),
        target_mac: request.sender_mac(),
        target_ip: request.sender_ip(),
    };
    write(
        out,
        &[Link::back(headers, mac, ethertype::ARP).octets(), &reply.emit()],
    )
}

/// Answers a neighbour solicitation: the target is at `mac` (RFC 4861 §7.2.4), which is announced as no router.
///
/// # Errors
/// `octets` are no solicitation, or one that must be ignored (RFC 4861 §7.1.1): hop limit other than 255, wrong
/// checksum, an unspecified source with a link-layer address or to another than the solicited-node group.
pub fn neighbor_advertisement(
    octets: &[u8],
    headers: &Headers,
    mac: MacAddr,
    out: &mut Frame,
) -> Result<(), NoAnswer> {
    let target = solicited(octets, headers)?;
    let asker = Ipv6Addr::from(headers.src);
    let probe = asker.is_unspecified();
    let destination = if probe { ALL_NODES } else { asker };
    let repr = NeighborRepr::Advertisement {
        router: false,
        solicited: !probe,
        target,
        target_mac: mac,
    };
    let mut message = repr.emit();
    icmpv6::Packet::new(&mut message)?.fill_checksum(target, destination);
    let ip = ipv6::Repr {
        dscp: 0,
        ecn: 0,
        flow_label: 0,
        hop_limit: 255,
        next_header: protocol::ICMPV6,
        source: target,
        destination,
        payload_len: message.len() as u16,
    };
    let mut link = Link::back(headers, mac, ethertype::IPV6);
    if probe {
        link.set_destination(MacAddr([0x33, 0x33, 0, 0, 0, 1]));
    }
    write(out, &[link.octets(), &ip.emit(), &message])
}

/// Tells the sender of a packet that must not be fragmented that it is too big for the next link, which takes `mtu`
/// octets (RFC 1191 §4, RFC 1812 §5.3.4).
///
/// # Errors
/// See [`icmpv4_error`]; also a packet that may be fragmented.
pub fn fragmentation_needed(
    octets: &[u8],
    headers: &Headers,
    from: Ipv4Addr,
    mtu: Mtu,
    out: &mut Frame,
) -> Result<(), NoAnswer> {
    if headers.l3 == L3::Ipv4 && !ipv4::Packet::new(l3(octets, headers))?.dont_fragment() {
        return Err(NoAnswer::Forbidden("the packet may be fragmented"));
    }
    icmpv4_error(
        octets,
        headers,
        from,
        icmpv4::Message::FragmentationNeeded { mtu: mtu.get() },
        out,
    )
}

/// Tells the sender of an IPv6 packet that the next link takes `mtu` octets only (RFC 4443 §3.2, RFC 8201).
///
/// # Errors
/// See [`icmpv6_error`].
pub fn packet_too_big(
    octets: &[u8],
    headers: &Headers,
    from: Ipv6Addr,
    mtu: Mtu,
    out: &mut Frame,
) -> Result<(), NoAnswer> {
    let message = icmpv6::emit(2, 0, u32::from(mtu.get()).to_be_bytes());
    icmpv6_error(octets, headers, from, message, out)
}

/// Sends an ICMPv4 error about a packet back to its sender, quoting as much of it as [`MAX_ICMPV4`] allows.
/// `message` should be an error; `from` is the router's address.
///
/// # Errors
/// Errors are not sent about ICMP errors, later fragments, packets to a group, nor to senders that are no single
/// host (RFC 1122 §3.2.2).
pub fn icmpv4_error(
    octets: &[u8],
    headers: &Headers,
    from: Ipv4Addr,
    message: icmpv4::Message,
    out: &mut Frame,
) -> Result<(), NoAnswer> {
    let (IpAddr::V4(sender), L3::Ipv4) = (headers.source(), headers.l3) else {
        return Err(NoAnswer::Forbidden("not IPv4"));
    };
    may_complain(headers)?;
    if headers.protocol == protocol::ICMPV4 && icmpv4::Packet::new(l4(octets, headers))?.is_error() {
        return Err(NoAnswer::Forbidden("an ICMP error (RFC 1122)"));
    }
    let quote = quote(
        octets,
        headers,
        MAX_ICMPV4 - ipv4::HEADER_LEN - icmpv4::HEADER_LEN,
    );
    let mut header = message.emit();
    let sum = checksum::Sum::of(&header)
        .plus(checksum::Sum::of(quote))
        .checksum();
    put16(&mut header, icmpv4::at::CHECKSUM, sum);
    let ip = ipv4::Repr {
        dscp: NETWORK_CONTROL,
        ecn: 0,
        id: 0,
        dont_fragment: true,
        ttl: TTL,
        protocol: protocol::ICMPV4,
        source: from,
        destination: sender,
        payload_len: (header.len() + quote.len()) as u16,
    };
    let link = Link::back(headers, headers.eth_dst, ethertype::IPV4);
    write(out, &[link.octets(), &ip.emit(), &header, quote])
}

/// Sends an ICMPv6 error about a packet back to its sender, quoting as much of it as [`MAX_ICMPV6`] allows.
/// `message` is an error's header ([`icmpv6::emit`]); `from` is the router's address.
///
/// # Errors
/// Errors are not sent about ICMPv6 errors and redirects, later fragments, packets to a group, nor to senders that
/// are no single host (RFC 4443 §2.4 e).
pub fn icmpv6_error(
    octets: &[u8],
    headers: &Headers,
    from: Ipv6Addr,
    mut message: [u8; icmpv6::HEADER_LEN],
    out: &mut Frame,
) -> Result<(), NoAnswer> {
    const REDIRECT: u8 = 137;
    if headers.l3 != L3::Ipv6 {
        return Err(NoAnswer::Forbidden("not IPv6"));
    }
    may_complain(headers)?;
    if headers.protocol == protocol::ICMPV6 && (headers.icmp_type < 128 || headers.icmp_type == REDIRECT) {
        return Err(NoAnswer::Forbidden("an ICMPv6 error or redirect (RFC 4443)"));
    }
    let quote = quote(
        octets,
        headers,
        MAX_ICMPV6 - ipv6::HEADER_LEN - icmpv6::HEADER_LEN,
    );
    let destination = Ipv6Addr::from(headers.src);
    let len = message.len() + quote.len();
    put16(&mut message, icmpv6::at::CHECKSUM, 0);
    let sum = checksum::Sum::pseudo(from.into(), destination.into(), protocol::ICMPV6, len as u32)
        .plus(checksum::Sum::of(&message))
        .plus(checksum::Sum::of(quote));
    put16(&mut message, icmpv6::at::CHECKSUM, sum.checksum());
    let ip = ipv6::Repr {
        dscp: NETWORK_CONTROL,
        ecn: 0,
        flow_label: 0,
        hop_limit: TTL,
        next_header: protocol::ICMPV6,
        source: from,
        destination,
        payload_len: len as u16,
    };
    let link = Link::back(headers, headers.eth_dst, ethertype::IPV6);
    write(out, &[link.octets(), &ip.emit(), &message, quote])
}

/// Resets the connection that a segment belongs to, as a host does that knows of none (RFC 9293 §3.10.7.1):
/// `<SEQ=SEG.ACK><CTL=RST>` to a segment with ACK, `<SEQ=0><ACK=SEG.SEQ+SEG.LEN><CTL=RST,ACK>` to any other.
/// The answer comes from the segment's destination, ports and MACs turned around.
///
/// # Errors
/// Resets are not sent for resets, for what is no whole TCP packet or has a wrong checksum, for groups, nor to
/// senders that are no single host.
pub fn reset(frame: &Frame, headers: &Headers, out: &mut Frame) -> Result<(), NoAnswer> {
    if headers.protocol != protocol::TCP || headers.fragment != Fragment::None || !headers.is_ip() {
        return Err(NoAnswer::Forbidden("not a whole TCP segment"));
    }
    let segment = tcp::Packet::new(l4(frame.octets(), headers))?;
    if segment.flags().contains(tcp::Flags::RST) {
        return Err(NoAnswer::Forbidden("a reset (RFC 9293)"));
    }
    may_complain(headers)?;
    if checksum::verify(frame, headers) != Verdict::Correct {
        return Err(NoAnswer::Forbidden("a wrong checksum"));
    }
    let repr = reset_of(&segment);
    let mut header = repr.emit();
    let (source, destination) = (headers.destination(), headers.source());
    tcp::Packet::new(&mut header)?.fill_checksum(source, destination);
    let link = |ethertype| Link::back(headers, headers.eth_dst, ethertype);
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let ip = ipv4::Repr {
                dscp: headers.dscp,
                ecn: 0,
                id: 0,
                dont_fragment: true,
                ttl: TTL,
                protocol: protocol::TCP,
                source,
                destination,
                payload_len: header.len() as u16,
            };
            write(out, &[link(ethertype::IPV4).octets(), &ip.emit(), &header])
        }
        _ => {
            let ip = ipv6::Repr {
                dscp: headers.dscp,
                ecn: 0,
                flow_label: 0,
                hop_limit: TTL,
                next_header: protocol::TCP,
                source: Ipv6Addr::from(headers.dst),
                destination: Ipv6Addr::from(headers.src),
                payload_len: header.len() as u16,
            };
            write(out, &[link(ethertype::IPV6).octets(), &ip.emit(), &header])
        }
    }
}

fn reset_of(segment: &tcp::Packet<&[u8]>) -> tcp::Repr {
    use tcp::Flags as F;
    let flags = segment.flags();
    let (sequence, acknowledgment, answer) = if flags.contains(F::ACK) {
        (segment.acknowledgment(), 0, F::RST)
    } else {
        let controls = u32::from(flags.contains(F::SYN)) + u32::from(flags.contains(F::FIN));
        let len = segment.payload().len() as u32 + controls;
        (0, segment.sequence().wrapping_add(len), F::RST | F::ACK)
    };
    tcp::Repr {
        source: segment.destination(),
        destination: segment.source(),
        sequence,
        acknowledgment,
        flags: answer,
        window: 0,
    }
}

const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// The target of a solicitation that keeps to RFC 4861 §7.1.1.
fn solicited(octets: &[u8], headers: &Headers) -> Result<Ipv6Addr, NoAnswer> {
    if headers.l3 != L3::Ipv6 || headers.protocol != protocol::ICMPV6 || headers.fragment != Fragment::None {
        return Err(NoAnswer::Forbidden("not a neighbour solicitation"));
    }
    let message = icmpv6::Packet::new(l4(octets, headers))?;
    let icmpv6::Message::NeighborSolicitation { target } = message.message() else {
        return Err(NoAnswer::Forbidden("not a neighbour solicitation"));
    };
    if headers.ttl != 255 {
        return Err(NoAnswer::Forbidden(
            "hop limit other than 255: not from this link (RFC 4861)",
        ));
    }
    let (source, destination) = (Ipv6Addr::from(headers.src), Ipv6Addr::from(headers.dst));
    if !message.verify_checksum(source, destination) {
        return Err(NoAnswer::Forbidden("a wrong checksum"));
    }
    if source.is_multicast() {
        return Err(NoAnswer::Forbidden("a sender that is no single host"));
    }
    if source.is_unspecified() {
        let mut options = message.options();
        if options.any(|option| matches!(option, Ok(NdOption::SourceLinkLayer(_)))) {
            return Err(NoAnswer::Forbidden(
                "an address probe with a link-layer address (RFC 4861)",
            ));
        }
        if destination != solicited_node(target) {
            return Err(NoAnswer::Forbidden(
                "an address probe to another group (RFC 4861)",
            ));
        }
    }
    Ok(target)
}

/// The group that a target's solicitations go to (RFC 4291 §2.7.1).
fn solicited_node(target: Ipv6Addr) -> Ipv6Addr {
    let [.., a, b, c] = target.octets();
    let (high, low) = (0xff00 | u16::from(a), u16::from(b) << 8 | u16::from(c));
    Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, high, low)
}

/// The rules that all errors and resets have in common.
fn may_complain(headers: &Headers) -> Result<(), NoAnswer> {
    if headers.fragment.is_later() {
        return Err(NoAnswer::Forbidden("a later fragment (RFC 1122)"));
    }
    if headers.eth_dst.is_multicast() || is_group(headers.destination()) {
        return Err(NoAnswer::Forbidden("a packet to a group (RFC 1122)"));
    }
    let source = headers.source();
    if source.is_unspecified() || source.is_loopback() || is_group(source) || headers.eth_src.is_multicast() {
        return Err(NoAnswer::Forbidden("a sender that is no single host (RFC 1122)"));
    }
    Ok(())
}

fn is_group(address: IpAddr) -> bool {
    address.is_multicast() || matches!(address, IpAddr::V4(v4) if v4.is_broadcast())
}

/// The L3 packet; empty when the headers are another frame's.
fn l3<'a>(octets: &'a [u8], headers: &Headers) -> &'a [u8] {
    octets
        .get(usize::from(headers.l3_offset)..headers.l3_end())
        .unwrap_or_default()
}

/// The L4 packet; empty when the headers are another frame's.
fn l4<'a>(octets: &'a [u8], headers: &Headers) -> &'a [u8] {
    octets.get(headers.l4_range()).unwrap_or_default()
}

fn quote<'a>(octets: &'a [u8], headers: &Headers, most: usize) -> &'a [u8] {
    let packet = l3(octets, headers);
    &packet[..packet.len().min(most)]
}

/// An Ethernet header, tagged when the frame that is answered is.
struct Link {
    octets: [u8; ethernet::HEADER_LEN + 4],
    len: usize,
}

impl Link {
    /// To the sender of the frame with these headers.
    fn back(headers: &Headers, source: MacAddr, ethertype: u16) -> Self {
        let mut octets = [0; ethernet::HEADER_LEN + 4];
        let outer = if headers.vlan.is_some() {
            ethertype::VLAN
        } else {
            ethertype
        };
        let header = ethernet::Repr {
            destination: headers.eth_src,
            source,
            ethertype: outer,
        }
        .emit();
        octets[..ethernet::HEADER_LEN].copy_from_slice(&header);
        let Some(tag) = headers.vlan else {
            return Self {
                octets,
                len: ethernet::HEADER_LEN,
            };
        };
        octets[ethernet::HEADER_LEN..].copy_from_slice(&tag.emit(ethertype));
        Self {
            octets,
            len: octets.len(),
        }
    }

    fn set_destination(&mut self, mac: MacAddr) {
        self.octets[..6].copy_from_slice(&mac.0);
    }

    fn octets(&self) -> &[u8] {
        &self.octets[..self.len]
    }
}

fn write(out: &mut Frame, pieces: &[&[u8]]) -> Result<(), NoAnswer> {
    let need = pieces.iter().map(|piece| piece.len()).sum();
    out.reset(HEADROOM);
    if !out.set_len(need) {
        return Err(NoRoom {
            need,
            have: out.tailroom(),
        }
        .into());
    }
    let mut rest = out.octets_mut();
    for piece in pieces {
        let (place, behind) = rest.split_at_mut(piece.len());
        place.copy_from_slice(piece);
        rest = behind;
    }
    out.checksum = Checksum::Verified;
    Ok(())
}

/// The MAC that a multicast IPv6 address is sent to (RFC 2464 §7).
pub fn multicast_mac(group: Ipv6Addr) -> MacAddr {
    let [a, b, c, d] = array::<4>(&group.octets(), 12);
    MacAddr([0x33, 0x33, a, b, c, d])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::samples::{self, Super};

    const GATEWAY: MacAddr = MacAddr([0xee; 6]);
    const ROUTER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 254);
    const ROUTER6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0xfe);

    fn mtu(octets: u16) -> Mtu {
        Mtu::try_from(octets).expect("large enough")
    }

    fn parse(octets: &[u8]) -> Headers {
        Headers::parse(octets).expect("sound")
    }

    /// The answer's headers, after its checksums were looked at.
    fn sound(out: &Frame) -> Headers {
        let headers = parse(out.octets());
        if headers.l3 != L3::Arp {
            assert_eq!(checksum::verify_octets(out.octets(), &headers), Verdict::Correct);
        }
        assert_eq!((headers.padding, out.checksum), (0, Checksum::Verified));
        headers
    }

    fn forbidden(outcome: Result<(), NoAnswer>) -> &'static str {
        match outcome {
            Err(NoAnswer::Forbidden(rule)) => rule,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_arp_request_is_answered_on_its_vlan() {
        let mut request = samples::arp_request();
        request.splice(12..12, [0x81, 0, 0, 100]);
        let mut out = Frame::new();
        arp_reply(&request, &parse(&request), GATEWAY, &mut out).expect("answered");
        let headers = sound(&out);
        assert_eq!(
            (headers.eth_src, headers.eth_dst),
            (GATEWAY, MacAddr([2, 0, 0, 0, 0, 1]))
        );
        assert_eq!(headers.vlan, parse(&request).vlan);
        let reply = arp::Packet::new(&out.octets()[18..]).expect("valid");
        assert_eq!(reply.operation(), arp::Operation::Reply);
        assert_eq!(
            (reply.sender_mac(), reply.sender_ip().to_string()),
            (GATEWAY, "10.0.0.2".into())
        );
        assert_eq!(reply.target_ip().to_string(), "10.0.0.1");

        let answer = out.octets().to_vec();
        assert_eq!(
            forbidden(arp_reply(&answer, &headers, GATEWAY, &mut out)),
            "not an ARP request"
        );
        request[18 + 24..18 + 28].copy_from_slice(&[10, 0, 0, 1]);
        assert!(forbidden(arp_reply(&request, &parse(&request), GATEWAY, &mut out)).contains("announcement"));
    }

    #[test]
    fn a_solicitation_is_answered_to_the_asker() {
        let request = samples::neighbor_solicitation();
        let mut out = Frame::new();
        neighbor_advertisement(&request, &parse(&request), GATEWAY, &mut out).expect("answered");
        let headers = sound(&out);
        assert_eq!((headers.ttl, headers.eth_src), (255, GATEWAY));
        assert_eq!(
            (headers.src, headers.dst[15]),
            ("fe80::2".parse::<Ipv6Addr>().unwrap().octets(), 1)
        );
        let reply = icmpv6::Packet::new(&out.octets()[54..]).expect("valid");
        let icmpv6::Message::NeighborAdvertisement {
            router: false,
            solicited: true,
            overriding: true,
            ..
        } = reply.message()
        else {
            panic!("{:?}", reply.message())
        };
        assert_eq!(
            reply.options().next(),
            Some(Ok(NdOption::TargetLinkLayer(GATEWAY)))
        );
    }

    #[test]
    fn an_address_probe_is_answered_to_all_and_broken_ones_not_at_all() {
        let mut out = Frame::new();
        let mut answer = |octets: &[u8]| {
            let outcome = neighbor_advertisement(octets, &parse(octets), GATEWAY, &mut out);
            (outcome, out.octets().to_vec())
        };
        let mut far = samples::neighbor_solicitation();
        far[21] = 254;
        assert!(forbidden(answer(&far).0).contains("255"));
        let mut corrupted = samples::neighbor_solicitation();
        corrupted[85] ^= 1;
        assert_eq!(forbidden(answer(&corrupted).0), "a wrong checksum");

        let refill = |octets: &mut [u8]| {
            let addresses: ([u8; 16], [u8; 16]) = (array(octets, 22), array(octets, 38));
            let mut message = icmpv6::Packet::new(&mut octets[54..]).expect("valid");
            message.fill_checksum(addresses.0.into(), addresses.1.into());
        };
        let mut probe = samples::neighbor_solicitation();
        probe[22..38].fill(0);
        refill(&mut probe);
        assert!(forbidden(answer(&probe).0).contains("link-layer address"));
        probe.truncate(54 + 24);
        probe[19] = 24;
        refill(&mut probe);
        let (outcome, octets) = answer(&probe);
        outcome.expect("answered");
        let headers = parse(&octets);
        assert_eq!(headers.destination(), IpAddr::V6(ALL_NODES));
        assert_eq!(headers.eth_dst, multicast_mac(ALL_NODES));
        assert_eq!(octets[58] & 0x40, 0, "not solicited");
        probe[53] = 9;
        refill(&mut probe);
        assert!(forbidden(answer(&probe).0).contains("another group"));
    }

    #[test]
    fn fragmentation_needed_quotes_up_to_576_octets() {
        let big = samples::tcp_frame(false, 2000);
        let mut out = Frame::new();
        fragmentation_needed(&big, &parse(&big), ROUTER, mtu(1450), &mut out).expect("answered");
        let headers = sound(&out);
        assert_eq!(
            (headers.l3_len, headers.icmp_type, headers.icmp_code),
            (576, 3, 4)
        );
        assert_eq!(headers.source(), IpAddr::V4(ROUTER));
        assert_eq!(headers.destination().to_string(), "10.0.0.1");
        let message = icmpv4::Packet::new(&out.octets()[34..]).expect("valid");
        assert_eq!(
            message.message(),
            icmpv4::Message::FragmentationNeeded { mtu: 1450 }
        );
        assert_eq!(message.data(), &big[14..14 + 548]);

        let small = samples::tcp_v4();
        fragmentation_needed(&small, &parse(&small), ROUTER, mtu(68), &mut out).expect("answered");
        assert_eq!(sound(&out).l3_len as usize, 28 + small.len() - 14);
    }

    #[test]
    fn packet_too_big_quotes_up_to_1280_octets() {
        let big = samples::tcp_frame(true, 2000);
        let mut out = Frame::new();
        packet_too_big(&big, &parse(&big), ROUTER6, mtu(1430), &mut out).expect("answered");
        let headers = sound(&out);
        assert_eq!((headers.l3_len, headers.icmp_type), (1280, 2));
        let message = icmpv6::Packet::new(&out.octets()[54..]).expect("valid");
        assert_eq!(message.message(), icmpv6::Message::PacketTooBig { mtu: 1430 });
        assert_eq!(message.data(), &big[14..14 + 1232]);
    }

    #[test]
    fn errors_are_not_sent_about_errors_fragments_and_groups() {
        let mut out = Frame::new();
        let mut refused = |octets: &[u8]| {
            let message = icmpv4::Message::TimeExceeded { code: 0 };
            forbidden(icmpv4_error(octets, &parse(octets), ROUTER, message, &mut out))
        };
        assert!(refused(&samples::udp_v4_fragment(64, true)).contains("fragment"));
        let mut error = samples::ping_v4();
        error[34] = 3;
        assert!(refused(&error).contains("ICMP error"));
        let with = |at: usize, value: u8| {
            let mut octets = samples::tcp_v4();
            octets[at] = value;
            samples::fill_ipv4_checksum(&mut octets, 14);
            octets
        };
        assert!(refused(&with(30, 224)).contains("group"));
        assert!(refused(&with(0, 1)).contains("group"));
        assert!(refused(&with(26, 224)).contains("single host"));
        assert!(refused(&with(26, 127)).contains("single host"));
        assert_eq!(refused(&samples::tcp_frame(true, 4)), "not IPv4");
        let loose = with(20, 0);
        let outcome = fragmentation_needed(&loose, &parse(&loose), ROUTER, mtu(1450), &mut out);
        assert_eq!(forbidden(outcome), "the packet may be fragmented");

        let v6_error = {
            let offending = samples::tcp_frame(true, 4);
            packet_too_big(&offending, &parse(&offending), ROUTER6, mtu(1280), &mut out).expect("answered");
            out.octets().to_vec()
        };
        let outcome = packet_too_big(&v6_error, &parse(&v6_error), ROUTER6, mtu(1280), &mut out);
        assert!(forbidden(outcome).contains("ICMPv6 error"));
    }

    #[test]
    fn resets_follow_rfc_9293() {
        let answer = |v6: bool, flags: u8, payload: usize| {
            let mut frame = Super {
                v6,
                payload,
                flags,
                ..Super::default()
            }
            .build();
            frame.gso = None;
            let mut out = Frame::new();
            let outcome = reset(&frame, &parse(frame.octets()), &mut out);
            outcome.map(|()| {
                let headers = sound(&out);
                assert_eq!((headers.src_port, headers.dst_port), (80, 40_000));
                assert_eq!(headers.eth_dst, MacAddr([2, 0, 0, 0, 0, 1]));
                let segment = tcp::Packet::new(&out.octets()[headers.l4_range()]).expect("valid");
                (
                    segment.flags().bits(),
                    segment.sequence(),
                    segment.acknowledgment(),
                )
            })
        };
        for v6 in [false, true] {
            assert_eq!(answer(v6, 0x10, 9), Ok((0x04, 0x2000, 0)), "ACK: its number");
            assert_eq!(answer(v6, 0x02, 0), Ok((0x14, 0, 0x1001)), "SYN counts one");
            assert_eq!(answer(v6, 0x01, 10), Ok((0x14, 0, 0x1000 + 11)), "data and FIN");
            assert_eq!(forbidden(answer(v6, 0x14, 0).map(drop)), "a reset (RFC 9293)");
        }
    }

    #[test]
    fn corrupted_and_foreign_segments_are_not_reset() {
        let mut out = Frame::new();
        let mut octets = samples::tcp_v4();
        *octets.last_mut().expect("payload") ^= 1;
        let outcome = reset(&Frame::copy_of(&octets), &parse(&octets), &mut out);
        assert_eq!(forbidden(outcome), "a wrong checksum");
        let ping = samples::ping_v4();
        assert!(reset(&Frame::copy_of(&ping), &parse(&ping), &mut out).is_err());
    }

    #[test]
    fn headers_of_another_frame_and_small_buffers_are_no_panic() {
        let big = samples::tcp_frame(false, 2000);
        let headers = parse(&big);
        let mut out = Frame::with_capacity(HEADROOM, 50);
        for len in [0, 13, 20, 60] {
            let short = &big[..len];
            assert!(arp_reply(short, &headers, GATEWAY, &mut out).is_err());
            assert!(neighbor_advertisement(short, &headers, GATEWAY, &mut out).is_err());
            assert!(fragmentation_needed(short, &headers, ROUTER, mtu(1450), &mut out).is_err());
            assert!(packet_too_big(short, &headers, ROUTER6, mtu(1450), &mut out).is_err());
            assert!(reset(&Frame::copy_of(short), &headers, &mut out).is_err());
        }
        let outcome = reset(&Frame::copy_of(&big), &headers, &mut out);
        assert_eq!(outcome, Err(NoAnswer::NoRoom(NoRoom { need: 54, have: 50 })));
    }
}
