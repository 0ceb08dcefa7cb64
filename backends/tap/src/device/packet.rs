//! [`PacketPort`]: a packet socket (AF_PACKET) with virtio-net headers on one network device.
//!
//! Two uses: the card's end of the veth pair that stands for a VF where `/dev/net/tun` does not open (an unprivileged
//! user namespace; [`create_pair`](super::create_pair) makes it), and the uplink in underlay mode. The device should have
//! no addresses and no neighbours of its own in that namespace: the kernel's stack sees its frames as well.
//!
//! Frames move in batches, up to [`sys::BATCH`] in one system call. The kernel takes VLAN tags off the frame and
//! tells them apart; they are put back here. There is no back-pressure: what does not fit into the socket's receive buffer is
//! lost (and TCP notices).

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use dpumesh_core::{Error, ErrorKind, Frame, HEADROOM, Mtu, PortIo, PortIoLimits, PortRef, Result};
use dpumesh_hw::netns::Namespace;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use super::virtio::{self, HEADER};
use super::{io_error, offloading, open_error, refusal};
use crate::sys::{self, BATCH, Envelope};

/// Super-frames are counted with their bookkeeping: room for about a hundred of them.
const BUFFER: usize = 16 << 20;

/// How a packet socket behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PacketOptions {
    /// Hand frames straight to the driver. Right for a veth end, which has no queue; on a NIC the queueing discipline
    /// smooths bursts.
    pub bypass_qdisc: bool,
}

/// Frames of one network device.
#[derive(Debug)]
pub struct PacketPort {
    port: PortRef,
    socket: OwnedFd,
    limits: PortIoLimits,
    bypass_qdisc: bool,
    headers: Box<[[u8; HEADER]; BATCH]>,
    envelopes: Box<[Envelope; BATCH]>,
    /// The device was seen switched off, and nothing could be sent since. The kernel tells why nothing comes only once.
    off: bool,
    refused: u64,
    malformed: u64,
    without_carrier: u64,
}

impl PacketPort {
    /// Opens the frames of interface `name` in `namespace`, whose MTU is `mtu`, as `port`. Blocks for about a
    /// millisecond.
    ///
    /// # Errors
    /// `NotFound` without such an interface, `Denied` without CAP_NET_RAW there, `Io` else.
    pub fn open(
        port: PortRef,
        namespace: &Namespace,
        name: &str,
        mtu: Mtu,
        options: PacketOptions,
    ) -> Result<Self> {
        const OPERATION: &str = "ports.open";
        let opened = namespace.run(|| open_socket(name, options)).map_err(|error| {
            Error::new(ErrorKind::Io, OPERATION, error.to_string())
                .backend(crate::NAME)
                .source(error)
        })?;
        let socket = opened
            .map_err(|error| open_error(OPERATION, &format!("interface {name}"), error).object(port))?;
        let limits = offloading(mtu, true);
        Ok(Self {
            port,
            socket,
            limits,
            bypass_qdisc: options.bypass_qdisc,
            headers: Box::new([[0; HEADER]; BATCH]),
            envelopes: Box::new([Envelope::EMPTY; BATCH]),
            off: false,
            refused: 0,
            malformed: 0,
            without_carrier: 0,
        })
    }

    /// Received frames that were dropped because their virtio-net header contradicted them.
    pub fn malformed(&self) -> u64 {
        self.malformed
    }

    /// Transmitted frames that were lost because the network device was down.
    pub fn without_carrier(&self) -> u64 {
        self.without_carrier
    }

