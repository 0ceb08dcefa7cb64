//! [`UdpUplink`]: the uplink in overlay mode, a tunnel endpoint (VTEP) on a UDP socket.
//!
//! On this side of the port are whole frames: Ethernet, IP, UDP to port 4789, VXLAN, inner frame, as the dataplane's
//! encapsulation makes them. On the wire is plain VXLAN (RFC 7348), because the socket sends what follows the UDP header:
//!
//! ```text
//! transmit: frame ─► strip outer headers ─► cut, finish checksums ─► sendmmsg with UDP_SEGMENT
//! receive:  recvmmsg with UDP_GRO ─► cut by its size ─► outer headers put back ─► frame
//! ```
//! The kernel resolves neighbours, routes, and computes the outer checksum; outer MAC addresses, TTL and identification of a
//! transmitted frame are not looked at, its DSCP and ECN are. A frame that is not VXLAN from this endpoint is refused.
//! Datagrams leave unfragmented (DF) from the bound port 4789: the frame's UDP source port, which would spread flows
//! over the paths of a fabric, is not kept, so that the other end's kernel can merge datagrams of all flows.
//!
//! A super-frame ([`dpumesh_core::Gso`] of the *inner* packet) is cut here, in one pass that copies and sums.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use dpumesh_core::{Checksum, Error, ErrorKind, Frame, MacAddr, Mtu, PortIo, PortIoLimits, PortRef, Result};
use dpumesh_hw::netns::Namespace;
use dpumesh_hw::wire::{Segments, checksum, vxlan};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::outer::{self, Outer};
use super::{io_error, offloading, refusal};
use crate::sys::{self, BATCH, Envelope};

/// Linux takes 64 segments per send, newer ones 128.
const SEGMENTS: usize = 64;
/// Largest UDP payload over IPv4; IPv6 takes 20 more.
const DATAGRAM: usize = 65_507;
/// Datagram trains received in one call.
const TRAINS: usize = 8;
const BUFFER: usize = 16 << 20;

/// Frames of one tunnel endpoint.
#[derive(Debug)]
pub struct UdpUplink {
    port: PortRef,
    socket: OwnedFd,
    local: SocketAddr,
    limits: PortIoLimits,
    /// Readable when the socket is, or when `leftover` says that received frames wait in `staging`.
    readiness: Epoll,
    leftover: Leftover,
    staging: Staging,
    scratch: Box<[u8]>,
    refused: u64,
    unreachable: u64,
}

/// Received trains that are being cut.
#[derive(Debug)]
struct Staging {
    buffers: Vec<Box<[u8]>>,
    envelopes: [Envelope; TRAINS],
    /// Trains that are filled.
    count: usize,
    /// The one being cut, and how far it is.
    current: usize,
    at: usize,
    /// The last receive call filled every train: there may be more.
    more: bool,
}

/// Says by a descriptor that frames wait here which the socket no longer has.
#[derive(Debug)]
struct Leftover {
    event: EventFd,
    raised: bool,
}

impl UdpUplink {
    /// Binds the tunnel endpoint `address`, port 4789, in `namespace`, where an interface with an MTU of at least `mtu`
    /// has that address. Blocks for about a millisecond.
    ///
    /// # Errors
    /// `Busy` when the address and port are taken, `NotFound` when no interface has the address, `Io` else.
    pub fn bind(port: PortRef, namespace: &Namespace, address: IpAddr, mtu: Mtu) -> Result<Self> {
        const OPERATION: &str = "ports.open";
        let local = SocketAddr::new(address, vxlan::PORT);
        let failed = |error: io::Error| {
            let mut error = io_error(OPERATION, &format!("tunnel endpoint {local}"), error).object(port);
            error.kind = match error.vendor_code.map(|code| code as libc::c_int) {
                Some(libc::EADDRINUSE) => ErrorKind::Busy,
                Some(libc::EADDRNOTAVAIL) => ErrorKind::NotFound,
                _ => error.kind,
            };
            error.retry = error.kind.usual_retry();
            error
        };
        let bound = namespace.run(|| open_socket(local)).map_err(|error| {
            Error::new(ErrorKind::Io, OPERATION, error.to_string())
                .backend(crate::NAME)
                .source(error)
        })?;
        let socket = bound.map_err(failed)?;
        let (readiness, leftover) = watch(&socket).map_err(|errno| failed(errno.into()))?;
        Ok(Self {
            port,
            socket,
            local,
            limits: offloading(mtu, true),
            readiness,
            leftover,
            staging: Staging::new(),
            scratch: vec![0; DATAGRAM].into_boxed_slice(),
            refused: 0,
            unreachable: 0,
        })
    }

