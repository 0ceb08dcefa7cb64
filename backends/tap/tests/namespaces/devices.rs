//! TAP and packet ports against the running kernel.

use std::io::{BufRead, BufReader, Read};
use std::net::IpAddr;
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::Ordering;

use dpumesh_core::{Checksum, ErrorKind, Frame, Mtu, PortIo, PortRef};
use dpumesh_hw::netlink::{Netlink, Route, VethEnd, sysctl};
use dpumesh_hw::netns::Namespace;
use dpumesh_tap::device::{PacketOptions, PacketPort, TapPort, create_pair, create_tap, ready_card_end};

use crate::world::{Relay, configure, eventually, join, links, open_descriptors, ping, transfer};

const HUNDRED_MEGABYTES: usize = 100_000_000;

fn mtu(octets: u16) -> Mtu {
    octets.try_into().expect("an MTU")
}

/// A pod whose VF is a TAP, and the card's side of it.
fn tap_pod(number: u16, octets: u16) -> (Namespace, TapPort) {
    let pod = Namespace::create().expect("namespace");
    create_tap(&pod, "vf").expect("made");
    let port = TapPort::attach(PortRef::vf(number), &pod, "vf", mtu(octets)).expect("attached");
    address(&pod, number, octets);
    (pod, port)
}

/// A pod whose VF is a veth end; the other end is in `card`.
fn veth_pod(card: &Namespace, number: u16, octets: u16) -> (Namespace, PacketPort) {
    let pod = Namespace::create().expect("namespace");
    let outer = format!("rep{number}");
    create_pair(&pod, "vf", card, &outer).expect("made");
    let options = PacketOptions { bypass_qdisc: true };
    let port = PacketPort::open(PortRef::vf(number), card, &outer, mtu(octets), options).expect("opened");
    address(&pod, number, octets);
    (pod, port)
}

fn address(pod: &Namespace, number: u16, octets: u16) {
    let (v4, v6) = (format!("10.1.0.{number}/24"), format!("fd00::{number}/64"));
    configure(pod, "vf", octets.into(), &[&v4, &v6]);
}

fn v4(number: u16) -> IpAddr {
    format!("10.1.0.{number}").parse().expect("an address")
}

fn v6(number: u16) -> IpAddr {
    format!("fd00::{number}").parse().expect("an address")
}

fn carries_everything(kind: &str, octets: u16, pods: [&Namespace; 2], relay: &Relay) {
    eventually("ping", || ping(pods[0], v4(2)) && ping(pods[1], v6(1)));
    for (to, family) in [(v4(2), "IPv4"), (v6(2), "IPv6")] {
        let speed = transfer(pods[0], pods[1], to, HUNDRED_MEGABYTES, 128 << 10);
        println!("{kind}, MTU {octets}, {family}, cubic, 128 KiB writes: {speed:.1} Gb/s");
    }
    let seen = relay.seen();
    let longest = seen.largest.load(Ordering::Relaxed);
    println!(
        "  {} frames, {} of them super-frames, longest {longest} octets",
        seen.frames.load(Ordering::Relaxed),
        seen.super_frames.load(Ordering::Relaxed),
    );
    assert!(longest > 30_000, "frames came in large pieces: {longest}");
    if octets == 1500 {
        assert!(seen.super_frames.load(Ordering::Relaxed) > 100, "as super-frames");
    }
}

pub(crate) fn taps_carry_ping_and_tcp_as_super_frames() {
    for octets in [1500, 9000, 65520] {
        let (a, port_a) = tap_pod(1, octets);
        let (b, port_b) = tap_pod(2, octets);
        let relay = Relay::start(port_a, port_b);
        carries_everything("TAP", octets, [&a, &b], &relay);
        for port in relay.stop() {
            assert_eq!(port.refused(), 0);
        }
    }
}

pub(crate) fn packet_sockets_carry_ping_and_tcp_as_super_frames() {
    for octets in [1500, 65520] {
        let card = Namespace::create().expect("namespace");
        let (a, port_a) = veth_pod(&card, 1, octets);
        let (b, port_b) = veth_pod(&card, 2, octets);
        let relay = Relay::start(port_a, port_b);
        carries_everything("veth and packet socket", octets, [&a, &b], &relay);
        for port in relay.stop() {
            assert_eq!(port.refused(), 0);
        }
    }
}

