//! The sockets of the kernel engine, made in the calling thread's namespace, and what an accepted one tells.
//!
//! [`listen`] and [`connect`] also make sockets that are not transparent: a proxy has those beside the others.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};

use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::net::TcpStream;

use crate::stream::{Families, IngressPort, ListenOptions};

/// How a listening socket is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketOptions {
    /// Take connections to addresses that are not this machine's (`IP_TRANSPARENT`).
    pub transparent: bool,
    /// Listen on an address that is not there yet (`IP_FREEBIND`).
    pub freebind: bool,
    /// Let an IPv6 socket take IPv4 as well, reported as IPv4-mapped IPv6.
    pub dual_stack: bool,
    /// Share the port with other sockets that say so too (`SO_REUSEPORT`).
    pub reuse_port: bool,
    /// Length of the accept queue, connections. The kernel caps it at `net.core.somaxconn`.
    pub backlog: u32,
}

/// Opens a listening socket. It does not block, and neither accepted sockets nor it delay small segments (TCP_NODELAY).
///
/// # Errors
/// EADDRINUSE if the port is taken and not shared; EADDRNOTAVAIL for an address of somebody else; EPERM for a
/// transparent one without CAP_NET_ADMIN.
pub fn listen(address: SocketAddr, options: SocketOptions) -> io::Result<TcpListener> {
    let socket = socket(&address)?;
    if options.transparent {
        set_transparent(&socket, address.ip())?;
    }
    match (options.freebind, address.is_ipv4()) {
        (true, true) => socket.set_freebind_v4(true)?,
        (true, false) => socket.set_freebind_v6(true)?,
        (false, _) => {}
    }
    if address.is_ipv6() {
        socket.set_only_v6(!options.dual_stack)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(options.reuse_port)?;
    socket.bind(&address.into())?;
    socket.listen(i32::try_from(options.backlog).unwrap_or(i32::MAX))?;
    Ok(socket.into())
}

/// A listener that takes connections to addresses that are not this machine's. The accepted socket's local address
/// is where the client wanted to go, its peer the client; a listener for both families reports IPv4 as IPv4-mapped
/// IPv6.
///
/// # Errors
/// As [`listen`].
pub fn transparent_listener(options: &ListenOptions) -> io::Result<TcpListener> {
    let address: IpAddr = match options.families {
        Families::V4 => Ipv4Addr::UNSPECIFIED.into(),
        Families::V6 | Families::Both => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = SocketOptions {
        transparent: true,
        freebind: false,
        dual_stack: options.families == Families::Both,
        reuse_port: options.reuse_port,
        backlog: options.backlog,
    };
    listen(SocketAddr::new(address, options.port), socket)
}

/// As whom a connection is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Origin {
    /// The address it leaves with, anybody's; the port is whichever is free for this endpoint.
    pub ip: IpAddr,
    /// `SO_MARK` of its packets; 0 sets none.
    pub mark: u32,
}

impl From<IpAddr> for Origin {
    fn from(ip: IpAddr) -> Self {
        Self { ip, mark: 0 }
    }
}

/// Connects to `destination`, as this machine or as `origin`. Small segments are not delayed (TCP_NODELAY).
///
/// # Errors
/// The endpoint's refusal, no way there; and as [`connect_from`].
pub async fn connect(destination: SocketAddr, origin: Option<Origin>) -> io::Result<TcpStream> {
    let Some(origin) = origin else {
        let stream = TcpStream::connect(destination).await?;
        stream.set_nodelay(true)?;
        return Ok(stream);
    };
    let stream = TcpStream::from_std(connect_from(origin, destination)?)?;
    stream.writable().await?;
    stream.take_error()?.map_or(Ok(stream), Err)
}

/// Starts a connection from `origin` to `destination`. It does not block: the stream is still connecting. It is there
/// when it is writable and `take_error` has none.
///
/// # Errors
/// EADDRNOTAVAIL: no source port is left; ENETUNREACH: no route; EPERM without CAP_NET_ADMIN; EINVAL: `origin` and
/// `destination` are of different families (another address instead would make the client somebody else).
pub fn connect_from(origin: Origin, destination: SocketAddr) -> io::Result<std::net::TcpStream> {
    if origin.ip.is_ipv4() != destination.is_ipv4() {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let socket = socket(&destination)?;
    set_transparent(&socket, origin.ip)?;
    if origin.mark != 0 {
        socket.set_mark(origin.mark)?;
    }
    // The port is chosen when connecting, so that it need only be free towards this endpoint.
    setsockopt(&socket, sockopt::IpBindAddressNoPort, &true)?;
    socket.bind(&SocketAddr::new(origin.ip, 0).into())?;
    match socket.connect(&destination.into()) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
        _ => Ok(socket.into()),
    }
}

/// The port that an accepted connection's first packet came in by. True only in a stack namespace: there the
/// interception sets the packet's mark to it and the kernel hands the mark on to the socket; elsewhere a mark is
/// whatever rules of others set. One system call.
///
/// # Errors
/// What the kernel says; none is known for an open socket.
pub fn ingress(stream: &TcpStream) -> io::Result<Option<IngressPort>> {
    Ok(IngressPort::new(SockRef::from(stream).mark()?))
}

/// The address that the client of an accepted connection meant: what a NAT rule noted, else the socket's own address,
/// which is `local`.
pub fn original_destination(stream: &TcpStream, local: SocketAddr) -> SocketAddr {
    let socket = SockRef::from(stream);
    let noted = if local.is_ipv6() {
        socket.original_dst_v6()
    } else {
        socket.original_dst_v4()
    };
    noted
        .ok()
        .and_then(|address| address.as_socket())
        .unwrap_or(local)
}

/// A TCP socket of `like`'s family that does not block and does not delay small segments.
fn socket(like: &SocketAddr) -> io::Result<Socket> {
    let kind = Type::STREAM.nonblocking().cloexec();
    let socket = Socket::new(Domain::for_address(*like), kind, Some(Protocol::TCP))?;
    socket.set_tcp_nodelay(true)?;
    Ok(socket)
}

fn set_transparent(socket: &Socket, ip: IpAddr) -> io::Result<()> {
    if ip.is_ipv4() {
        socket.set_ip_transparent_v4(true)
    } else {
        socket.set_ip_transparent_v6(true)
    }
}