    /// The MAC address that stands for a tunnel endpoint in received frames; in transmitted ones any will do.
    pub fn mac_of(endpoint: IpAddr) -> MacAddr {
        outer::mac_of(endpoint)
    }

    /// Datagrams that were lost because there was no way to their endpoint.
    pub fn unreachable(&self) -> u64 {
        self.unreachable
    }
}

fn open_socket(local: SocketAddr) -> io::Result<OwnedFd> {
    let socket = Socket::new(
        Domain::for_address(local),
        Type::DGRAM.nonblocking(),
        Some(Protocol::UDP),
    )?;
    let options: &[(libc::c_int, libc::c_int, libc::c_int)] = match local {
        SocketAddr::V4(_) => &[
            (libc::SOL_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_PROBE),
            (libc::SOL_IP, libc::IP_RECVTOS, 1),
        ],
        SocketAddr::V6(_) => &[
            (libc::SOL_IPV6, libc::IPV6_V6ONLY, 1),
            (libc::SOL_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_PROBE),
            (libc::SOL_IPV6, libc::IPV6_RECVTCLASS, 1),
        ],
    };
    for (level, option, value) in options {
        sys::set_option(&socket, *level, *option, *value)?;
    }
    sys::set_option(&socket, libc::SOL_UDP, libc::UDP_GRO, 1)?;
    sys::enlarge_buffers(&socket, BUFFER)?;
    socket.bind(&SockAddr::from(local))?;
    Ok(socket.into())
}

fn watch(socket: &OwnedFd) -> nix::Result<(Epoll, Leftover)> {
    let readiness = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
    readiness.add(socket, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
    readiness.add(&event, EpollEvent::new(EpollFlags::EPOLLIN, 1))?;
    Ok((readiness, Leftover { event, raised: false }))
}

impl Leftover {
    fn set(&mut self, waiting: bool) {
        if waiting == self.raised {
            return;
        }
        // A counter between 0 and 1 neither overflows nor blocks.
        let _ = if waiting {
            self.event.write(1).map(drop)
        } else {
            self.event.read().map(drop)
        };
        self.raised = waiting;
    }
}

// ---- receive ----

impl Staging {
    fn new() -> Self {
        Self {
            buffers: (0..TRAINS).map(|_| vec![0; 1 << 16].into_boxed_slice()).collect(),
            envelopes: [Envelope::EMPTY; TRAINS],
            count: 0,
            current: 0,
            at: 0,
            more: true,
        }
    }

    fn is_empty(&self) -> bool {
        self.current == self.count
    }

    fn refill(&mut self, socket: &OwnedFd) -> io::Result<()> {
        (self.count, self.current, self.at) = (0, 0, 0);
        let mut buffers = self.buffers.iter_mut();
        let mut slices: [IoSliceMut<'_>; TRAINS] = std::array::from_fn(|_| {
            IoSliceMut::new(buffers.next().map_or(&mut [], |buffer| &mut buffer[..]))
        });
        self.count = sys::receive_messages(socket, &mut slices, 1, &mut self.envelopes)?;
        self.more = self.count == TRAINS;
        Ok(())
    }

    /// The next datagram with its sender and traffic class; `None` when nothing is left.
    fn next(&mut self) -> Option<(Option<SocketAddr>, u8, &[u8])> {
        let train = self.envelopes[..self.count].get(self.current)?;
        let len = train.len.min(self.buffers[self.current].len());
        let size = gro_size(train).unwrap_or(len).max(1);
        let range = self.at..(self.at + size).min(len);
        let (source, class, index) = (train.source(), class_of(train), self.current);
        if range.end == len {
            (self.current, self.at) = (self.current + 1, 0);
        } else {
            self.at = range.end;
        }
        Some((source, class, &self.buffers[index][range]))
    }
}