    fn receive_batch(&mut self, frames: &mut [Frame]) -> std::io::Result<usize> {
        let mut slices: [IoSliceMut<'_>; 2 * BATCH] = std::array::from_fn(|_| IoSliceMut::new(&mut []));
        let mut count = 0;
        for (frame, header) in frames.iter_mut().zip(self.headers.iter_mut()) {
            frame.reset(HEADROOM);
            slices[2 * count] = IoSliceMut::new(header);
            slices[2 * count + 1] = IoSliceMut::new(frame.receive_area());
            count += 1;
        }
        sys::receive_messages(&self.socket, &mut slices[..2 * count], 2, &mut self.envelopes[..])
    }

    fn lost(&self, error: std::io::Error) -> Error {
        let mut error = io_error("port.receive", "packet socket", error).object(self.port);
        if self.off {
            error.kind = ErrorKind::DeviceLost;
            error.retry = error.kind.usual_retry();
            error.message = "packet socket: its network device was deleted".into();
        }
        error
    }

    /// Sends the first run of frames; returns how many were taken, refused ones included.
    fn transmit_batch(&mut self, frames: &[Frame]) -> Result<usize> {
        let mut places = [0; BATCH];
        let (mut count, mut seen) = (0, 0);
        for frame in frames {
            if count == BATCH {
                break;
            }
            if refusal(&self.limits, frame).is_none() {
                self.headers[count] = virtio::encode(frame);
                places[count] = seen;
                count += 1;
            }
            seen += 1;
        }
        let sent = if count == 0 {
            0
        } else {
            self.send(frames, &places[..count])?
        };
        let taken = if sent == count { seen } else { places[sent] };
        self.refused += (taken - sent) as u64;
        Ok(taken)
    }

    /// Sends the frames at `places`; a frame that the device will not have is counted and passes as sent.
    fn send(&mut self, frames: &[Frame], places: &[usize]) -> Result<usize> {
        let mut slices = [IoSlice::new(&[]); 2 * BATCH];
        for (index, (header, place)) in self.headers.iter().zip(places).enumerate() {
            slices[2 * index] = IoSlice::new(header);
            slices[2 * index + 1] = IoSlice::new(frames[*place].octets());
        }
        let parts: [_; BATCH] = std::array::from_fn(|index| 2 * index..2 * index + 2);
        let plain = [Envelope::EMPTY; BATCH];
        loop {
            let sent = sys::send_messages(&self.socket, &slices, &parts[..places.len()], &plain);
            let error = match sent {
                Ok(count) => {
                    self.off = false;
                    return Ok(count);
                }
                Err(error) => error,
            };
            match error.raw_os_error() {
                Some(libc::EINTR) => {}
                // The driver of a device without a queue drops what nobody receives.
                Some(libc::ENOBUFS) if self.bypass_qdisc => {
                    self.without_carrier += 1;
                    return Ok(1);
                }
                Some(libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM) => return Ok(0),
                Some(libc::ENETDOWN) if device_exists(&self.socket) => {
                    self.without_carrier += 1;
                    return Ok(1);
                }
                Some(libc::EINVAL | libc::EMSGSIZE) => {
                    // One `transmit_batch` counts it as sent; it was not.
                    self.refused += 1;
                    return Ok(1);
                }
                _ => return Err(io_error("port.transmit", "packet socket", error).object(self.port)),
            }
        }
    }

    /// Completes the first `count` frames from what was told beside them, closing gaps. Returns how many are left.
    fn finish(&mut self, frames: &mut [Frame], count: usize) -> usize {
        let mut kept = 0;
        for index in 0..count {
            if finish_frame(&self.headers[index], &self.envelopes[index], &mut frames[index]).is_some() {
                frames.swap(kept, index);
                kept += 1;
            } else {
                self.malformed += 1;
            }
        }
        kept
    }
}

fn finish_frame(header: &[u8; HEADER], envelope: &Envelope, frame: &mut Frame) -> Option<()> {
    let len = envelope.len.checked_sub(HEADER)?;
    if envelope.truncated || !frame.set_len(len) {
        return None;
    }
    virtio::decode(header, frame)?;
    match vlan_tag(envelope) {
        Some(tag) => insert_tag(frame, tag),
        None => Some(()),
    }
}

/// The 802.1Q or 802.1ad tag that the kernel took off, from `struct tpacket_auxdata`:
/// status, len, snaplen (4 each), mac, net, vlan_tci, vlan_tpid (2 each).
fn vlan_tag(envelope: &Envelope) -> Option<[u8; 4]> {
    let data: &[u8; 20] = envelope
        .control(libc::SOL_PACKET, libc::PACKET_AUXDATA)?
        .first_chunk()?;
    let status = u32::from_ne_bytes([data[0], data[1], data[2], data[3]]);
    if status & libc::TP_STATUS_VLAN_VALID == 0 {
        return None;
    }
    let tci = u16::from_ne_bytes([data[16], data[17]]).to_be_bytes();
    let tpid = if status & libc::TP_STATUS_VLAN_TPID_VALID != 0 {
        u16::from_ne_bytes([data[18], data[19]])
    } else {
        libc::ETH_P_8021Q as u16
    };
    let tpid = tpid.to_be_bytes();
    Some([tpid[0], tpid[1], tci[0], tci[1]])
}

/// Between the MAC addresses and the EtherType.
fn insert_tag(frame: &mut Frame, tag: [u8; 4]) -> Option<()> {
    const ADDRESSES: usize = 12;
    frame.push_front(tag.len())?;
    let octets = frame.octets_mut();
    octets.copy_within(tag.len()..tag.len() + ADDRESSES, 0);
    octets[ADDRESSES..ADDRESSES + tag.len()].copy_from_slice(&tag);
    if let Some(gso) = &mut frame.gso {
        gso.header_len += tag.len() as u16;
    }
    Some(())
}

/// In the thread's namespace. Nothing is received before the last step.
fn open_socket(name: &str, options: PacketOptions) -> std::io::Result<OwnedFd> {
    let interface = nix::net::if_::if_nametoindex(name)?;
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Packet, SockType::Raw, flags, None)?;
    sys::set_option(&socket, libc::SOL_PACKET, libc::PACKET_VNET_HDR, 1)?;
    sys::set_option(&socket, libc::SOL_PACKET, libc::PACKET_AUXDATA, 1)?;
    sys::set_option(&socket, libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, 1)?;
    if options.bypass_qdisc {
        sys::set_option(&socket, libc::SOL_PACKET, libc::PACKET_QDISC_BYPASS, 1)?;
    }
    sys::enlarge_buffers(&socket, BUFFER)?;
    sys::join_promiscuous(&socket, interface)?;
    sys::bind_packet(&socket, interface)?;
    Ok(socket)
}

