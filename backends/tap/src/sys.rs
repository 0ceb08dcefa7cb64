//! The system calls that no safe wrapper offers: TUN/TAP ioctls, AF_PACKET and UDP socket options, and batches of
//! messages with control data. The only unsafe code of this crate; every function here is safe to call.
//!
//! Addresses and control messages are written and read as octets, in the layout of `struct sockaddr_in{,6}` and
//! `struct cmsghdr`, so that no foreign union is ever interpreted in place.

#![allow(unsafe_code, reason = "this file is the crate's named home of unsafe code")]

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::{size_of, size_of_val, zeroed};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

/// Most messages of one [`receive_messages`] or [`send_messages`] call.
pub(crate) const BATCH: usize = 32;

/// Attaches an open `/dev/net/tun` to the TAP device `name` of the namespace in which it was opened; the device is
/// made when it is not there.
///
/// `EBUSY`: another descriptor is attached.
pub(crate) fn attach_tap(tun: &File, name: &str) -> io::Result<()> {
    // SAFETY: `ifreq` is plain data for which all zeros is valid.
    let mut request: libc::ifreq = unsafe { zeroed() };
    if name.is_empty() || name.len() >= request.ifr_name.len() || name.contains('\0') {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one `ifreq`, which lives on this stack frame.
    check(unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })
}

/// Sets the offloads (`TUN_F_…`) that the reader of an attached TAP accepts. `EINVAL`: one is not known.
pub(crate) fn set_tap_offloads(tun: &File, offloads: libc::c_uint) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes its argument by value.
    check(unsafe {
        libc::ioctl(
            tun.as_raw_fd(),
            libc::TUNSETOFFLOAD,
            libc::c_ulong::from(offloads),
        )
    })
}

/// Sets how many octets of virtio-net header stand before each frame of an attached TAP.
pub(crate) fn set_tap_header(tun: &File, octets: usize) -> io::Result<()> {
    let octets = octets as libc::c_int;
    // SAFETY: TUNSETVNETHDRSZ reads one int, which lives on this stack frame.
    check(unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const octets) })
}

/// Lets an attached TAP outlive its descriptors, or not.
pub(crate) fn set_tap_persistent(tun: &File, persistent: bool) -> io::Result<()> {
    // SAFETY: TUNSETPERSIST takes its argument by value.
    check(unsafe {
        libc::ioctl(
            tun.as_raw_fd(),
            libc::TUNSETPERSIST,
            libc::c_ulong::from(persistent),
        )
    })
}

/// Sets a socket option whose value is an int.
pub(crate) fn set_option(
    socket: impl AsFd,
    level: libc::c_int,
    option: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    set_raw_option(socket.as_fd(), level, option, &value)
}

/// Enlarges a socket's buffers to `octets`: beyond the system's limit where the process may, up to it where not.
pub(crate) fn enlarge_buffers(socket: impl AsFd, octets: usize) -> io::Result<()> {
    let octets = libc::c_int::try_from(octets).unwrap_or(libc::c_int::MAX);
    for (forced, ordinary) in [
        (libc::SO_RCVBUFFORCE, libc::SO_RCVBUF),
        (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF),
    ] {
        if set_option(&socket, libc::SOL_SOCKET, forced, octets).is_err() {
            set_option(&socket, libc::SOL_SOCKET, ordinary, octets)?;
        }
    }
    Ok(())
}

/// Makes an AF_PACKET socket receive frames for any MAC address on an interface, while it is open.
pub(crate) fn join_promiscuous(socket: impl AsFd, interface: u32) -> io::Result<()> {
    let membership = libc::packet_mreq {
        mr_ifindex: interface as libc::c_int,
        mr_type: libc::PACKET_MR_PROMISC as libc::c_ushort,
        mr_alen: 0,
        mr_address: [0; 8],
    };
    set_raw_option(
        socket.as_fd(),
        libc::SOL_PACKET,
        libc::PACKET_ADD_MEMBERSHIP,
        &membership,
    )
}

/// Binds an AF_PACKET socket to an interface and starts reception of every protocol.
pub(crate) fn bind_packet(socket: impl AsFd, interface: u32) -> io::Result<()> {
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as libc::c_ushort,
        sll_protocol: (libc::ETH_P_ALL as u16).to_be(),
        sll_ifindex: interface as libc::c_int,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let length = size_of_val(&address) as libc::socklen_t;
    // SAFETY: the kernel reads `length` octets of `address`, which is exactly that long.
    check(unsafe { libc::bind(socket.as_fd().as_raw_fd(), (&raw const address).cast(), length) })
}