pub(crate) fn a_tap_and_its_routes_outlive_the_owner() {
    let (a, port_a) = tap_pod(1, 1500);
    let (b, port_b) = tap_pod(2, 1500);
    let relay = Relay::start(port_a, port_b);
    eventually("ping", || ping(&a, v4(2)));
    let before = settled_routes(&a);
    let listener = b
        .run(|| std::net::TcpListener::bind((v4(2), 0)))
        .expect("entered")
        .expect("listening");
    let to = listener.local_addr().expect("bound");
    let mut client = a.run(|| crate::world::connect(to)).expect("entered");
    let (mut server, _) = listener.accept().expect("accepted");

    drop(relay.stop());
    assert!(!ping(&a, v4(2)), "nobody carries frames");
    std::io::Write::write_all(&mut client, b"sent while the owner was away").expect("queued");
    let port_a = TapPort::attach(PortRef::vf(1), &a, "vf", mtu(1500)).expect("attached again");
    let port_b = TapPort::attach(PortRef::vf(2), &b, "vf", mtu(1500)).expect("attached again");
    let _relay = Relay::start(port_a, port_b);

    let mut text = [0; 29];
    std::io::Read::read_exact(&mut server, &mut text).expect("the connection survived");
    assert_eq!(&text, b"sent while the owner was away");
    assert_eq!(before, settled_routes(&a));
}

/// All routes of a pod but those to link-local addresses, which come and go with duplicate address detection.
fn settled_routes(pod: &Namespace) -> Vec<Route> {
    let mut routes = Netlink::open_in(pod)
        .expect("netlink")
        .routes(None)
        .expect("routes");
    routes.retain(|route| !matches!(route.destination.addr(), IpAddr::V6(to) if to.is_unicast_link_local()));
    routes
}

/// Tells a child which TAP to hold: namespace and name, with a space between.
const HOLD: &str = "DPUMESH_TAP_HOLD";

/// A process that holds a TAP until it is killed or its standard input ends. `None`: this is no such process.
pub(crate) fn hold_as_told() -> Option<ExitCode> {
    let order = std::env::var(HOLD).ok()?;
    let (path, name) = order.split_once(' ').expect("namespace and name");
    let namespace = Namespace::open(path).expect("opened");
    let _port = TapPort::attach(PortRef::vf(1), &namespace, name, mtu(1500)).expect("attached");
    println!("held");
    std::io::stdin().read_to_end(&mut Vec::new()).expect("ended");
    Some(ExitCode::SUCCESS)
}

