//! Frames seen on an interface, as evidence of what is on the wire: encapsulated or plain, there or not.
//!
//! A [`Capture`] is a packet socket (packet(7)) on one interface of one namespace and a thread that keeps the frames
//! a filter chose, the newest ones if there are too many. Frames are taken apart with a parser that has nothing to
//! do with the code under test ([`Frame::datagram`]). Both directions are seen: what the interface receives, and
//! what the host sends out of it. A frame that segmentation offload has not cut yet is seen whole.
//!
//! Proof that something was *not* there is only as good as the capture: look at [`Captured::lost`].

use std::collections::VecDeque;
use std::io::{self, ErrorKind, IoSliceMut};
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use dpumesh_hw::netns::Namespace;
use etherparse::{LaxNetSlice, LaxSlicedPacket, TransportSlice};
use nix::cmsg_space;
use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, bind, recvmsg,
    setsockopt, socket, sockopt,
};

/// UDP port of VXLAN (RFC 7348).
pub const VXLAN_PORT: u16 = 4789;
/// Octets kept of each frame.
const KEPT: usize = 512;
/// Frames kept.
const FRAMES: usize = 4096;
/// Queue of the socket, octets of kernel memory; every frame costs some hundred more than its size.
const QUEUE: usize = 64 << 20;
/// `sll_pkttype` of a frame that this host sends.
const PACKET_OUTGOING: u8 = 4;

/// A frame that was seen.
#[derive(Clone, Debug)]
pub struct Frame {
    /// When it was read, since the start of the capture.
    pub at: Duration,
    /// Whether the host sent it out of the interface; otherwise it came in.
    pub outgoing: bool,
    /// Its length, octets, without FCS.
    pub length: usize,
    /// Its first octets, at most 512.
    pub octets: Vec<u8>,
}

/// The addresses and the payload of an IP packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Datagram<'a> {
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// IP protocol number of the innermost header that was understood.
    pub protocol: u8,
    /// Source and destination port of TCP and UDP.
    pub ports: Option<(u16, u16)>,
    /// What follows the last header that was understood, as far as it was kept.
    pub payload: &'a [u8],
}

impl Frame {
    /// The IP packet in the frame, if there is one.
    pub fn datagram(&self) -> Option<Datagram<'_>> {
        Datagram::in_frame(&self.octets)
    }

    /// The IP packet in the frame that a VXLAN packet in this frame carries, and the VXLAN network identifier.
    pub fn encapsulated(&self) -> Option<(u32, Datagram<'_>)> {
        self.datagram()?.encapsulated()
    }

    /// Whether `text` is somewhere in the octets that were kept.
    pub fn contains(&self, text: &[u8]) -> bool {
        !text.is_empty() && self.octets.windows(text.len()).any(|window| window == text)
    }
}

impl<'a> Datagram<'a> {
    /// The IP packet in an Ethernet frame, which may be cut short behind its headers.
    pub fn in_frame(frame: &'a [u8]) -> Option<Self> {
        let packet = LaxSlicedPacket::from_ethernet(frame).ok()?;
        let net = packet.net?;
        let (source, destination) = match &net {
            LaxNetSlice::Ipv4(ip) => (
                ip.header().source_addr().into(),
                ip.header().destination_addr().into(),
            ),
            LaxNetSlice::Ipv6(ip) => (
                ip.header().source_addr().into(),
                ip.header().destination_addr().into(),
            ),
            LaxNetSlice::Arp(_) => return None,
        };
        let ip = net.ip_payload_ref()?;
        let (ports, payload) = match packet.transport {
            Some(TransportSlice::Udp(udp)) => {
                (Some((udp.source_port(), udp.destination_port())), udp.payload())
            }
            Some(TransportSlice::Tcp(tcp)) => {
                (Some((tcp.source_port(), tcp.destination_port())), tcp.payload())
            }
            _ => (None, ip.payload),
        };
        Some(Self {
            source,
            destination,
            protocol: ip.ip_number.0,
            ports,
            payload,
        })
    }

    /// The IP packet that this one carries by VXLAN, and the network identifier.
    pub fn encapsulated(&self) -> Option<(u32, Self)> {
        const UDP: u8 = 17;
        const IDENTIFIER_IS_VALID: u8 = 0x08;
        let (_, port) = self.ports?;
        if self.protocol != UDP || port != VXLAN_PORT {
            return None;
        }
        let (header, frame) = self.payload.split_first_chunk::<8>()?;
        if header[0] & IDENTIFIER_IS_VALID == 0 {
            return None;
        }
        let vni = u32::from_be_bytes([0, header[4], header[5], header[6]]);
        Some((vni, Datagram::in_frame(frame)?))
    }
}