fn gro_size(train: &Envelope) -> Option<usize> {
    let size = train.control(libc::SOL_UDP, libc::UDP_GRO)?;
    size.first_chunk()
        .map(|size| libc::c_int::from_ne_bytes(*size) as usize)
}

fn class_of(train: &Envelope) -> u8 {
    let v4 = train
        .control(libc::SOL_IP, libc::IP_TOS)
        .and_then(|class| class.first().copied());
    let v6 = || {
        let class = train.control(libc::SOL_IPV6, libc::IPV6_TCLASS)?;
        class
            .first_chunk()
            .map(|class| libc::c_int::from_ne_bytes(*class) as u8)
    };
    v4.or_else(v6).unwrap_or(0)
}

// ---- transmit ----

/// Datagrams of frames of their own, gathered for one `sendmmsg`: a message is a run of equal sizes to one endpoint.
struct Gathered<'a> {
    slices: [IoSlice<'a>; SEGMENTS],
    count: usize,
    messages: [Range<usize>; BATCH],
    runs: [Run; BATCH],
    len: usize,
}

#[derive(Clone, Copy)]
struct Run {
    remote: SocketAddr,
    class: u8,
    size: usize,
    octets: usize,
    /// A shorter datagram ends its run.
    closed: bool,
}

impl<'a> Gathered<'a> {
    fn new(local: SocketAddr) -> Self {
        Self {
            slices: [IoSlice::new(&[]); SEGMENTS],
            count: 0,
            messages: std::array::from_fn(|_| 0..0),
            runs: [Run {
                remote: local,
                class: 0,
                size: 0,
                octets: 0,
                closed: true,
            }; BATCH],
            len: 0,
        }
    }

    /// False when there is no room.
    fn push(&mut self, outer: &Outer, datagram: &'a [u8]) -> bool {
        if self.count == SEGMENTS {
            return false;
        }
        let last = self
            .len
            .checked_sub(1)
            .map(|last| (&mut self.messages[last], &mut self.runs[last]));
        match last.filter(|(_, run)| run.takes(outer, datagram.len())) {
            Some((message, run)) => {
                message.end += 1;
                run.octets += datagram.len();
                run.closed = datagram.len() < run.size;
            }
            None if self.len == BATCH => return false,
            None => {
                self.messages[self.len] = self.count..self.count + 1;
                let size = datagram.len();
                self.runs[self.len] = Run {
                    remote: outer.remote,
                    class: outer.class,
                    size,
                    octets: size,
                    closed: size == 0,
                };
                self.len += 1;
            }
        }
        self.slices[self.count] = IoSlice::new(datagram);
        self.count += 1;
        true
    }
}

impl Run {
    fn takes(&self, outer: &Outer, size: usize) -> bool {
        let same = (self.remote, self.class) == (outer.remote, outer.class);
        same && !self.closed && size <= self.size && size > 0 && self.octets + size <= DATAGRAM
    }

