//! The overlay uplink: two tunnel endpoints on a real link.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::BorrowedFd;
use std::sync::atomic::Ordering;
use std::time::Duration;

use dpumesh_core::{
    Checksum, ErrorKind, Frame, Gso, GsoKind, HEADROOM, Mtu, PortIo, PortIoLimits, PortRef, Result, Vni,
};
use dpumesh_hw::netns::Namespace;
use dpumesh_hw::wire::checksum::{self, Verdict};
use dpumesh_hw::wire::coalesce;
use dpumesh_hw::wire::{Headers, Segments, VxlanPacket, ethernet, ipv4, ipv6, protocol, udp, vxlan};
use dpumesh_tap::device::{PacketOptions, PacketPort, TapPort, UdpUplink, create_tap};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::world::{Relay, configure, eventually, join, ping, transfer};

const VNI: u32 = 0x12_3456;

fn mtu(octets: u16) -> Mtu {
    octets.try_into().expect("an MTU")
}

/// Two SoCs with a link between them.
struct Wire {
    socs: [Namespace; 2],
    endpoints: [IpAddr; 2],
    mtu: u16,
}

impl Wire {
    fn new(octets: u16, v6: bool) -> Self {
        let socs = [(); 2].map(|()| Namespace::create().expect("namespace"));
        join((&socs[0], "up0"), (&socs[1], "up0"), octets.into());
        let (texts, prefix) = if v6 {
            (["fd99::1", "fd99::2"], 64)
        } else {
            (["192.0.2.1", "192.0.2.2"], 24)
        };
        for (soc, text) in socs.iter().zip(texts) {
            configure(soc, "up0", octets.into(), &[&format!("{text}/{prefix}")]);
        }
        Self {
            socs,
            endpoints: texts.map(|text| text.parse().expect("an address")),
            mtu: octets,
        }
    }

    fn uplink(&self, side: usize) -> UdpUplink {
        UdpUplink::bind(
            PortRef::Uplink(0),
            &self.socs[side],
            self.endpoints[side],
            mtu(self.mtu),
        )
        .expect("bound")
    }

    /// What passes on the link, before any socket.
    fn capture(&self, side: usize) -> PacketPort {
        let options = PacketOptions { bypass_qdisc: false };
        PacketPort::open(
            PortRef::Uplink(0),
            &self.socs[side],
            "up0",
            mtu(self.mtu),
            options,
        )
        .expect("opened")
    }

    fn tunnel(&self, side: usize) -> Tunnel {
        Tunnel {
            uplink: self.uplink(side),
            local: self.endpoints[side],
            remote: self.endpoints[1 - side],
        }
    }

    fn overhead(&self) -> u16 {
        if self.endpoints[0].is_ipv6() { 70 } else { 50 }
    }
}

/// Encapsulation in front of an uplink, as the dataplane does it.
#[derive(Debug)]
struct Tunnel {
    uplink: UdpUplink,
    local: IpAddr,
    remote: IpAddr,
}

impl Tunnel {
    fn wrap(&self, frame: &mut Frame) {
        let outer = outer(self.local, self.remote, frame.len());
        frame
            .push_front(outer.len())
            .expect("headroom")
            .copy_from_slice(&outer);
        if let Some(gso) = &mut frame.gso {
            gso.header_len += outer.len() as u16;
        }
    }
}

fn outer(local: IpAddr, remote: IpAddr, inner: usize) -> Vec<u8> {
    let payload_len = (inner + vxlan::HEADER_LEN) as u16;
    let (ethertype, ip) = match (local, remote) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let (dscp, ecn, id, ttl) = (10, 1, 7, 64);
            let (dont_fragment, protocol) = (true, protocol::UDP);
            let payload_len = payload_len.saturating_add(8);
            let repr = ipv4::Repr {
                dscp,
                ecn,
                id,
                dont_fragment,
                ttl,
                protocol,
                source,
                destination,
                payload_len,
            };
            (0x0800, repr.emit().to_vec())
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let (dscp, ecn, flow_label, hop_limit) = (10, 1, 0, 64);
            let (next_header, payload_len) = (protocol::UDP, payload_len.saturating_add(8));
            let repr = ipv6::Repr {
                dscp,
                ecn,
                flow_label,
                hop_limit,
                next_header,
                source,
                destination,
                payload_len,
            };
            (0x86dd, repr.emit().to_vec())
        }
        _ => unreachable!("one family"),
    };
    let (destination, source) = (UdpUplink::mac_of(remote), UdpUplink::mac_of(local));
    let mut octets = ethernet::Repr {
        destination,
        source,
        ethertype,
    }
    .emit()
    .to_vec();
    octets.extend(ip);
    octets.extend(
        udp::Repr {
            source: 50_000,
            destination: vxlan::PORT,
            payload_len,
        }
        .emit(),
    );
    octets.extend(vxlan::emit(Vni::try_from(VNI).expect("24 bits")));
    octets
}