/// A running capture. Dropping it ends it.
#[derive(Debug)]
pub struct Capture {
    ring: Arc<Ring>,
    wake: Arc<EventFd>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

/// What a capture saw.
#[derive(Clone, Debug)]
pub struct Captured {
    /// The newest frames that the filter chose, at most 4096, in their order.
    pub frames: Vec<Frame>,
    /// Frames that the filter chose, kept or not.
    pub chosen: u64,
    /// Frames on the interface.
    pub seen: u64,
    /// Frames that the kernel could not queue for the capture, because it was too slow. The kernel tells it with
    /// the next frame that it does queue, so that a loss at the very end stays unknown; the queue is 64 MiB.
    pub lost: u64,
}

impl Captured {
    /// Whether a frame that matches was kept.
    pub fn any(&self, matches: impl Fn(&Frame) -> bool) -> bool {
        self.frames.iter().any(matches)
    }

    /// How many frames that match were kept.
    pub fn count(&self, matches: impl Fn(&Frame) -> bool) -> usize {
        self.frames.iter().filter(|frame| matches(frame)).count()
    }
}

impl Capture {
    /// Starts capturing what passes `interface` of `namespace` and is chosen by `filter`, which gets the first octets
    /// (at most 512) of each frame. What passes after the return is seen.
    ///
    /// # Errors
    /// If there is no such interface, or packet sockets are not allowed there.
    pub fn start(
        namespace: &Namespace,
        interface: &str,
        filter: impl Fn(&[u8]) -> bool + Send + 'static,
    ) -> io::Result<Self> {
        let (socket, index) = namespace
            .run(|| open(interface))
            .map_err(io::Error::other)?
            .map_err(|error| io::Error::new(error.kind(), format!("capture on {interface}: {error}")))?;
        let ring = Arc::new(Ring::new());
        let wake = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?);
        let reader = Reader {
            socket,
            index,
            filter,
            ring: Arc::clone(&ring),
            wake: Arc::clone(&wake),
            begun: Instant::now(),
            told: 0,
        };
        let thread = thread::Builder::new()
            .name("capture".into())
            .spawn(move || reader.read_until_woken())?;
        Ok(Self {
            ring,
            wake,
            thread: Some(thread),
        })
    }

    /// Waits until `count` frames have been chosen; false if that takes longer than `timeout`.
    pub fn wait_for(&self, count: u64, timeout: Duration) -> bool {
        let seen = self.ring.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let outcome = self
            .ring
            .changed
            .wait_timeout_while(seen, timeout, |seen| seen.chosen < count);
        let (seen, _) = outcome.unwrap_or_else(PoisonError::into_inner);
        seen.chosen >= count
    }

    /// Ends the capture after all frames that are queued by now and returns what was seen.
    ///
    /// # Errors
    /// If reading failed on the way, for example because the interface has gone.
    pub fn stop(mut self) -> io::Result<Captured> {
        self.end()?;
        let mut seen = self.ring.seen.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(Captured {
            frames: std::mem::take(&mut seen.frames).into(),
            chosen: seen.chosen,
            seen: seen.all,
            lost: seen.lost,
        })
    }

    fn end(&mut self) -> io::Result<()> {
        let Some(thread) = self.thread.take() else {
            return Ok(());
        };
        self.wake.write(1)?;
        thread
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the capture's filter panicked")))
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        // Nobody is there to be told.
        let _ = self.end();
    }
}

