//! The two kinds of socket of the kernel engine. Both are made in the calling thread's namespace.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};

use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};

use crate::stream::{Families, ListenOptions};

/// A listener that takes connections to addresses that are not this machine's. The accepted socket's local address
/// is where the client wanted to go, its peer the client; a listener for both families reports IPv4 as IPv4-mapped
/// IPv6. It does not block, and neither accepted sockets nor it delay small segments (TCP_NODELAY).
///
/// # Errors
/// EADDRINUSE if the port is taken and not shared; EPERM without CAP_NET_ADMIN.
pub fn transparent_listener(options: &ListenOptions) -> io::Result<TcpListener> {
    let address: IpAddr = match options.families {
        Families::V4 => Ipv4Addr::UNSPECIFIED.into(),
        Families::V6 | Families::Both => Ipv6Addr::UNSPECIFIED.into(),
    };
    let address = SocketAddr::new(address, options.port);
    let socket = transparent_socket(&address)?;
    if address.is_ipv6() {
        socket.set_only_v6(options.families == Families::V6)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(options.reuse_port)?;
    socket.bind(&address.into())?;
    socket.listen(i32::try_from(options.backlog).unwrap_or(i32::MAX))?;
    Ok(socket.into())
}

/// Starts a connection from `source` (any address, with whatever port is free for this endpoint) to `destination`.
/// It does not block: the stream is still connecting. It is there when it is writable and `take_error` has none.
///
/// # Errors
/// EADDRNOTAVAIL: no source port is left; ENETUNREACH: no route; EPERM without CAP_NET_ADMIN; EINVAL: `source` and
/// `destination` are of different families.
pub fn connect_from(source: IpAddr, destination: SocketAddr) -> io::Result<TcpStream> {
    if source.is_ipv4() != destination.is_ipv4() {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let socket = transparent_socket(&destination)?;
    // The port is chosen when connecting, so that it need only be free towards this endpoint.
    setsockopt(&socket, sockopt::IpBindAddressNoPort, &true)?;
    socket.bind(&SocketAddr::new(source, 0).into())?;
    match socket.connect(&destination.into()) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
        _ => Ok(socket.into()),
    }
}

/// A TCP socket of `like`'s family that may have foreign addresses.
fn transparent_socket(like: &SocketAddr) -> io::Result<Socket> {
    let kind = Type::STREAM.nonblocking().cloexec();
    let socket = Socket::new(Domain::for_address(*like), kind, Some(Protocol::TCP))?;
    if like.is_ipv4() {
        socket.set_ip_transparent_v4(true)?;
    } else {
        socket.set_ip_transparent_v6(true)?;
    }
    socket.set_tcp_nodelay(true)?;
    Ok(socket)
}