impl PortIo for Tunnel {
    fn port(&self) -> PortRef {
        self.uplink.port()
    }

    fn limits(&self) -> PortIoLimits {
        self.uplink.limits()
    }

    fn receive(&mut self, frames: &mut [Frame]) -> Result<usize> {
        let count = self.uplink.receive(frames)?;
        for frame in &mut frames[..count] {
            let headers = Headers::parse(frame.octets()).expect("outer headers are sound");
            assert_eq!(
                (headers.source(), headers.destination()),
                (self.remote, self.local)
            );
            assert_eq!(
                (headers.dst_port, headers.dscp, headers.ecn),
                (vxlan::PORT, 10, 1)
            );
            let outer = headers.payload_offset() + vxlan::HEADER_LEN;
            assert!(frame.pull_front(outer));
        }
        Ok(coalesce::coalesce(&mut frames[..count]))
    }

    fn transmit(&mut self, frames: &mut [Frame]) -> Result<usize> {
        frames.iter_mut().for_each(|frame| self.wrap(frame));
        self.uplink.transmit(frames)
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        self.uplink.poll_fd()
    }

    fn refused(&self) -> u64 {
        self.uplink.refused()
    }
}

fn pod(number: u16, octets: u16) -> (Namespace, TapPort) {
    let pod = Namespace::create().expect("namespace");
    create_tap(&pod, "vf").expect("made");
    let port = TapPort::attach(PortRef::vf(number), &pod, "vf", mtu(octets)).expect("attached");
    configure(
        &pod,
        "vf",
        octets.into(),
        &[&format!("10.1.0.{number}/24"), &format!("fd00::{number}/64")],
    );
    (pod, port)
}

pub(crate) fn pods_talk_over_vxlan() {
    for (octets, v6) in [(1500, false), (1500, true), (9000, false)] {
        let wire = Wire::new(octets, v6);
        let (a, tap_a) = pod(1, octets - wire.overhead());
        let (b, tap_b) = pod(2, octets - wire.overhead());
        let _first = Relay::start(tap_a, wire.tunnel(0));
        let second = Relay::start(tap_b, wire.tunnel(1));
        let to = |text: &str| text.parse::<IpAddr>().expect("an address");
        eventually("ping", || ping(&a, to("10.1.0.2")) && ping(&b, to("fd00::1")));
        for address in ["10.1.0.2", "fd00::2"] {
            let speed = transfer(&a, &b, to(address), 20_000_000, 128 << 10);
            println!(
                "VXLAN over {}, MTU {octets}, to {address}: {speed:.1} Gb/s",
                wire.endpoints[0]
            );
        }
        println!(
            "  {} frames at the receiver",
            second.seen().frames.load(Ordering::Relaxed)
        );
        assert_eq!(second.stop().map(|port| port.refused()), [0, 0]);
    }
}

pub(crate) fn the_wire_carries_plain_vxlan() {
    for v6 in [false, true] {
        let wire = Wire::new(1500, v6);
        let mut capture = wire.capture(1);
        let (a, tap_a) = pod(1, 1500 - wire.overhead());
        let (b, tap_b) = pod(2, 1500 - wire.overhead());
        let _relays = [
            Relay::start(tap_a, wire.tunnel(0)),
            Relay::start(tap_b, wire.tunnel(1)),
        ];
        transfer(
            &a,
            &b,
            "10.1.0.2".parse().expect("an address"),
            1_000_000,
            64 << 10,
        );
        let mut frames = vec![Frame::new(); 64];
        let (mut inner_octets, mut one) = (0, Frame::new());
        while capture.receive(&mut frames[..]).expect("captured") > 0 {
            for frame in frames.iter().filter(|frame| !frame.is_empty()) {
                let mut segments = Segments::of(frame).expect("sound");
                while segments.next_into(&mut one).expect("room") {
                    inner_octets += inner_payload(&wire, &one);
                }
            }
            frames.iter_mut().for_each(|frame| frame.reset(HEADROOM));
        }
        assert!(
            inner_octets >= 1_000_000,
            "the stream was seen inside VXLAN: {inner_octets}"
        );
    }
}

