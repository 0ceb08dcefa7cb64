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
//! Where the kernel cannot cut a send (old kernels on devices without checksums, IPsec), datagrams go out one by one.
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
    /// The kernel cuts what one send carries (`UDP_SEGMENT`); off for good once it could not.
    segmenting: bool,
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
        Self::over(port, socket, local, mtu).map_err(failed)
    }

    fn over(port: PortRef, socket: OwnedFd, local: SocketAddr, mtu: Mtu) -> io::Result<Self> {
        let (readiness, leftover) = watch(&socket)?;
        Ok(Self {
            port,
            socket,
            local,
            limits: offloading(mtu, true),
            readiness,
            leftover,
            staging: Staging::new(),
            scratch: vec![0; DATAGRAM].into_boxed_slice(),
            segmenting: true,
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

/// Datagrams of frames of their own, gathered for one `sendmmsg`: a message is a run of equal sizes to one endpoint, or
/// one datagram if the kernel does not cut.
struct Gathered<'a> {
    slices: [IoSlice<'a>; SEGMENTS],
    count: usize,
    messages: [Range<usize>; BATCH],
    runs: [Run; BATCH],
    len: usize,
    segmenting: bool,
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
    fn new(local: SocketAddr, segmenting: bool) -> Self {
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
            segmenting,
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
        match last.filter(|(_, run)| self.segmenting && run.takes(outer, datagram.len())) {
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

    /// The kernel has to cut it.
    fn is_cut(&self) -> bool {
        self.octets > self.size
    }

    /// One datagram of it.
    fn uncut(self) -> Self {
        Self {
            octets: self.size,
            ..self
        }
    }

    fn envelope(&self) -> Envelope {
        let mut envelope = Envelope::EMPTY;
        envelope.set_destination(self.remote);
        // The room of an envelope is four such messages.
        if self.is_cut() {
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

/// What became of a send of messages.
#[derive(Debug, PartialEq, Eq)]
enum Sent {
    /// So many of them were taken.
    Taken(usize),
    /// The socket has no room for the first.
    Full,
    /// The first cannot go out: too long for its path.
    Refused,
    /// There is no way to the first one's endpoint.
    Unreachable,
    /// The first was to be cut by the kernel, and perhaps cannot be: its datagrams have to go out one by one.
    Uncut,
}

/// What became of a run whose datagrams were sent one by one.
#[derive(Debug, Default)]
struct OneByOne {
    /// Datagrams that are done with, lost ones included.
    done: usize,
    refused: usize,
    unreachable: usize,
    /// The first, of the run's full size, went out: cutting was what the kernel could not do.
    first_sent: bool,
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
        let mut gathered = Gathered::new(self.local, self.segmenting);
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
        let sent = self.send_segments(outer, &prefix, &mut segments)?;
        if sent.is_none() {
            frame.push_front(outer.len + prefix.len());
            (frame.checksum, frame.gso) = before;
        }
        self.refused += u64::from(sent == Some(false));
        Ok(sent.is_some())
    }

    /// Sends the pieces of a super-frame; false when one was refused, `None` when the socket was full before the first.
    fn send_segments(
        &mut self,
        outer: &Outer,
        prefix: &[u8],
        segments: &mut Segments<'_>,
    ) -> Result<Option<bool>> {
        let (mut first, mut whole) = (true, true);
        while let Ok(Some(piece)) = segments.run_into(prefix, SEGMENTS, &mut self.scratch) {
            let (remote, class) = (outer.remote, outer.class);
            let run = Run {
                remote,
                class,
                size: piece.stride,
                octets: piece.octets,
                closed: true,
            };
            let octets = &self.scratch[..piece.octets];
            let sent = if self.segmenting || !run.is_cut() {
                let message = std::slice::from_ref(&(0..1));
                let sent = send(&self.socket, &[IoSlice::new(octets)], message, &[run.envelope()]);
                judge(sent, run.is_cut()).map_err(|error| self.broken(error))?
            } else {
                Sent::Uncut
            };
            let full = match sent {
                Sent::Taken(_) => false,
                Sent::Full if first => return Ok(None),
                Sent::Full => true,
                Sent::Refused => {
                    whole = false;
                    false
                }
                Sent::Unreachable => {
                    self.unreachable += piece.segments as u64;
                    false
                }
                Sent::Uncut => {
                    let mut slices = [IoSlice::new(&[]); SEGMENTS];
                    for (slice, datagram) in slices.iter_mut().zip(octets.chunks(run.size)) {
                        *slice = IoSlice::new(datagram);
                    }
                    let sent = send_one_by_one(&self.socket, &run, &slices[..piece.segments])
                        .map_err(|error| self.broken(error))?;
                    if first && sent.done == 0 {
                        return Ok(None);
                    }
                    self.unreachable += sent.unreachable as u64;
                    self.stop_segmenting(&sent);
                    whole &= sent.refused == 0;
                    sent.done < piece.segments
                }
            };
            if full {
                break; // half a super-frame is on its way: the rest is lost, as on a wire
            }
            first = false;
        }
        Ok(Some(whole))
    }

    /// Sends what was gathered; returns how many of its datagrams are done with. One that cannot go out is: others
    /// behind it can.
    fn send_gathered(&mut self, gathered: &Gathered<'_>) -> Result<usize> {
        let (mut done, mut datagrams) = (0, 0);
        while done < gathered.len {
            let envelopes: [Envelope; BATCH] = std::array::from_fn(|index| {
                let run = gathered
                    .runs
                    .get(done + index)
                    .filter(|_| done + index < gathered.len);
                run.map_or(Envelope::EMPTY, Run::envelope)
            });
            let messages = &gathered.messages[done..gathered.len];
            let slices = &gathered.slices[..gathered.count];
            let (run, first) = (&gathered.runs[done], messages[0].clone());
            let sent = send(&self.socket, slices, messages, &envelopes);
            let taken = match judge(sent, run.is_cut()) {
                Ok(Sent::Taken(count)) => count,
                Ok(Sent::Full) => break,
                Ok(Sent::Refused) => {
                    self.refused += first.len() as u64;
                    1
                }
                Ok(Sent::Unreachable) => {
                    self.unreachable += first.len() as u64;
                    1
                }
                Ok(Sent::Uncut) => {
                    let sent = send_one_by_one(&self.socket, run, &slices[first.clone()])
                        .map_err(|error| self.broken(error))?;
                    self.refused += sent.refused as u64;
                    self.unreachable += sent.unreachable as u64;
                    self.stop_segmenting(&sent);
                    if sent.done < first.len() {
                        return Ok(first.start + sent.done);
                    }
                    1
                }
                Err(_) if datagrams > 0 => break,
                Err(error) => return Err(self.broken(error)),
            };
            done += taken;
            datagrams = gathered.messages[done - 1].end;
        }
        Ok(datagrams)
    }

    /// After a run that the kernel did not cut: cuts here from now on if that was what it could not do.
    fn stop_segmenting(&mut self, sent: &OneByOne) {
        if sent.first_sent && self.segmenting {
            self.segmenting = false;
            tracing::warn!(
                port = %self.port,
                local = %self.local,
                "the kernel does not segment on the way of this tunnel endpoint: its datagrams go out one by one"
            );
        }
    }

    fn broken(&self, error: io::Error) -> Error {
        io_error("port.transmit", "tunnel socket", error).object(self.port)
    }
}

/// What a send says of its messages; `cut`: the first asks for `UDP_SEGMENT`.
///
/// Kernels before 6.11 answer `EIO` to such a send when the route's device computes no checksums, all when the route is
/// transformed (IPsec); `EINVAL` stands for more than one thing. Neither says that the socket is broken.
fn judge(sent: io::Result<usize>, cut: bool) -> io::Result<Sent> {
    let error = match sent {
        Ok(count) => return Ok(Sent::Taken(count)),
        Err(error) => error,
    };
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM) => Ok(Sent::Full),
        Some(libc::EIO | libc::EINVAL) if cut => Ok(Sent::Uncut),
        Some(libc::EMSGSIZE | libc::EINVAL) => Ok(Sent::Refused),
        Some(
            libc::ENETUNREACH
            | libc::EHOSTUNREACH
            | libc::ECONNREFUSED
            | libc::ENETDOWN
            | libc::EPERM
            | libc::EACCES,
        ) => Ok(Sent::Unreachable),
        _ => Err(error),
    }
}

/// Sends the datagrams of a run as messages of their own, up to the one that finds the socket full.
///
/// # Errors
/// The first cannot be sent for a reason that is not its own.
fn send_one_by_one(socket: &OwnedFd, run: &Run, datagrams: &[IoSlice<'_>]) -> io::Result<OneByOne> {
    let envelopes = [run.uncut().envelope(); BATCH];
    let messages: [Range<usize>; SEGMENTS] = std::array::from_fn(|index| index..index + 1);
    let mut result = OneByOne::default();
    while result.done < datagrams.len() {
        let rest = &messages[result.done..datagrams.len()];
        let taken = match judge(send(socket, datagrams, rest, &envelopes), false) {
            Ok(Sent::Taken(count)) => {
                result.first_sent |= result.done == 0;
                count
            }
            Ok(Sent::Full | Sent::Uncut) => break,
            Ok(Sent::Refused) => {
                result.refused += 1;
                1
            }
            Ok(Sent::Unreachable) => {
                result.unreachable += 1;
                1
            }
            Err(_) if result.done > 0 => break,
            Err(error) => return Err(error),
        };
        result.done += taken;
    }
    Ok(result)
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

#[cfg(test)]
mod tests {
    use super::*;
    use dpumesh_core::{Gso, GsoKind};
    use dpumesh_hw::wire::{ipv4, protocol};
    use std::net::UdpSocket;

    /// What the answers of a send mean, for one message with and without `UDP_SEGMENT`.
    #[test]
    fn an_error_of_a_cut_send_is_not_the_sockets() {
        let cases = [
            (libc::EIO, Some(Sent::Uncut), None),
            (libc::EINVAL, Some(Sent::Uncut), Some(Sent::Refused)),
            (libc::EMSGSIZE, Some(Sent::Refused), Some(Sent::Refused)),
            (libc::EAGAIN, Some(Sent::Full), Some(Sent::Full)),
            (
                libc::ENETUNREACH,
                Some(Sent::Unreachable),
                Some(Sent::Unreachable),
            ),
            (libc::EBADF, None, None),
        ];
        for (errno, cut, whole) in cases {
            let failed = || Err(io::Error::from_raw_os_error(errno));
            assert_eq!(judge(failed(), true).ok(), cut, "{errno}");
            assert_eq!(judge(failed(), false).ok(), whole, "{errno}");
        }
        assert_eq!(judge(Ok(3), true).ok(), Some(Sent::Taken(3)));
    }

    /// An endpoint on loopback, and a peer. With `cuts` false the kernel answers `EINVAL` to a send with
    /// `UDP_SEGMENT`, because the socket's datagrams carry no checksum.
    fn endpoints(cuts: bool) -> (UdpUplink, UdpSocket) {
        let any = "127.0.0.1:0".parse().expect("an address");
        let socket = open_socket(any).expect("bound");
        let peer = UdpSocket::bind(any).expect("bound");
        let patience = Some(std::time::Duration::from_secs(10));
        peer.set_read_timeout(patience).expect("set");
        if !cuts {
            sys::set_option(&socket, libc::SOL_SOCKET, libc::SO_NO_CHECK, 1).expect("set");
        }
        let uplink = UdpUplink::over(PortRef::Uplink(0), socket, any, Mtu::ETHERNET).expect("open");
        (uplink, peer)
    }

    fn outer_to(remote: SocketAddr) -> Outer {
        Outer {
            from: remote,
            remote,
            class: 0,
            len: 42,
        }
    }

    const PIECES: usize = 70;

    /// A TCP super-frame of 70 pieces of 100 octets, behind 42 octets for outer headers and VXLAN's.
    fn super_frame() -> Frame {
        let ip = ipv4::Repr {
            dscp: 0,
            ecn: 0,
            id: 1,
            dont_fragment: true,
            ttl: 64,
            protocol: protocol::TCP,
            source: [10, 0, 0, 1].into(),
            destination: [10, 0, 0, 2].into(),
            payload_len: (20 + PIECES * 100) as u16,
        };
        let mut octets = vec![0; 42 + vxlan::HEADER_LEN];
        octets.extend([2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0]);
        octets.extend(ip.emit());
        octets.extend([0, 1, 0, 2, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x10, 1, 0, 0, 0, 0, 0]);
        octets.resize(octets.len() + PIECES * 100, 7);
        let mut frame = Frame::copy_of(&octets);
        frame.checksum = Checksum::Partial {
            start: 50 + 34,
            offset: 16,
        };
        frame.gso = Some(Gso {
            kind: GsoKind::TcpV4,
            size: 100,
            header_len: 50 + 54,
            ecn: false,
        });
        frame
    }

    #[test]
    fn where_the_kernel_cannot_cut_every_datagram_goes_out_all_the_same() {
        for cuts in [true, false] {
            let (mut uplink, peer) = endpoints(cuts);
            let outer = outer_to(peer.local_addr().expect("bound"));
            let mut datagram = [0; 2048];
            for turn in 0..2 {
                assert_eq!(uplink.send_super_frame(&outer, &mut super_frame()), Ok(true));
                for piece in 0..PIECES {
                    let len = peer.recv(&mut datagram).expect("arrives");
                    assert_eq!(len, 8 + 54 + 100, "piece {piece} of turn {turn}");
                }
                assert_eq!(uplink.segmenting, cuts);
            }
            // A new endpoint learns it from frames of their own too, and what it gathers afterwards is no run.
            uplink.segmenting = true;
            let payload = [9; 300];
            for _ in 0..2 {
                let mut gathered = Gathered::new(uplink.local, uplink.segmenting);
                for _ in 0..10 {
                    assert!(gathered.push(&outer, &payload[..200]));
                }
                assert_eq!(gathered.len, if uplink.segmenting { 1 } else { 10 });
                assert!(gathered.push(&outer, &payload));
                assert_eq!(uplink.send_gathered(&gathered), Ok(11));
                for len in [200; 10].into_iter().chain([300]) {
                    assert_eq!(peer.recv(&mut datagram).expect("arrives"), len);
                }
                assert_eq!(uplink.segmenting, cuts);
            }
            assert_eq!((uplink.refused(), uplink.unreachable()), (0, 0));
        }
    }

    #[test]
    fn what_cannot_go_out_is_counted_by_the_frame() {
        let (mut uplink, _) = endpoints(true);
        // Nothing can be sent to port 0: EINVAL, cut or not.
        let outer = outer_to("127.0.0.1:0".parse().expect("an address"));
        assert_eq!(uplink.send_super_frame(&outer, &mut super_frame()), Ok(true));
        assert_eq!(uplink.refused(), 1, "one frame, whatever its pieces");
        let mut gathered = Gathered::new(uplink.local, true);
        for _ in 0..10 {
            assert!(gathered.push(&outer, &[9; 200]));
        }
        assert_eq!(gathered.len, 1);
        assert_eq!(uplink.send_gathered(&gathered), Ok(10));
        assert_eq!(uplink.refused(), 11, "every frame of a run");
        assert!(uplink.segmenting, "cutting was not to blame");
    }
}