    fn envelope(&self) -> Envelope {
        let mut envelope = Envelope::EMPTY;
        envelope.set_destination(self.remote);
        // The room of an envelope is four such messages.
        if self.octets > self.size {
            envelope.push_control(
                libc::SOL_UDP,
                libc::UDP_SEGMENT,
                &(self.size as u16).to_ne_bytes(),
            );
        }
        if self.class != 0 {
            let class = libc::c_int::from(self.class).to_ne_bytes();
            match self.remote {
                SocketAddr::V4(_) => envelope.push_control(libc::SOL_IP, libc::IP_TOS, &class),
                SocketAddr::V6(_) => envelope.push_control(libc::SOL_IPV6, libc::IPV6_TCLASS, &class),
            };
        }
        envelope
    }
}

/// What became of a send.
enum Sent {
    Taken(usize),
    Full,
}

impl UdpUplink {
    /// Judges a frame and closes its checksum; `None`: it must not leave. The frame stays as whole as it was.
    fn prepare(&self, frame: &mut Frame) -> Option<Outer> {
        if refusal(&self.limits, frame).is_some() {
            return None;
        }
        let outer = Outer::parse(frame.octets())?;
        if outer.from.ip() != self.local.ip() || frame.len() < outer.len + vxlan::HEADER_LEN {
            return None;
        }
        if let (None, Checksum::Partial { start, .. }) = (frame.gso, frame.checksum) {
            // The outer one is the kernel's.
            if usize::from(start) >= outer.len {
                checksum::complete(frame).ok()?;
            }
        }
        Some(outer)
    }

    /// Transmits the first run of frames without super-frames, or one super-frame. Returns how many were taken.
    fn transmit_some(&mut self, frames: &mut [Frame]) -> Result<usize> {
        let mut outers = [None; SEGMENTS];
        let mut seen = 0;
        for (frame, outer) in frames.iter_mut().zip(&mut outers) {
            *outer = self.prepare(frame);
            match outer {
                Some(outer) if frame.gso.is_some() && seen == 0 => {
                    return self.send_super_frame(outer, frame).map(usize::from);
                }
                Some(_) if frame.gso.is_some() => break,
                _ => seen += 1,
            }
        }
        let mut gathered = Gathered::new(self.local);
        let mut places = [0; SEGMENTS];
        for (index, (frame, outer)) in frames[..seen].iter().zip(&outers).enumerate() {
            if let Some(outer) = outer {
                places[gathered.count] = index;
                if !gathered.push(outer, &frame.octets()[outer.len..]) {
                    seen = index;
                    break;
                }
            }
        }
        let sent = self.send_gathered(&gathered)?;
        let taken = if sent == gathered.count {
            seen
        } else {
            places[sent]
        };
        self.refused += (taken - sent) as u64;
        Ok(taken)
    }

    /// Strips a super-frame, cuts it and sends the pieces. False, and the frame whole again, when the socket was full
    /// before the first.
    fn send_super_frame(&mut self, outer: &Outer, frame: &mut Frame) -> Result<bool> {
        let before = (frame.checksum, frame.gso);
        let Some(prefix) = outer.strip(frame) else {
            self.refused += 1;
            return Ok(true);
        };
        let Ok(mut segments) = Segments::of(frame) else {
            self.refused += 1;
            return Ok(true);
        };
        let mut first = true;
        while let Ok(Some(piece)) = segments.run_into(&prefix, SEGMENTS, &mut self.scratch) {
            let (remote, class) = (outer.remote, outer.class);
            let run = Run {
                remote,
                class,
                size: piece.stride,
                octets: piece.octets,
                closed: true,
            };
            let slices = [IoSlice::new(&self.scratch[..piece.octets])];
            let sent = send(
                &self.socket,
                &slices,
                std::slice::from_ref(&(0..1)),
                &[run.envelope()],
            );
            match self.judge(sent)? {
                Sent::Full if first => {
                    frame.push_front(outer.len + prefix.len());
                    (frame.checksum, frame.gso) = before;
                    return Ok(false);
                }
                // Half a super-frame is on its way: the rest is lost, as on a wire.
                Sent::Full => return Ok(true),
                Sent::Taken(_) => first = false,
            }
        }
        Ok(true)
    }