pub(crate) fn a_killed_owners_tap_is_attached_at_once() {
    let pod = Namespace::create().expect("namespace");
    create_tap(&pod, "vf").expect("made");
    address(&pod, 1, 1500);
    let link = Netlink::open_in(&pod)
        .expect("netlink")
        .link("vf")
        .expect("there")
        .index;
    for _ in 0..10 {
        let mut command = Command::new("/proc/self/exe");
        command
            .env(HOLD, format!("{} vf", pod.path().display()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut owner = command.spawn().expect("started");
        let mut line = String::new();
        BufReader::new(owner.stdout.take().expect("piped"))
            .read_line(&mut line)
            .expect("read");
        assert_eq!(line, "held\n");
        owner.kill().expect("killed");
        // It may still be dying: that is what the call waits for.
        drop(TapPort::attach(PortRef::vf(1), &pod, "vf", mtu(1500)).expect("attached"));
        owner.wait().expect("buried");
    }
    let mut netlink = Netlink::open_in(&pod).expect("netlink");
    assert_eq!(netlink.link("vf").expect("there").index, link, "the same device");
    let nets: Vec<String> = netlink
        .addresses()
        .expect("listed")
        .iter()
        .map(|each| each.net.to_string())
        .collect();
    assert!(
        ["10.1.0.1/24", "fd00::1/64"]
            .iter()
            .all(|net| nets.contains(&(*net).to_owned())),
        "{nets:?}"
    );
}

pub(crate) fn a_tap_has_one_owner_at_a_time() {
    let (pod, port) = tap_pod(1, 1500);
    let second = TapPort::attach(PortRef::vf(1), &pod, "vf", mtu(1500)).expect_err("refused");
    assert_eq!(second.kind, ErrorKind::Busy);
    let none = TapPort::attach(PortRef::vf(1), &pod, "other", mtu(1500)).expect_err("refused");
    assert_eq!(none.kind, ErrorKind::NotFound);
    assert_eq!(
        create_tap(&pod, "vf").expect_err("refused").kind,
        ErrorKind::Exists
    );
    drop(port);
    TapPort::attach(PortRef::vf(1), &pod, "vf", mtu(1500)).expect("free again");
}

pub(crate) fn a_deleted_device_is_lost_and_one_that_is_down_is_not() {
    let card = Namespace::create().expect("namespace");
    let (pod, tap) = tap_pod(1, 1500);
    let (_other, packet) = veth_pod(&card, 2, 1500);
    for (mut port, namespace, name) in [
        (Box::new(tap) as Box<dyn PortIo>, &pod, "vf"),
        (Box::new(packet), &card, "rep2"),
    ] {
        let mut frames = [Frame::copy_of(&[0; 60])];
        let mut netlink = Netlink::open_in(namespace).expect("netlink");
        let link = netlink.link(name).expect("there").index;
        netlink
            .change_link(link, &dpumesh_hw::netlink::LinkChange::new().down())
            .expect("down");
        assert_eq!(port.transmit(&mut frames).expect("lost without carrier"), 1);
        port.receive(&mut frames).expect("no error");
        netlink.delete_link(link).expect("deleted");
        let mut receive = || (0..4).find_map(|_| port.receive(&mut [Frame::new()]).err());
        assert_eq!(receive().expect("an error").kind, ErrorKind::DeviceLost);
        assert_eq!(
            port.transmit(&mut [Frame::copy_of(&[0; 60])])
                .expect_err("lost")
                .kind,
            ErrorKind::DeviceLost
        );
    }
}

pub(crate) fn frames_that_break_the_limits_are_counted_and_stop_nothing() {
    let card = Namespace::create().expect("namespace");
    let (_a, tap) = tap_pod(1, 1500);
    let (_b, packet) = veth_pod(&card, 2, 1500);
    for mut port in [Box::new(tap) as Box<dyn PortIo>, Box::new(packet)] {
        let mut open = Frame::copy_of(&[0; 60]);
        open.checksum = Checksum::Partial {
            start: 58,
            offset: 16,
        };
        let good = || Frame::copy_of(&[0xff; 60]);
        let mut frames = [
            Frame::copy_of(&[0; 13]),
            good(),
            Frame::copy_of(&[0; 2000]),
            open,
            good(),
        ];
        assert_eq!(port.transmit(&mut frames).expect("taken"), 5);
        assert_eq!(port.refused(), 3);
        let mut many: Vec<Frame> = (0..100)
            .map(|n| {
                if n % 3 == 0 {
                    Frame::copy_of(&[0; 9])
                } else {
                    good()
                }
            })
            .collect();
        assert_eq!(port.transmit(&mut many).expect("taken"), 100);
        assert_eq!(port.refused(), 3 + 34);
    }
}

pub(crate) fn vlan_tags_arrive_in_the_frame() {
    let card = Namespace::create().expect("namespace");
    let far = Namespace::create().expect("namespace");
    join((&card, "near"), (&far, "far"), 1500);
    let options = PacketOptions { bypass_qdisc: true };
    let mut near = PacketPort::open(PortRef::Uplink(0), &card, "near", mtu(1500), options).expect("opened");
    let mut far = PacketPort::open(PortRef::Uplink(0), &far, "far", mtu(1500), options).expect("opened");
    let mut tagged = vec![2; 12];
    tagged.extend([0x81, 0x00, 0x20, 0x64, 0x88, 0xb5]);
    tagged.extend(0..60);
    assert_eq!(far.transmit(&mut [Frame::copy_of(&tagged)]).expect("sent"), 1);
    let mut frames = vec![Frame::new(); 32];
    eventually("the tagged frame", || {
        let count = near.receive(&mut frames).expect("received");
        frames[..count].iter().any(|frame| frame.octets() == tagged)
    });
}

/// Also in a namespace that has addresses, forwards, and would answer: all that is the kernel's, not the card's.
pub(crate) fn a_card_end_is_ready_and_only_the_card_answers() {
    let card = Namespace::create().expect("namespace");
    join((&card, "other"), (&card, "rehto"), 1500);
    configure(&card, "other", 1500, &["10.1.0.9/24", "fd00::9/64"]);
    for (key, value) in [("ipv4/ip_forward", "1"), ("ipv4/conf/all/rp_filter", "0")] {
        sysctl::set(&card, key, value).expect("set");
    }
    let pod = Namespace::create().expect("namespace");
    create_pair(&pod, "vf", &card, "rep1").expect("made");
    sysctl::set(&pod, "ipv6/conf/vf/disable_ipv6", "1").expect("set");
    configure(&pod, "vf", 1500, &[]);
    let options = PacketOptions { bypass_qdisc: true };
    let mut far = PacketPort::open(PortRef::vf(9), &pod, "vf", mtu(1500), options).expect("opened");
    let mut near = PacketPort::open(PortRef::vf(1), &card, "rep1", mtu(1500), options).expect("opened");
    let link = |namespace: &Namespace, name: &str| {
        let mut netlink = Netlink::open_in(namespace).expect("netlink");
        netlink.link(name).expect("there")
    };
    assert!(link(&card, "rep1").carrier && link(&pod, "vf").carrier);

    // Who has 10.1.0.9? And a datagram that the namespace could forward.
    let own = link(&card, "rep1").mac.expect("Ethernet");
    let mut request = [[0xff; 6], [2, 0, 0, 0, 0, 1]].concat();
    request.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    request.extend([2, 0, 0, 0, 0, 1, 10, 1, 0, 1, 0, 0, 0, 0, 0, 0, 10, 1, 0, 9]);
    let mut datagram = [own, [2, 0, 0, 0, 0, 1]].concat();
    datagram.extend([8, 0, 0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0x66, 0xc8]);
    datagram.extend([10, 1, 0, 1, 10, 1, 0, 7, 0, 53, 0, 53, 0, 8, 0, 0]);
    let asked = [request, datagram];
    let mut frames = asked.each_ref().map(|octets| Frame::copy_of(octets));
    assert_eq!(far.transmit(&mut frames).expect("sent"), 2);
    let mut seen = Vec::new();
    eventually("both at the card", || {
        let mut frames = [Frame::new(), Frame::new()];
        let count = near.receive(&mut frames).expect("received");
        seen.extend(frames[..count].iter().map(|frame| frame.octets().to_vec()));
        seen.len() == 2
    });
    assert_eq!(seen, asked);

    // Whatever the kernel had to say to those two came before this.
    let last = vec![0x55; 60];
    assert_eq!(near.transmit(&mut [Frame::copy_of(&last)]).expect("sent"), 1);
    let mut answers = Vec::new();
    eventually("the last frame", || {
        let mut frames = [Frame::new(), Frame::new()];
        let count = far.receive(&mut frames).expect("received");
        answers.extend(frames[..count].iter().map(|frame| frame.octets().to_vec()));
        answers.contains(&last)
    });
    assert_eq!(answers, [last]);
    assert_eq!(forwarded(&card), "0");
}

/// `ForwDatagrams` of a namespace.
fn forwarded(namespace: &Namespace) -> String {
    let statistics = namespace.run(|| std::fs::read_to_string("/proc/thread-self/net/snmp"));
    let statistics = statistics.expect("entered").expect("read");
    let mut ip = statistics.lines().filter_map(|line| line.strip_prefix("Ip: "));
    let (names, numbers) = (ip.next().expect("names"), ip.next().expect("numbers"));
    let mut columns = names.split(' ').zip(numbers.split(' '));
    let found = columns.find(|(name, _)| *name == "ForwDatagrams");
    found.expect("counted").1.to_owned()
}

/// A process may die between making a pair and making its card's end ready.
pub(crate) fn a_half_made_pair_is_made_ready() {
    let (card, pod) = (
        Namespace::create().expect("namespace"),
        Namespace::create().expect("namespace"),
    );
    let none = ready_card_end(&card, "rep1").expect_err("none");
    assert_eq!(none.kind, ErrorKind::NotFound);
    let far = VethEnd::new("rep1").in_namespace(&card);
    let mut netlink = Netlink::open_in(&pod).expect("netlink");
    netlink.create_veth(&VethEnd::new("vf"), &far).expect("made");
    configure(&pod, "vf", 1500, &[]);
    assert!(!netlink.link("vf").expect("there").carrier);
    for _ in 0..2 {
        ready_card_end(&card, "rep1").expect("ready");
        eventually("carrier", || netlink.link("vf").expect("there").carrier);
    }
    let taken = create_pair(&pod, "vf", &card, "rep2").expect_err("taken");
    assert_eq!(taken.kind, ErrorKind::Exists);
}

pub(crate) fn a_hundred_devices_leave_nothing() {
    let card = Namespace::create().expect("namespace");
    let before = (links(&card), open_descriptors());
    for cycle in 0..100 {
        if cycle % 2 == 0 {
            create_tap(&card, "vf").expect("made");
            drop(TapPort::attach(PortRef::vf(0), &card, "vf", mtu(1500)).expect("attached"));
        } else {
            create_pair(&card, "vf", &card, "rep").expect("made");
            let options = PacketOptions { bypass_qdisc: true };
            drop(PacketPort::open(PortRef::vf(0), &card, "rep", mtu(1500), options).expect("opened"));
        }
        let mut netlink = Netlink::open_in(&card).expect("netlink");
        let link = netlink.link("vf").expect("there").index;
        netlink.delete_link(link).expect("deleted");
    }
    assert_eq!((links(&card), open_descriptors()), before);
}