/// Number of the interface that an AF_PACKET socket is bound to; negative once that interface has gone.
pub(crate) fn packet_interface(socket: impl AsFd) -> io::Result<libc::c_int> {
    // SAFETY: `sockaddr_ll` is plain data for which all zeros is valid.
    let mut address: libc::sockaddr_ll = unsafe { zeroed() };
    let mut length = size_of_val(&address) as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` octets into `address`, which is exactly that long.
    check(unsafe {
        libc::getsockname(
            socket.as_fd().as_raw_fd(),
            (&raw mut address).cast(),
            &raw mut length,
        )
    })?;
    Ok(address.sll_ifindex)
}

/// `T` is plain data without padding that the option's definition names.
fn set_raw_option<T: Copy>(
    socket: BorrowedFd<'_>,
    level: libc::c_int,
    option: libc::c_int,
    value: &T,
) -> io::Result<()> {
    let length = size_of::<T>() as libc::socklen_t;
    // SAFETY: the kernel reads at most `length` octets of `value`, which is exactly that long.
    check(unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            std::ptr::from_ref(value).cast(),
            length,
        )
    })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// A number at the beginning of a file that several processes have mapped: all see what one stores, without a system
/// call.
#[derive(Debug)]
pub(crate) struct SharedNumber {
    at: NonNull<AtomicU64>,
}

/// What is mapped of the file. The kernel maps whole pages anyway.
const MAPPED: usize = 4096;

impl SharedNumber {
    /// Maps the file, which is made one page long.
    ///
    /// Whoever may write to the file may change the number at any time; who shortens it ends the processes that
    /// have it mapped. It therefore belongs to one user, as the directory it is in.
    pub(crate) fn map(file: &File) -> io::Result<Self> {
        file.set_len(MAPPED as u64)?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at a place of the kernel's choice touches no memory that anybody uses.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                MAPPED,
                protection,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        NonNull::new(at.cast())
            .map(|at| Self { at })
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EFAULT))
    }

    pub(crate) fn load(&self) -> u64 {
        self.word().load(Ordering::Acquire)
    }

    pub(crate) fn store(&self, number: u64) {
        self.word().store(number, Ordering::Release);
    }

    fn word(&self) -> &AtomicU64 {
        // SAFETY: `at` is the beginning of a mapping (so aligned to a page) that lives as long as `self`; it is only ever
        // accessed as an atomic, by every process that maps it, and every bit pattern is a number.
        unsafe { self.at.as_ref() }
    }
}

// SAFETY: the mapping belongs to the process, not to a thread, and is only accessed atomically.
unsafe impl Send for SharedNumber {}
// SAFETY: as above; shared access is what it is for.
unsafe impl Sync for SharedNumber {}

impl Drop for SharedNumber {
    fn drop(&mut self) {
        // SAFETY: `map` made exactly this mapping, and nobody refers to it any more. It cannot fail then.
        unsafe { libc::munmap(self.at.as_ptr().cast(), MAPPED) };
    }
}

/// What a message carries beside its octets. Written by [`receive_messages`], or by the caller for [`send_messages`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Envelope {
    /// Octets of the message.
    pub(crate) len: usize,
    /// The message was longer than its buffers.
    pub(crate) truncated: bool,
    name: Name,
    name_len: u32,
    control: Control,
    control_len: usize,
}

/// Octets of a `struct sockaddr_in6` or shorter, rounded up.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(8))]
struct Name([u8; 32]);

/// Room for four small control messages.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(8))]
struct Control([u8; 128]);

/// `struct cmsghdr` on every Linux ABI: length as `size_t`, level, type; data follows at once.
const CONTROL_HEADER: usize = size_of::<usize>() + 8;

impl Envelope {
    /// Nothing beside the octets.
    pub(crate) const EMPTY: Self = Self {
        len: 0,
        truncated: false,
        name: Name([0; 32]),
        name_len: 0,
        control: Control([0; 128]),
        control_len: 0,
    };

    /// Who sent the message; `None` when the kernel gave no IP address.
    pub(crate) fn source(&self) -> Option<SocketAddr> {
        let octets = self.name.0.get(..self.name_len as usize)?;
        let family = u16::from_ne_bytes(array(octets, 0)?);
        let port = u16::from_be_bytes(array(octets, 2)?);
        match libc::c_int::from(family) {
            libc::AF_INET => Some((Ipv4Addr::from(array::<4>(octets, 4)?), port).into()),
            libc::AF_INET6 => Some((Ipv6Addr::from(array::<16>(octets, 8)?), port).into()),
            _ => None,
        }
    }

    /// Says where the message goes.
    pub(crate) fn set_destination(&mut self, to: SocketAddr) {
        let name = &mut self.name.0;
        name.fill(0);
        name[2..4].copy_from_slice(&to.port().to_be_bytes());
        let (family, length) = match to {
            SocketAddr::V4(to) => {
                name[4..8].copy_from_slice(&to.ip().octets());
                (libc::AF_INET, size_of::<libc::sockaddr_in>())
            }
            SocketAddr::V6(to) => {
                name[8..24].copy_from_slice(&to.ip().octets());
                name[24..28].copy_from_slice(&to.scope_id().to_ne_bytes());
                (libc::AF_INET6, size_of::<libc::sockaddr_in6>())
            }
        };
        name[..2].copy_from_slice(&(family as u16).to_ne_bytes());
        self.name_len = length as u32;
    }

    /// Data of the first control message of this kind.
    pub(crate) fn control(&self, level: libc::c_int, kind: libc::c_int) -> Option<&[u8]> {
        let mut rest = self.control.0.get(..self.control_len)?;
        while let Some(header) = rest.get(..CONTROL_HEADER) {
            let len = usize::from_ne_bytes(array(header, 0)?);
            let found_level = libc::c_int::from_ne_bytes(array(header, size_of::<usize>())?);
            let found_kind = libc::c_int::from_ne_bytes(array(header, size_of::<usize>() + 4)?);
            let data = rest.get(CONTROL_HEADER..len)?;
            if (found_level, found_kind) == (level, kind) {
                return Some(data);
            }
            rest = rest.get(aligned(len)..)?;
        }
        None
    }

    /// Adds a control message of up to eight octets. False when there is no more room.
    pub(crate) fn push_control(&mut self, level: libc::c_int, kind: libc::c_int, data: &[u8]) -> bool {
        let len = CONTROL_HEADER + data.len();
        let Some(room) = self
            .control
            .0
            .get_mut(self.control_len..self.control_len + aligned(len))
        else {
            return false;
        };
        room.fill(0);
        room[..size_of::<usize>()].copy_from_slice(&len.to_ne_bytes());
        room[size_of::<usize>()..][..4].copy_from_slice(&level.to_ne_bytes());
        room[size_of::<usize>() + 4..][..4].copy_from_slice(&kind.to_ne_bytes());
        room[CONTROL_HEADER..len].copy_from_slice(data);
        self.control_len += aligned(len);
        true
    }
}

/// Control messages begin at multiples of the word size.
const fn aligned(len: usize) -> usize {
    len.next_multiple_of(size_of::<usize>())
}

fn array<const N: usize>(octets: &[u8], at: usize) -> Option<[u8; N]> {
    octets.get(at..)?.first_chunk().copied()
}

/// Receives up to [`BATCH`] messages in one call without waiting: message `i` fills `slices[i * per_message..]`, and
/// `envelopes[i]` tells about it. Returns how many came.
///
/// # Panics
/// Never: surplus slices and envelopes are left alone.
pub(crate) fn receive_messages(
    socket: impl AsFd,
    slices: &mut [IoSliceMut<'_>],
    per_message: usize,
    envelopes: &mut [Envelope],
) -> io::Result<usize> {
    let count = (slices.len() / per_message.max(1))
        .min(envelopes.len())
        .min(BATCH);
    // SAFETY: `mmsghdr` is plain data for which all zeros is valid.
    let mut messages: [libc::mmsghdr; BATCH] = unsafe { zeroed() };
    for (index, (message, envelope)) in messages
        .iter_mut()
        .zip(envelopes.iter_mut())
        .take(count)
        .enumerate()
    {
        let parts = &mut slices[index * per_message..(index + 1) * per_message];
        let header = &mut message.msg_hdr;
        // `IoSliceMut` is ABI compatible with `iovec` on Unix, says its documentation.
        header.msg_iov = parts.as_mut_ptr().cast();
        header.msg_iovlen = per_message as _;
        header.msg_name = envelope.name.0.as_mut_ptr().cast();
        header.msg_namelen = size_of::<Name>() as libc::socklen_t;
        header.msg_control = envelope.control.0.as_mut_ptr().cast();
        header.msg_controllen = size_of::<Control>() as _;
    }
    // SAFETY: the first `count` headers point to iovecs, names and control buffers with their true lengths, all
    // borrowed exclusively by this call; the kernel writes inside them and keeps no pointer.
    let received = unsafe {
        libc::recvmmsg(
            socket.as_fd().as_raw_fd(),
            messages.as_mut_ptr(),
            count as libc::c_uint,
            libc::MSG_DONTWAIT as _,
            std::ptr::null_mut(),
        )
    };
    check(received)?;
    let received = received as usize;
    for (message, envelope) in messages.iter().zip(envelopes.iter_mut()).take(received) {
        envelope.len = message.msg_len as usize;
        envelope.truncated = message.msg_hdr.msg_flags & libc::MSG_TRUNC != 0;
        envelope.name_len = message.msg_hdr.msg_namelen;
        envelope.control_len = usize_of(message.msg_hdr.msg_controllen).min(size_of::<Control>());
    }
    Ok(received)
}

/// Sends up to [`BATCH`] messages in one call without waiting: message `i` is the concatenation of
/// `slices[parts[i]]`, addressed by `envelopes[i]`. Returns how many were taken, at least one.
pub(crate) fn send_messages(
    socket: impl AsFd,
    slices: &[IoSlice<'_>],
    parts: &[Range<usize>],
    envelopes: &[Envelope],
) -> io::Result<usize> {
    let count = parts.len().min(envelopes.len()).min(BATCH);
    // SAFETY: `mmsghdr` is plain data for which all zeros is valid.
    let mut messages: [libc::mmsghdr; BATCH] = unsafe { zeroed() };
    for ((message, envelope), parts) in messages.iter_mut().zip(envelopes).zip(parts).take(count) {
        let parts = slices.get(parts.clone()).unwrap_or_default();
        let header = &mut message.msg_hdr;
        // `IoSlice` is ABI compatible with `iovec` on Unix, says its documentation; sending only reads.
        header.msg_iov = parts.as_ptr().cast_mut().cast();
        header.msg_iovlen = parts.len() as _;
        if envelope.name_len > 0 {
            header.msg_name = envelope.name.0.as_ptr().cast_mut().cast();
            header.msg_namelen = envelope.name_len;
        }
        if envelope.control_len > 0 {
            header.msg_control = envelope.control.0.as_ptr().cast_mut().cast();
            header.msg_controllen = envelope.control_len as _;
        }
    }
    // SAFETY: the first `count` headers point to iovecs, names and control messages with their true lengths, all
    // borrowed for this call; the kernel only reads them (it writes `msg_len`, in `messages`) and keeps no pointer.
    let sent = unsafe {
        libc::sendmmsg(
            socket.as_fd().as_raw_fd(),
            messages.as_mut_ptr(),
            count as libc::c_uint,
            libc::MSG_DONTWAIT as _,
        )
    };
    check(sent)?;
    Ok(sent as usize)
}

/// `msg_controllen` is a `size_t` in glibc's headers and a 32-bit number in musl's.
fn usize_of(len: impl TryInto<usize>) -> usize {
    len.try_into().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::UdpSocket;

    #[test]
    fn messages_travel_with_addresses_and_control_data() {
        for any in ["127.0.0.1:0", "[::1]:0"] {
            let from = UdpSocket::bind(any).expect("bound");
            let to = UdpSocket::bind(any).expect("bound");
            let mut envelope = Envelope::EMPTY;
            envelope.set_destination(to.local_addr().expect("bound"));
            let size = 4u16;
            assert!(envelope.push_control(libc::SOL_UDP, libc::UDP_SEGMENT, &size.to_ne_bytes()));
            let slices = [IoSlice::new(b"abc"), IoSlice::new(b"defgh")];
            assert_eq!(
                send_messages(&from, &slices, std::slice::from_ref(&(0..2)), &[envelope]).expect("sent"),
                1
            );
            let (mut one, mut two) = ([0; 16], [0; 16]);
            let mut envelopes = [Envelope::EMPTY; 4];
            let mut buffers = [IoSliceMut::new(&mut one), IoSliceMut::new(&mut two)];
            assert_eq!(
                receive_messages(&to, &mut buffers, 1, &mut envelopes).expect("received"),
                2
            );
            assert_eq!((envelopes[0].len, envelopes[1].len), (4, 4));
            assert_eq!(envelopes[0].source(), Some(from.local_addr().expect("bound")));
            assert_eq!((&one[..4], &two[..4]), (&b"abcd"[..], &b"efgh"[..]));
        }
    }

    #[test]
    fn a_number_is_shared_by_all_mappings() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("number");
        let open = || {
            File::options()
                .create(true)
                .truncate(false)
                .read(true)
                .write(true)
                .open(&path)
                .expect("opened")
        };
        let (one, two) = (
            SharedNumber::map(&open()).expect("mapped"),
            SharedNumber::map(&open()).expect("mapped"),
        );
        assert_eq!(two.load(), 0);
        one.store(7);
        assert_eq!(two.load(), 7);
        drop((one, two));
        assert_eq!(SharedNumber::map(&open()).expect("mapped").load(), 7);
    }

    #[test]
    fn control_data_is_read_back_and_truncations_end_the_search() {
        let mut envelope = Envelope::EMPTY;
        for kind in 1..=4 {
            assert!(envelope.push_control(7, kind, &[kind as u8; 8]));
        }
        assert!(envelope.push_control(7, 5, &[5; 8]));
        assert!(!envelope.push_control(7, 6, &[6; 8]), "full");
        assert_eq!(envelope.control(7, 4), Some(&[4; 8][..]));
        assert_eq!(envelope.control(7, 6), None);
        for len in 0..envelope.control_len {
            let mut cut = envelope;
            cut.control_len = len;
            assert!(cut.control(7, 9).is_none());
        }
    }
}