    /// Sends what was gathered; returns how many of its datagrams were taken.
    fn send_gathered(&mut self, gathered: &Gathered<'_>) -> Result<usize> {
        let mut done = 0;
        while done < gathered.len {
            let envelopes: [Envelope; BATCH] = std::array::from_fn(|index| {
                let run = gathered
                    .runs
                    .get(done + index)
                    .filter(|_| done + index < gathered.len);
                run.map_or(Envelope::EMPTY, Run::envelope)
            });
            let messages = &gathered.messages[done..gathered.len];
            let sent = send(
                &self.socket,
                &gathered.slices[..gathered.count],
                messages,
                &envelopes,
            );
            match self.judge(sent) {
                Ok(Sent::Taken(count)) => done += count,
                Ok(Sent::Full) => break,
                Err(_) if done > 0 => break,
                Err(error) => return Err(error),
            }
        }
        Ok(done.checked_sub(1).map_or(0, |last| gathered.messages[last].end))
    }

    /// A message that cannot go out counts as taken: others behind it can.
    fn judge(&mut self, sent: io::Result<usize>) -> Result<Sent> {
        let error = match sent {
            Ok(count) => return Ok(Sent::Taken(count)),
            Err(error) => error,
        };
        match error.raw_os_error() {
            Some(libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM) => Ok(Sent::Full),
            Some(libc::EMSGSIZE | libc::EINVAL) => {
                self.refused += 1;
                Ok(Sent::Taken(1))
            }
            Some(
                libc::ENETUNREACH
                | libc::EHOSTUNREACH
                | libc::ECONNREFUSED
                | libc::ENETDOWN
                | libc::EPERM
                | libc::EACCES,
            ) => {
                self.unreachable += 1;
                Ok(Sent::Taken(1))
            }
            _ => Err(io_error("port.transmit", "tunnel socket", error).object(self.port)),
        }
    }
}

fn send(
    socket: &OwnedFd,
    slices: &[IoSlice<'_>],
    messages: &[Range<usize>],
    envelopes: &[Envelope],
) -> io::Result<usize> {
    loop {
        match sys::send_messages(socket, slices, messages, envelopes) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

impl PortIo for UdpUplink {
    fn port(&self) -> PortRef {
        self.port
    }

    fn limits(&self) -> PortIoLimits {
        self.limits
    }

    fn receive(&mut self, frames: &mut [Frame]) -> Result<usize> {
        let mut received = 0;
        self.staging.more |= self.staging.is_empty();
        while received < frames.len() {
            if self.staging.is_empty() {
                if !self.staging.more {
                    break;
                }
                match self.staging.refill(&self.socket) {
                    Ok(()) => {}
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    // An earlier datagram's ICMP error; the next call gets on.
                    Err(error) if is_about_a_peer(&error) => {
                        self.unreachable += 1;
                        continue;
                    }
                    Err(_) if received > 0 => break,
                    Err(error) => {
                        return Err(io_error("port.receive", "tunnel socket", error).object(self.port));
                    }
                }
            }
            let local = self.local;
            if let Some((Some(from), class, datagram)) = self.staging.next() {
                received += usize::from(outer::rebuild(
                    &mut frames[received],
                    from,
                    local,
                    class,
                    datagram,
                ));
            }
        }
        self.leftover.set(!self.staging.is_empty());
        Ok(received)
    }

    fn transmit(&mut self, frames: &mut [Frame]) -> Result<usize> {
        let mut taken = 0;
        while taken < frames.len() {
            let count = self.transmit_some(&mut frames[taken..])?;
            if count == 0 {
                break;
            }
            taken += count;
        }
        Ok(taken)
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.readiness.0.as_fd())
    }

    fn refused(&self) -> u64 {
        self.refused
    }
}

fn is_about_a_peer(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ECONNREFUSED | libc::EHOSTUNREACH | libc::ENETUNREACH)
    )
}