/// Octets of the pods' TCP in one frame of the wire.
fn inner_payload(wire: &Wire, frame: &Frame) -> usize {
    let headers = Headers::parse(frame.octets()).expect("sound");
    if !headers.is_ip() || headers.protocol != protocol::UDP {
        return 0;
    }
    assert!(frame.len() <= mtu(1500).frame_len() - 4, "fits the link");
    assert_eq!(
        (headers.source(), headers.destination()),
        (wire.endpoints[0], wire.endpoints[1])
    );
    assert_eq!((headers.src_port, headers.dst_port), (4789, 4789));
    assert_eq!((headers.dscp, headers.ecn), (10, 1));
    let payload = &frame.octets()[headers.payload_offset()..];
    assert_eq!(payload[0], 0x08, "the VNI is valid, nothing else (RFC 7348 §5)");
    let packet = VxlanPacket::new(payload).expect("VXLAN");
    assert_eq!(packet.vni().get(), VNI);
    let inner = Headers::parse(packet.payload()).expect("an inner frame");
    let verdict = checksum::verify_octets(packet.payload(), &inner);
    assert!(
        matches!(verdict, Verdict::Correct | Verdict::NotCovered),
        "{verdict:?}"
    );
    if inner.protocol != protocol::TCP {
        return 0;
    }
    assert_eq!(verdict, Verdict::Correct);
    inner.payload_len()
}

pub(crate) fn what_is_no_vxlan_from_here_is_refused() {
    let wire = Wire::new(1500, false);
    let mut tunnel = wire.tunnel(0);
    let inner = Frame::copy_of(&[1; 60]);
    let wrapped = |local: &str| {
        let mut octets = outer(local.parse().expect("an address"), wire.endpoints[1], inner.len());
        octets.extend(inner.octets());
        octets
    };
    let mut other_port = wrapped("192.0.2.1");
    other_port[37] = 80;
    let mut long = wrapped("192.0.2.1");
    long.resize(1600, 0);
    let frames = [
        inner.octets().to_vec(),
        wrapped("192.0.2.9"),
        other_port,
        long,
        wrapped("192.0.2.1"),
    ];
    let mut frames = frames.map(|octets| Frame::copy_of(&octets));
    assert_eq!(tunnel.uplink.transmit(&mut frames).expect("taken"), 5);
    assert_eq!(tunnel.refused(), 4);
    let mut arrived = vec![Frame::new(); 4];
    let mut far = wire.uplink(1);
    assert_eq!(
        far.receive(&mut arrived).expect("empty"),
        0,
        "bound after the frame passed"
    );
    assert_eq!(tunnel.uplink.transmit(&mut frames[4..]).expect("taken"), 1);
    eventually("the sound frame", || {
        far.receive(&mut arrived).expect("received") == 1
    });
    let taken = UdpUplink::bind(PortRef::Uplink(0), &wire.socs[0], wire.endpoints[0], mtu(1500));
    assert_eq!(taken.expect_err("bound already").kind, ErrorKind::Busy);
    let foreign = UdpUplink::bind(PortRef::Uplink(0), &wire.socs[0], wire.endpoints[1], mtu(1500));
    assert_eq!(foreign.expect_err("not here").kind, ErrorKind::NotFound);
}

pub(crate) fn waiting_frames_keep_the_descriptor_readable() {
    let wire = Wire::new(1500, false);
    let (mut near, mut far) = (wire.tunnel(0), wire.tunnel(1));
    let mut frames = vec![Frame::new(); 40];
    for (index, frame) in frames.iter_mut().enumerate() {
        let mut octets = vec![0xee; 200];
        octets[199] = index as u8;
        frame.fill(&octets);
    }
    assert_eq!(near.transmit(&mut frames).expect("taken"), 40);
    let readable = |port: &Tunnel| {
        let fd = port.poll_fd().expect("pollable");
        let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::from(0u8)).expect("polled") > 0
    };
    let mut one = [Frame::new()];
    for index in 0..40 {
        eventually("readable", || readable(&far));
        assert_eq!(far.receive(&mut one).expect("received"), 1);
        assert_eq!(one[0].octets()[199], index, "in order");
    }
    assert_eq!(far.receive(&mut one).expect("empty"), 0);
    assert!(!readable(&far));
}