fn is_pause(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENETDOWN | libc::EAGAIN))
}

/// A packet socket whose device has gone is bound to interface -1.
fn device_exists(socket: &OwnedFd) -> bool {
    sys::packet_interface(socket).is_ok_and(|interface| interface > 0)
}

impl PortIo for PacketPort {
    fn port(&self) -> PortRef {
        self.port
    }

    fn limits(&self) -> PortIoLimits {
        self.limits
    }

    fn receive(&mut self, frames: &mut [Frame]) -> Result<usize> {
        let mut received = 0;
        while received < frames.len() {
            let asked = (frames.len() - received).min(BATCH);
            match self.receive_batch(&mut frames[received..]) {
                Ok(count) => {
                    received += self.finish(&mut frames[received..], count);
                    if count < asked {
                        break;
                    }
                }
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                Err(_) if received > 0 => break,
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) && !self.off => break,
                // Frames come again when it is switched on.
                Err(error) if is_pause(&error) && device_exists(&self.socket) => {
                    self.off = true;
                    break;
                }
                Err(error) => return Err(self.lost(error)),
            }
        }
        Ok(received)
    }

    fn transmit(&mut self, frames: &mut [Frame]) -> Result<usize> {
        let mut taken = 0;
        while taken < frames.len() {
            match self.transmit_batch(&frames[taken..]) {
                Ok(0) => break,
                Ok(count) => taken += count,
                Err(_) if taken > 0 => break,
                Err(error) => return Err(error),
            }
        }
        Ok(taken)
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.socket.as_fd())
    }

    fn refused(&self) -> u64 {
        self.refused
    }
}
