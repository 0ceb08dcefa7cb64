//! Where the proxy gets its TCP streams from.
//!
//! A [`StreamEngine`] turns the frames that the dataplane steers to the proxy into byte streams, and the proxy's own
//! connections into frames. Before it: the dataplane, which sends every TCP packet of an intercepted VF here. After
//! it: the proxy's listeners; what they connect to leaves through the engine and goes back to the dataplane.
//!
//! The contract, for every engine:
//!
//! * **Transparent.** An accepted stream carries the client's own address and the address it wanted to reach; a
//!   connection made with a source leaves with that pod's address.
//! * **Identity is the port.** [`Accepted::ingress`] says by which port the first packet came in. The dataplane
//!   vouches for it and for the source address; the engine takes it from nothing that the pod can write.
//! * **Closed.** With no listener, a client is refused with a RST, at once. What is not TCP never reaches a socket.
//! * **Back-pressure.** A stream that is not read closes its window; a writer that is not drained is not ready.
//! * **Half-close.** Shutting down the write side sends a FIN and leaves reading open; [`Stream::abort`] sends a RST.
//! * **Threads.** Every worker calls [`StreamEngine::enter_worker`] once before anything else (with a runtime of
//!   several threads: in its `on_thread_start`). Listeners and streams belong to the runtime they were made on.
//!
//! [`kernel`] is the engine made of the kernel's TCP in a private network namespace. Another engine (a TCP state
//! machine in user space, byte streams over shared memory) brings its streams as [`EngineStream`].

#![forbid(unsafe_code)]

mod error;
pub mod kernel;

use std::fmt;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::task::{Context, Poll};

use async_trait::async_trait;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

pub use error::{StreamError, StreamErrorKind};

/// A source of intercepted streams and a way out for the proxy's own.
#[async_trait]
pub trait StreamEngine: Send + Sync + fmt::Debug {
    /// Its name in configuration, logs and figures: `kernel`, `user`.
    fn name(&self) -> &'static str;

    /// Makes the calling thread able to listen and connect; once per worker, before its runtime does anything.
    /// Doing it again is harmless.
    ///
    /// # Errors
    /// If the thread cannot be given what it needs; it must not serve then.
    fn enter_worker(&self) -> Result<(), StreamError>;

    /// Opens a transparent listener. From here on, intercepted connections are accepted and wait in its queue.
    /// Several listeners on one port share the connections if all of them ask for it.
    /// Does not block; must be called on the runtime that will use it.
    ///
    /// # Errors
    /// `NotEntered`, `PortInUse`, or what the system says.
    fn listen(&self, options: &ListenOptions) -> Result<Box<dyn StreamListener>, StreamError>;

    /// Opens a connection. Dropping the future before it is done gives the attempt up and leaves nothing behind;
    /// there is no timeout of the engine's own besides TCP's.
    ///
    /// If source and destination are the same address (a pod reaching itself through its service), the engine uses
    /// its reserved node-local source instead: a packet from a pod to itself cannot be carried.
    ///
    /// # Errors
    /// Each has its [`StreamErrorKind`]: the peer's refusal, no way there, no source port left, and so on.
    async fn connect(&self, request: &ConnectRequest) -> Result<Stream, StreamError>;
}

/// A transparent listener.
pub trait StreamListener: Send + fmt::Debug {
    /// The next intercepted connection. An error that [is transient](StreamError::is_transient) (descriptors have
    /// run out, the client is gone already) leaves the listener usable; the caller waits a little before it polls again.
    fn poll_accept(&mut self, context: &mut Context<'_>) -> Poll<Result<Accepted, StreamError>>;

    /// The port it listens on.
    fn port(&self) -> u16;
}

/// Comfort for users of a listener.
pub trait StreamListenerExt: StreamListener {
    /// Waits for the next intercepted connection. Cancelling loses none.
    fn accept(&mut self) -> impl Future<Output = Result<Accepted, StreamError>> {
        poll_fn(|context| self.poll_accept(context))
    }
}

impl<T: StreamListener + ?Sized> StreamListenerExt for T {}

/// What to listen on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListenOptions {
    /// The TCP port that intercepted connections are directed to.
    pub port: u16,
    /// Which address families.
    pub families: Families,
    /// Share the port with other listeners that say so too; the engine spreads connections over them.
    pub reuse_port: bool,
    /// Longest queue of connections not yet accepted. The kernel caps it at `net.core.somaxconn`.
    pub backlog: u32,
}