pub(crate) fn a_full_socket_leaves_the_rest_untouched() {
    let wire = Wire::new(1500, false);
    let tunnel = wire.tunnel(0);
    // Nobody answers for the neighbour while its end is down: what is sent waits in the socket's buffer.
    let mut netlink = dpumesh_hw::netlink::Netlink::open_in(&wire.socs[1]).expect("netlink");
    let link = netlink.link("up0").expect("there").index;
    netlink
        .change_link(link, &dpumesh_hw::netlink::LinkChange::new().arp(false))
        .expect("silent");
    let mut uplink = tunnel.uplink;
    let (local, remote) = (wire.endpoints[0], wire.endpoints[1]);
    let inner = tcp_super_frame();
    let mut sent = 0;
    let refill = || {
        let mut frame = Frame::new();
        let mut octets = outer(local, remote, inner.len());
        let pushed = octets.len() as u16;
        octets.extend(&inner);
        assert!(frame.fill(&octets));
        frame.checksum = Checksum::Partial {
            start: pushed + 34,
            offset: 16,
        };
        frame.gso = Some(Gso {
            kind: GsoKind::TcpV4,
            size: 1390,
            header_len: pushed + 54,
            ecn: false,
        });
        (frame, octets)
    };
    // A neighbour's queue is bounded by octets; beyond it the oldest are dropped, so the socket may never fill.
    let stop = std::time::Instant::now() + Duration::from_secs(1);
    while std::time::Instant::now() < stop {
        let (frame, octets) = refill();
        let mut frames = [frame];
        if uplink.transmit(&mut frames).expect("no error") == 0 {
            assert_eq!(frames[0].octets(), octets, "the frame is whole");
            assert!(frames[0].gso.is_some());
            break;
        }
        sent += 1;
    }
    assert!(sent > 0);
    assert_eq!(uplink.refused(), 0);
}

fn tcp_super_frame() -> Vec<u8> {
    let ip = ipv4::Repr {
        dscp: 0,
        ecn: 0,
        id: 1,
        dont_fragment: true,
        ttl: 64,
        protocol: protocol::TCP,
        source: [10, 1, 0, 1].into(),
        destination: [10, 1, 0, 2].into(),
        payload_len: 20 + 60_000,
    };
    let mut octets = vec![2; 12];
    octets.extend([0x08, 0x00]);
    octets.extend(ip.emit());
    let mut tcp = [0; 20];
    tcp[12] = 0x50;
    tcp[13] = 0x10;
    octets.extend(tcp);
    octets.resize(octets.len() + 60_000, 0x55);
    octets
}

pub(crate) fn an_endpoint_without_a_route_stops_nothing() {
    let wire = Wire::new(1500, false);
    let (mut near, mut far) = (wire.uplink(0), wire.uplink(1));
    let to = |remote: &str| {
        let mut octets = outer(wire.endpoints[0], remote.parse().expect("an address"), 60);
        octets.resize(octets.len() + 60, 3);
        Frame::copy_of(&octets)
    };
    let mut frames = [
        to("198.51.100.1"),
        to("192.0.2.2"),
        to("198.51.100.1"),
        to("192.0.2.2"),
    ];
    assert_eq!(near.transmit(&mut frames).expect("taken"), 4);
    assert_eq!(near.unreachable(), 2);
    let (mut arrived, mut count) = (vec![Frame::new(); 4], 0);
    eventually("both frames", || {
        count += far.receive(&mut arrived).expect("received");
        count == 2
    });
    let from: SocketAddr = "192.0.2.1:4789".parse().expect("an address");
    let headers = Headers::parse(arrived[0].octets()).expect("sound");
    assert_eq!((headers.source(), headers.src_port), (from.ip(), from.port()));
    assert_eq!(headers.eth_src, UdpUplink::mac_of(from.ip()));
}
