//! What the cases share: pods in namespaces, a relay that moves frames between two ports, and the traffic to prove it.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use dpumesh_core::{Frame, PortIo};
use dpumesh_hw::netlink::{Address, LinkChange, Netlink, VethEnd};
use dpumesh_hw::netns::Namespace;
use ipnet::IpNet;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{Domain, Protocol, Socket, Type};

/// Longest wait for anything.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// Switches an interface on, with an MTU and addresses.
pub(crate) fn configure(namespace: &Namespace, name: &str, mtu: u32, nets: &[&str]) {
    let mut netlink = Netlink::open_in(namespace).expect("netlink");
    let link = netlink.link(name).expect("the interface is there").index;
    netlink
        .change_link(link, &LinkChange::new().mtu(mtu).up())
        .expect("switched on");
    for net in nets {
        let net: IpNet = net.parse().expect("a prefix");
        netlink
            .add_address(&Address { link, net })
            .expect("address added");
    }
}

/// Makes a veth pair between two namespaces and switches both ends on.
pub(crate) fn join(a: (&Namespace, &str), b: (&Namespace, &str), mtu: u32) {
    let mut netlink = Netlink::open_in(a.0).expect("netlink");
    netlink
        .create_veth(
            &VethEnd::new(a.1).mtu(mtu),
            &VethEnd::new(b.1).in_namespace(b.0).mtu(mtu),
        )
        .expect("pair made");
    for (namespace, name) in [a, b] {
        configure(namespace, name, mtu, &[]);
    }
}

/// Names of the interfaces in a namespace.
pub(crate) fn links(namespace: &Namespace) -> Vec<String> {
    let mut netlink = Netlink::open_in(namespace).expect("netlink");
    netlink
        .links()
        .expect("listed")
        .into_iter()
        .map(|link| link.name)
        .collect()
}

/// Descriptors that this process holds.
pub(crate) fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("proc").count()
}

/// Waits until `condition` holds.
pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < DEADLINE, "never came true: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Moves frames between two ports on a thread of its own, until it is dropped.
pub(crate) struct Relay {
    stop: Arc<AtomicBool>,
    seen: Arc<Seen>,
    thread: Option<JoinHandle<[Box<dyn PortIo>; 2]>>,
}

/// What a relay saw.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) frames: AtomicU64,
    pub(crate) super_frames: AtomicU64,
    pub(crate) largest: AtomicU64,
    pub(crate) full: AtomicU64,
}

impl Relay {
    pub(crate) fn start(a: impl PortIo + 'static, b: impl PortIo + 'static) -> Self {
        Self::between(Box::new(a), Box::new(b))
    }

    pub(crate) fn between(a: Box<dyn PortIo>, b: Box<dyn PortIo>) -> Self {
        let (stop, seen) = (Arc::new(AtomicBool::new(false)), Arc::new(Seen::default()));
        let worker = (Arc::clone(&stop), Arc::clone(&seen));
        let thread = thread::spawn(move || relay([a, b], &worker.0, &worker.1));
        Self {
            stop,
            seen,
            thread: Some(thread),
        }
    }

    pub(crate) fn seen(&self) -> &Seen {
        &self.seen
    }

