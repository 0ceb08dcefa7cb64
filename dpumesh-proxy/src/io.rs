//! The sockets' seam: transparent listeners, connections bound to a client's address, entering a network namespace.
//!
//! Everything that touches socket options is here; the rest of the proxy sees std and tokio types.

use std::fs::File;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::path::Path;

use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, SockRef, Socket, Type};
use tokio::net::{TcpSocket, TcpStream};

use crate::config::model::SocketOptions;

/// Moves the calling thread into the network namespace at `path`.
///
/// # Errors
/// The file cannot be opened, is no namespace, or the right to enter it is missing.
pub fn enter_netns(path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    setns(file, CloneFlags::CLONE_NEWNET).map_err(io::Error::from)
}

/// Opens one listening socket, non-blocking.
///
/// # Errors
/// What the kernel says; the address in use, the right for transparent sockets missing.
pub fn listen(address: SocketAddr, options: SocketOptions) -> io::Result<TcpListener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM.nonblocking().cloexec(),
        None,
    )?;
    socket.set_reuse_address(true)?;
    if options.reuse_port {
        socket.set_reuse_port(true)?;
    }
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    if options.transparent {
        set_transparent(&socket, address.ip())?;
    }
    if options.freebind {
        if address.is_ipv6() {
            socket.set_freebind_v6(true)?
        } else {
            socket.set_freebind_v4(true)?
        }
    }
    socket.bind(&address.into())?;
    socket.listen(i32::try_from(options.backlog).unwrap_or(i32::MAX))?;
    Ok(socket.into())
}

/// Connects to `to`; with `source` the connection leaves with that address (a port of the kernel's choice) and `mark`.
///
/// # Errors
/// `source` is of another family than `to`; else what the kernel says.
pub async fn connect(to: SocketAddr, source: Option<Source>) -> io::Result<TcpStream> {
    let stream = match source {
        None => TcpStream::connect(to).await?,
        Some(source) if source.ip.is_ipv4() != to.is_ipv4() => {
            // Leaving with an address of our own instead would make the client somebody else.
            return Err(io::Error::new(
                io::ErrorKind::AddrNotAvailable,
                "the client's address is of another family",
            ));
        }
        Some(source) => {
            let socket = Socket::new(
                Domain::for_address(to),
                Type::STREAM.nonblocking().cloexec(),
                None,
            )?;
            if source.mark != 0 {
                socket.set_mark(source.mark)?;
            }
            set_transparent(&socket, source.ip)?;
            setsockopt(&socket, sockopt::IpBindAddressNoPort, &true)?;
            socket.bind(&SocketAddr::new(source.ip, 0).into())?;
            TcpSocket::from_std_stream(socket.into()).connect(to).await?
        }
    };
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// The address (and mark) an upstream connection is to leave with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Source {
    /// The client's address.
    pub ip: IpAddr,
    /// `SO_MARK`; 0 sets none.
    pub mark: u32,
}

/// The address the client meant: what a NAT rule noted, else (transparent sockets) the socket's own.
pub fn original_destination(stream: &TcpStream, local: SocketAddr) -> SocketAddr {
    let socket = SockRef::from(stream);
    let noted = if local.is_ipv6() {
        socket.original_dst_v6()
    } else {
        socket.original_dst_v4()
    };
    noted.ok().and_then(|a| a.as_socket()).unwrap_or(local)
}

/// Whether an idle connection is still open and silent. One system call.
pub fn is_idle_alive(stream: &TcpStream) -> bool {
    let mut byte = [std::mem::MaybeUninit::uninit()];
    let peeked = SockRef::from(stream).peek(&mut byte);
    matches!(peeked, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
}

/// Makes closing the connection send a RST.
pub fn reset_on_close(stream: &TcpStream) {
    // A connection that is gone already needs no RST.
    let _ = SockRef::from(stream).set_linger(Some(std::time::Duration::ZERO));
}

fn set_transparent(socket: &Socket, ip: IpAddr) -> io::Result<()> {
    if ip.is_ipv6() {
        socket.set_ip_transparent_v6(true)
    } else {
        socket.set_ip_transparent_v4(true)
    }
}