impl ListenOptions {
    /// Both families, shared port, a queue of 4096.
    pub fn new(port: u16) -> Self {
        Self {
            port,
            families: Families::Both,
            reuse_port: true,
            backlog: 4096,
        }
    }
}

/// Address families of a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Families {
    /// IPv4 only.
    V4,
    /// IPv6 only.
    V6,
    /// Both; addresses are reported in their own family, never as IPv4-mapped IPv6.
    Both,
}

/// Where to connect to and as whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ConnectRequest {
    /// The pod on whose behalf; `None`: the node itself, from its reserved local source.
    pub source: Option<IpAddr>,
    /// The endpoint.
    pub destination: SocketAddr,
}

/// An intercepted connection.
#[derive(Debug)]
pub struct Accepted {
    /// Its bytes.
    pub stream: Stream,
    /// The client.
    pub source: SocketAddr,
    /// Where the client wanted to go.
    pub original_destination: SocketAddr,
    /// The port its first packet came in by; `None` if the dataplane did not say: nothing may be assumed about the
    /// client then.
    pub ingress: Option<IngressPort>,
}

/// Number of the dataplane port that a packet came in by, as the dataplane and the proxy agree on it; never 0.
///
/// On the way to the kernel engine it travels in the Ethernet source address of the frame: two fixed octets and the
/// number in network byte order, a locally administered unicast address.
///
/// ```
/// use dpumesh_hw::stream::IngressPort;
///
/// let port = IngressPort::new(0x0102).expect("not 0");
/// assert_eq!(port.to_mac(), [0x02, 0xd9, 0, 0, 1, 2]);
/// assert_eq!(IngressPort::from_mac([0x02, 0xd9, 0, 0, 1, 2]), Some(port));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct IngressPort(std::num::NonZeroU32);

impl IngressPort {
    /// The fixed octets of the address that carries a port.
    pub const MAC_PREFIX: [u8; 2] = [0x02, 0xd9];

    /// The port with this number; `None` for 0, which means "unknown" on the wire.
    pub fn new(number: u32) -> Option<Self> {
        std::num::NonZeroU32::new(number).map(Self)
    }

    /// The number.
    pub fn get(self) -> u32 {
        self.0.get()
    }

    /// The Ethernet source address that carries it.
    pub fn to_mac(self) -> [u8; 6] {
        let [a, b, c, d] = self.get().to_be_bytes();
        [Self::MAC_PREFIX[0], Self::MAC_PREFIX[1], a, b, c, d]
    }

    /// Reads it back; `None` if the address carries none.
    pub fn from_mac(mac: [u8; 6]) -> Option<Self> {
        let [first, second, number @ ..] = mac;
        if [first, second] != Self::MAC_PREFIX {
            return None;
        }
        Self::new(u32::from_be_bytes(number))
    }
}

impl fmt::Display for IngressPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "port {}", self.get())
    }
}

/// A byte stream of either kind. The kernel's is named, so that the common case costs no indirect call.
#[derive(Debug)]
pub enum Stream {
    /// A socket of the kernel's.
    Kernel(TcpStream),
    /// Another engine's.
    Engine(Box<dyn EngineStream>),
}

/// A byte stream of an engine other than the kernel.
///
/// Reading and writing follow tokio's traits; `poll_shutdown` sends a FIN and leaves reading open. Dropping it closes
/// in order if everything written has been taken over, with a RST otherwise.
pub trait EngineStream: AsyncRead + AsyncWrite + Send + Unpin + fmt::Debug {
    /// Closes at once with a RST; what was not sent yet is lost.
    fn abort(self: Box<Self>);
}

impl Stream {
    /// Closes at once with a RST; what was not sent yet is lost.
    pub fn abort(self) {
        match self {
            // If the option cannot be set the peer is gone, and closing says all there is to say.
            Self::Kernel(stream) => drop(stream.set_zero_linger()),
            Self::Engine(stream) => stream.abort(),
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Kernel(stream) => Pin::new(stream).poll_read(context, buffer),
            Self::Engine(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, octets: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Kernel(stream) => Pin::new(stream).poll_write(context, octets),
            Self::Engine(stream) => Pin::new(stream).poll_write(context, octets),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Kernel(stream) => Pin::new(stream).poll_write_vectored(context, slices),
            Self::Engine(stream) => Pin::new(stream).poll_write_vectored(context, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Kernel(stream) => stream.is_write_vectored(),
            Self::Engine(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Kernel(stream) => Pin::new(stream).poll_flush(context),
            Self::Engine(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Kernel(stream) => Pin::new(stream).poll_shutdown(context),
            Self::Engine(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}