#[derive(Debug)]
struct Ring {
    seen: Mutex<Seen>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Seen {
    frames: VecDeque<Frame>,
    chosen: u64,
    all: u64,
    lost: u64,
}

impl Ring {
    fn new() -> Self {
        Self {
            seen: Mutex::default(),
            changed: Condvar::new(),
        }
    }
}

struct Reader<F> {
    socket: OwnedFd,
    /// The interface's number: before the socket was bound it heard the others, too.
    index: usize,
    filter: F,
    ring: Arc<Ring>,
    wake: Arc<EventFd>,
    begun: Instant,
    /// The kernel's count of losses so far: 32 bits, wrapping.
    told: u32,
}

impl<F: Fn(&[u8]) -> bool> Reader<F> {
    fn read_until_woken(mut self) -> io::Result<()> {
        loop {
            let mut ready = [
                PollFd::new(self.socket.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.wake.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut ready, PollTimeout::NONE) {
                Err(Errno::EINTR) => continue,
                other => other?,
            };
            let woken = ready[1].any().unwrap_or(false);
            self.drain()?;
            if woken {
                return Ok(());
            }
        }
    }

    /// Reads until the queue is empty.
    fn drain(&mut self) -> io::Result<()> {
        let mut octets = [0; KEPT];
        let mut control = cmsg_space!(u32);
        // A busy wire must not keep a capture from ending.
        for _ in 0..1_000_000 {
            let mut into = [IoSliceMut::new(&mut octets)];
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_TRUNC;
            let message =
                match recvmsg::<LinkAddr>(self.socket.as_raw_fd(), &mut into, Some(&mut control), flags) {
                    Ok(message) => message,
                    Err(Errno::EAGAIN) => return Ok(()),
                    Err(Errno::EINTR) => continue,
                    Err(errno) => return Err(errno.into()),
                };
            let (length, from) = (message.bytes, message.address);
            for control in message.cmsgs()? {
                if let ControlMessageOwned::RxqOvfl(total) = control {
                    self.note_losses(total);
                }
            }
            let Some(from) = from.filter(|from| from.ifindex() == self.index) else {
                continue;
            };
            let kept = &octets[..length.min(KEPT)];
            self.note_frame(kept, length, from.pkttype() == PACKET_OUTGOING);
        }
        Ok(())
    }

    fn note_losses(&mut self, total: u32) {
        let more = total.wrapping_sub(self.told);
        self.told = total;
        let mut seen = self.ring.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.lost += u64::from(more);
    }

    fn note_frame(&self, octets: &[u8], length: usize, outgoing: bool) {
        let chosen = (self.filter)(octets);
        let mut seen = self.ring.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.all += 1;
        if !chosen {
            return;
        }
        seen.chosen += 1;
        if seen.frames.len() == FRAMES {
            seen.frames.pop_front();
        }
        seen.frames.push_back(Frame {
            at: self.begun.elapsed(),
            outgoing,
            length,
            octets: octets.to_vec(),
        });
        drop(seen);
        self.ring.changed.notify_all();
    }
}

/// A packet socket on `interface` of the calling thread's namespace, and the interface's number.
fn open(interface: &str) -> io::Result<(OwnedFd, usize)> {
    let link = getifaddrs()?
        .filter(|entry| entry.interface_name == interface)
        .find_map(|entry| entry.address.and_then(|address| address.as_link_addr().copied()))
        .ok_or_else(|| io::Error::new(ErrorKind::NotFound, "no such interface"))?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Packet, SockType::Raw, flags, SockProtocol::EthAll)?;
    // Past net.core.rmem_max that takes CAP_NET_ADMIN of the initial user namespace; without, less must do.
    if setsockopt(&socket, sockopt::RcvBufForce, &QUEUE).is_err() {
        setsockopt(&socket, sockopt::RcvBuf, &QUEUE)?;
    }
    setsockopt(&socket, sockopt::RxqOvfl, &1)?;
    bind(socket.as_raw_fd(), &link)?;
    Ok((socket, link.ifindex()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::PacketBuilder;

    fn udp(port: u16, payload: &[u8]) -> Vec<u8> {
        let builder = PacketBuilder::ethernet2([2; 6], [4; 6])
            .ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64)
            .udp(5000, port);
        let mut frame = Vec::new();
        builder.write(&mut frame, payload).expect("written");
        frame
    }

    fn tcp6(payload: &[u8]) -> Vec<u8> {
        let builder = PacketBuilder::ethernet2([2; 6], [4; 6])
            .ipv6([1; 16], [2; 16], 64)
            .tcp(5001, 80, 1, 1000);
        let mut frame = Vec::new();
        builder.write(&mut frame, payload).expect("written");
        frame
    }

    #[test]
    fn what_vxlan_carries_is_found() {
        let inner = tcp6(b"GET /");
        let mut payload = vec![0x08, 0, 0, 0, 0, 1, 2, 0];
        payload.extend_from_slice(&inner);
        let outer = udp(VXLAN_PORT, &payload);
        let outer = Datagram::in_frame(&outer).expect("IP");
        assert_eq!(outer.ports, Some((5000, VXLAN_PORT)));
        let (vni, inner) = outer.encapsulated().expect("VXLAN");
        assert_eq!(vni, 0x0102);
        assert_eq!((inner.ports, inner.payload), (Some((5001, 80)), &b"GET /"[..]));
        assert_eq!(inner.encapsulated(), None);
    }

    #[test]
    fn a_cut_frame_is_understood_as_far_as_it_goes() {
        let whole = tcp6(&[7; 100]);
        let cut = &whole[..14 + 40 + 20 + 10];
        let found = Datagram::in_frame(cut).expect("headers are whole");
        assert_eq!((found.ports, found.payload), (Some((5001, 80)), &[7; 10][..]));
        for length in 0..whole.len() {
            let _ = Datagram::in_frame(&whole[..length]).and_then(|found| found.encapsulated());
        }
    }

    #[test]
    fn other_udp_is_not_vxlan() {
        let frame = udp(53, &[8, 0, 0, 0, 0, 0, 1, 0]);
        assert_eq!(
            Datagram::in_frame(&frame).and_then(|found| found.encapsulated()),
            None
        );
        let frame = udp(VXLAN_PORT, &[0; 60]);
        assert_eq!(
            Datagram::in_frame(&frame).and_then(|found| found.encapsulated()),
            None
        );
    }
}
