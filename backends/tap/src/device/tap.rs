//! [`TapPort`]: the descriptor side of a TAP device whose network device is the pod's VF.
//!
//! The TAP is *persistent*: it stays, with the pod's addresses and routes, when the process that holds the descriptor
//! dies; the next process attaches to it again by name, in whatever namespace it is by then (the emulated PCIe link). While
//! nobody is attached the pod sees no carrier.
//!
//! One read or write moves one frame or one super-frame of up to 64 KiB, the virtio-net header in front of it. Frames
//! sent to a network device that is down are lost, as on a wire without carrier. An attached descriptor keeps the
//! namespace alive in which it was opened: close the port before you wait for the namespace to vanish.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::thread;
use std::time::Duration;

use dpumesh_core::{Error, Frame, HEADROOM, Mtu, PortIo, PortIoLimits, PortRef, Result};
use dpumesh_hw::netns::Namespace;
use nix::sys::uio::{readv, writev};

use super::virtio::{self, HEADER};
use super::{io_error, offloading, open_error, refusal};
use crate::sys;

const CHECKSUM_AND_TSO: libc::c_uint =
    libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
/// Linux 6.2 and later.
const USO: libc::c_uint = libc::TUN_F_USO4 | libc::TUN_F_USO6;

/// The kernel closes a dead owner's descriptors a little after the owner is gone.
const ATTACH_ATTEMPTS: u32 = 100;
const ATTACH_PAUSE: Duration = Duration::from_millis(5);

/// Octets after which a batch ends: few enough to be in the processor's cache still when they are transmitted.
const BATCH_OCTETS: usize = 128 << 10;

/// Frames of one TAP.
#[derive(Debug)]
pub struct TapPort {
    port: PortRef,
    tun: File,
    limits: PortIoLimits,
    refused: u64,
    malformed: u64,
    without_carrier: u64,
}

/// Makes a persistent TAP called `name` (1 to 15 octets) in `namespace`, and leaves it there, down, with nobody attached.
/// Blocks for about a millisecond.
///
/// # Errors
/// `Exists` when an interface of this name is there already, `Denied` when `/dev/net/tun` cannot be opened, `Io` else.
pub fn create_tap(namespace: &Namespace, name: &str) -> Result<()> {
    const OPERATION: &str = "tap.create";
    let made = namespace.run(|| {
        if nix::net::if_::if_nametoindex(name).is_ok() {
            return Err(io::Error::from_raw_os_error(libc::EEXIST));
        }
        let tun = open_tun()?;
        sys::attach_tap(&tun, name)?;
        sys::set_tap_header(&tun, HEADER)?;
        sys::set_tap_persistent(&tun, true)
    });
    match made.map_err(|error| namespace_error(OPERATION, error))? {
        Ok(()) => Ok(()),
        Err(error) => Err(named(OPERATION, name, error)),
    }
}

impl TapPort {
    /// Attaches to the TAP `name` of `namespace`, whose MTU is `mtu`, as `port`.
    ///
    /// A dead owner's descriptor may linger: attaching is tried again for half a second, during which the call blocks.
    ///
    /// # Errors
    /// `NotFound` without such an interface, `Busy` when somebody else is attached, `Denied` when `/dev/net/tun` cannot be
    /// opened, `Io` else.
    pub fn attach(port: PortRef, namespace: &Namespace, name: &str, mtu: Mtu) -> Result<Self> {
        const OPERATION: &str = "ports.open";
        let attached = namespace.run(|| attach_existing(name));
        let attached = attached.map_err(|error| namespace_error(OPERATION, error))?;
        let (tun, uso) = attached.map_err(|error| named(OPERATION, name, error).object(port))?;
        let limits = offloading(mtu, uso);
        Ok(Self {
            port,
            tun,
            limits,
            refused: 0,
            malformed: 0,
            without_carrier: 0,
        })
    }

    /// Has the pod's kernel cut and sum every packet itself, and offers the dataplane no offload: a VF as plain as the
    /// cheapest card's. For a port that nobody uses yet: to its user, [`PortIo::limits`] are constant.
    ///
    /// # Errors
    /// `DeviceLost` when the network device has gone, `Io` else.
    pub fn withdraw_offloads(&mut self) -> Result<()> {
        sys::set_tap_offloads(&self.tun, 0)
            .map_err(|error| io_error("ports.open", "TAP", error).object(self.port))?;
        self.limits = PortIoLimits::plain(self.limits.mtu);
        Ok(())
    }