    /// Stops and gives the ports back.
    pub(crate) fn stop(mut self) -> [Box<dyn PortIo>; 2] {
        self.stop.store(true, Ordering::Relaxed);
        self.thread
            .take()
            .expect("runs until here")
            .join()
            .expect("relay did not panic")
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn relay(mut ports: [Box<dyn PortIo>; 2], stop: &AtomicBool, seen: &Seen) -> [Box<dyn PortIo>; 2] {
    let mut frames = vec![Frame::new(); 64];
    while !stop.load(Ordering::Relaxed) {
        let [a, b] = &mut ports;
        let moved =
            pass(a.as_mut(), b.as_mut(), &mut frames, seen) + pass(b.as_mut(), a.as_mut(), &mut frames, seen);
        if moved == 0 {
            wait_readable(&[a.poll_fd(), b.poll_fd()]);
        }
    }
    ports
}

fn pass(from: &mut dyn PortIo, to: &mut dyn PortIo, frames: &mut [Frame], seen: &Seen) -> usize {
    let count = from.receive(frames).expect("receive");
    for frame in &frames[..count] {
        seen.frames.fetch_add(1, Ordering::Relaxed);
        seen.super_frames
            .fetch_add(u64::from(frame.gso.is_some()), Ordering::Relaxed);
        seen.largest.fetch_max(frame.len() as u64, Ordering::Relaxed);
    }
    let taken = to.transmit(&mut frames[..count]).expect("transmit");
    seen.full.fetch_add((count - taken) as u64, Ordering::Relaxed);
    count
}

fn wait_readable(fds: &[Option<BorrowedFd<'_>>]) {
    let mut polled: Vec<_> = fds
        .iter()
        .flatten()
        .map(|fd| PollFd::new(*fd, PollFlags::POLLIN))
        .collect();
    let _ = poll(&mut polled, PollTimeout::from(20u16));
}

/// One ICMP echo; true when its reply came.
pub(crate) fn ping(from: &Namespace, to: IpAddr) -> bool {
    let (domain, protocol, request, reply) = match to {
        IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4, 8, 0),
        IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6, 128, 129),
    };
    let socket = from
        .run(|| Socket::new(domain, Type::RAW, Some(protocol)))
        .expect("entered")
        .expect("raw socket");
    socket
        .set_read_timeout(Some(Duration::from_millis(500)))
        .expect("set");
    let mut echo = [request, 0, 0, 0, 0x12, 0x34, 0, 1, b'd', b'p', b'u', b'm'];
    // The kernel completes ICMPv6 checksums on raw sockets, not ICMPv4 ones.
    if to.is_ipv4() {
        let sum = echo
            .chunks(2)
            .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
            .sum::<u32>();
        let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
        echo[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    if socket.send_to(&echo, &SocketAddr::new(to, 0).into()).is_err() {
        return false;
    }
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(1) {
        let mut octets = [0; 128];
        let Ok(len) = (&socket).read(&mut octets) else {
            continue;
        };
        // An IPv4 raw socket hands the IP header up as well.
        let at = if to.is_ipv4() { 20 } else { 0 };
        let octets = &octets[..len];
        if octets.get(at) == Some(&reply) && octets.get(at + 4..at + 6) == Some(&[0x12, 0x34]) {
            return true;
        }
    }
    false
}

/// Sends `total` octets by TCP and checks every one. Returns gigabits per second.
pub(crate) fn transfer(
    client: &Namespace,
    server: &Namespace,
    to: IpAddr,
    total: usize,
    write: usize,
) -> f64 {
    let pattern = pattern();
    let listener = server
        .run(|| TcpListener::bind(SocketAddr::new(to, 0)))
        .expect("entered")
        .expect("listening");
    let address = listener.local_addr().expect("bound");
    let receiver = thread::spawn({
        let pattern = pattern.clone();
        move || receive_pattern(&listener, &pattern, total)
    });
    let mut stream = client.run(|| connect(address)).expect("entered");
    let start = Instant::now();
    let mut sent = 0;
    while sent < total {
        let at = sent % pattern.len();
        let end = (at + write).min(pattern.len()).min(at + total - sent);
        stream.write_all(&pattern[at..end]).expect("written");
        sent += end - at;
    }
    stream.shutdown(std::net::Shutdown::Write).expect("shut down");
    receiver.join().expect("every octet arrived in order");
    total as f64 * 8.0 / start.elapsed().as_secs_f64() / 1e9
}

pub(crate) fn connect(address: SocketAddr) -> TcpStream {
    let socket =
        Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP)).expect("socket");
    // The development default, bbr, distorts comparisons.
    nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::TcpCongestion, &"cubic".into())
        .expect("cubic");
    socket
        .connect_timeout(&address.into(), DEADLINE)
        .expect("connected");
    socket.set_write_timeout(Some(DEADLINE)).expect("set");
    socket.into()
}

fn receive_pattern(listener: &TcpListener, pattern: &[u8], total: usize) {
    let (mut stream, _) = listener.accept().expect("accepted");
    stream.set_read_timeout(Some(DEADLINE)).expect("set");
    let mut buffer = vec![0; 1 << 18];
    let mut received = 0;
    loop {
        let at = received % pattern.len();
        let room = buffer.len().min(pattern.len() - at);
        match stream.read(&mut buffer[..room]).expect("read") {
            0 => break,
            count => {
                assert!(
                    buffer[..count] == pattern[at..at + count],
                    "octets differ after {received}"
                );
                received += count;
            }
        }
    }
    assert_eq!(received, total, "octets received");
}

/// A megabyte and a bit without short repetitions, so that a lost or doubled piece shows.
fn pattern() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    (0..(1 << 20) + 13)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 24) as u8
        })
        .collect()
}