    /// Received frames that were dropped because their virtio-net header contradicted them.
    pub fn malformed(&self) -> u64 {
        self.malformed
    }

    /// Transmitted frames that were lost because the network device was down.
    pub fn without_carrier(&self) -> u64 {
        self.without_carrier
    }
}

/// In the thread's namespace. True: UDP super-frames are understood.
fn attach_existing(name: &str) -> io::Result<(File, bool)> {
    for attempt in 1.. {
        // Attaching makes a device that is not there: a VF must not be born by a look at it.
        nix::net::if_::if_nametoindex(name)?;
        let tun = open_tun()?;
        match sys::attach_tap(&tun, name) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && attempt < ATTACH_ATTEMPTS => {
                thread::sleep(ATTACH_PAUSE);
            }
            Err(error) => return Err(error),
            Ok(()) => {
                sys::set_tap_header(&tun, HEADER)?;
                return Ok((offer_offloads(&tun)?, tun)).map(|(uso, tun)| (tun, uso));
            }
        }
    }
    unreachable!("the loop returns on its last attempt")
}

fn offer_offloads(tun: &File) -> io::Result<bool> {
    match sys::set_tap_offloads(tun, CHECKSUM_AND_TSO | USO) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            sys::set_tap_offloads(tun, CHECKSUM_AND_TSO).map(|()| false)
        }
        result => result.map(|()| true),
    }
}

fn open_tun() -> io::Result<File> {
    let tun = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun");
    tun.map_err(|error| match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV) => io::Error::from_raw_os_error(libc::EOPNOTSUPP),
        _ => error,
    })
}

fn named(operation: &'static str, name: &str, error: io::Error) -> Error {
    open_error(operation, &format!("TAP {name}"), error)
}

fn namespace_error(operation: &'static str, error: dpumesh_hw::netns::NamespaceError) -> Error {
    Error::new(dpumesh_core::ErrorKind::Io, operation, error.to_string())
        .backend(crate::NAME)
        .source(error)
}

impl PortIo for TapPort {
    fn port(&self) -> PortRef {
        self.port
    }

    fn limits(&self) -> PortIoLimits {
        self.limits
    }

    fn receive(&mut self, frames: &mut [Frame]) -> Result<usize> {
        let (mut received, mut octets) = (0, 0);
        while let Some(frame) = frames.get_mut(received).filter(|_| octets < BATCH_OCTETS) {
            frame.reset(HEADROOM);
            let mut header = [0; HEADER];
            let len = match readv(
                &self.tun,
                &mut [
                    IoSliceMut::new(&mut header),
                    IoSliceMut::new(frame.receive_area()),
                ],
            ) {
                Ok(len) => len,
                Err(nix::Error::EAGAIN) => break,
                Err(nix::Error::EINTR) => continue,
                // Told by the next call, which fails the same way.
                Err(_) if received > 0 => break,
                Err(error) => return Err(io_error("port.receive", "TAP", error.into()).object(self.port)),
            };
            let whole = len.checked_sub(HEADER).is_some_and(|len| frame.set_len(len));
            if whole && virtio::decode(&header, frame).is_some() {
                octets += len;
                received += 1;
            } else {
                self.malformed += 1;
            }
        }
        Ok(received)
    }

    fn transmit(&mut self, frames: &mut [Frame]) -> Result<usize> {
        for (index, frame) in frames.iter().enumerate() {
            if refusal(&self.limits, frame).is_some() {
                self.refused += 1;
                continue;
            }
            let header = virtio::encode(frame);
            let parts = [IoSlice::new(&header), IoSlice::new(frame.octets())];
            let written = loop {
                match writev(&self.tun, &parts) {
                    Err(nix::Error::EINTR) => {}
                    result => break result,
                }
            };
            match written {
                Ok(_) => {}
                Err(nix::Error::EAGAIN | nix::Error::ENOBUFS | nix::Error::ENOMEM) => return Ok(index),
                Err(nix::Error::EIO) => self.without_carrier += 1,
                Err(nix::Error::EINVAL) => self.refused += 1,
                Err(_) if index > 0 => return Ok(index),
                Err(error) => return Err(io_error("port.transmit", "TAP", error.into()).object(self.port)),
            }
        }
        Ok(frames.len())
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.tun.as_fd())
    }

    fn refused(&self) -> u64 {
        self.refused
    }
}
