//! A connection, plain or TLS, or a stream of HTTP/2.
//!
//! A plain one is its socket: every call is one branch away. What TLS holds (session, buffers) is boxed.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsStream;

use crate::http2::call::Call;
use crate::http2::exchange::Exchange;

/// A connection, plain or TLS, or a stream of HTTP/2.
#[derive(Debug)]
pub enum Stream {
    /// The socket itself.
    Plain(TcpStream),
    /// TLS over it.
    Tls(Box<TlsStream<TcpStream>>),
    /// A client's HTTP/2 stream: one exchange.
    Exchange(Box<Exchange>),
    /// An HTTP/2 stream to an endpoint: one exchange.
    Call(Box<Call>),
}

impl Stream {
    /// The socket, if this is the only one on it.
    #[inline]
    pub fn socket(&self) -> Option<&TcpStream> {
        match self {
            Self::Plain(socket) => Some(socket),
            Self::Tls(tls) => Some(tls.get_ref().0),
            Self::Exchange(_) | Self::Call(_) => None,
        }
    }

    /// Our address on the way to an endpoint.
    pub fn local_addr(&self) -> Option<SocketAddr> {
        match self {
            Self::Call(call) => call.local_addr(),
            other => other.socket()?.local_addr().ok(),
        }
    }

    /// Whether it is a stream of HTTP/2.
    #[inline]
    pub fn is_http2(&self) -> bool {
        matches!(self, Self::Exchange(_) | Self::Call(_))
    }

    /// Ready when a client has reset its HTTP/2 stream; of other connections only reading and writing tell.
    #[inline]
    pub fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match self {
            Self::Exchange(exchange) => exchange.poll_gone(cx).map(drop),
            _ => Poll::Pending,
        }
    }

    /// Whether something can be read, or the end. Of TLS it may be half a record: then a read is pending.
    ///
    /// # Errors
    /// The socket's.
    #[inline]
    pub fn poll_read_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Plain(socket) => socket.poll_read_ready(cx),
            Self::Tls(tls) => {
                let (socket, session) = tls.get_ref();
                // What has come off the socket is deciphered at once: it waits as plain text, or it is not there.
                if session.wants_read() {
                    socket.poll_read_ready(cx)
                } else {
                    Poll::Ready(Ok(()))
                }
            }
            Self::Exchange(_) | Self::Call(_) => Poll::Ready(Ok(())),
        }
    }

    /// Whether nothing has come and the other end has not closed, as far as the runtime knows: no system call where it has
    /// heard nothing. TLS takes in what is its own (tickets) on the way.
    pub fn is_silent(&mut self) -> bool {
        match self {
            Self::Plain(socket) => {
                matches!(socket.try_read(&mut [0]), Err(error) if error.kind() == io::ErrorKind::WouldBlock)
            }
            Self::Tls(tls) => {
                let mut octet = [0];
                let mut room = ReadBuf::new(&mut octet);
                let mut cx = Context::from_waker(Waker::noop());
                Pin::new(&mut **tls).poll_read(&mut cx, &mut room).is_pending()
            }
            // They serve once.
            Self::Exchange(_) | Self::Call(_) => false,
        }
    }

    /// Sends a RST instead of a FIN when it is dropped.
    pub fn reset_on_close(&self) {
        // A connection that is gone already needs no RST.
        if let Some(socket) = self.socket() {
            let _ = socket.set_zero_linger();
        }
    }
}

impl From<TcpStream> for Stream {
    fn from(socket: TcpStream) -> Self {
        Self::Plain(socket)
    }
}

impl AsyncRead for Stream {
    #[inline]
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, room: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_read(cx, room),
            Self::Tls(tls) => Pin::new(&mut **tls).poll_read(cx, room),
            Self::Exchange(exchange) => Pin::new(&mut **exchange).poll_read(cx, room),
            Self::Call(call) => Pin::new(&mut **call).poll_read(cx, room),
        }
    }
}

impl AsyncWrite for Stream {
    #[inline]
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_write(cx, data),
            Self::Tls(tls) => Pin::new(&mut **tls).poll_write(cx, data),
            Self::Exchange(exchange) => Pin::new(&mut **exchange).poll_write(cx, data),
            Self::Call(call) => Pin::new(&mut **call).poll_write(cx, data),
        }
    }

    #[inline]
    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_write_vectored(cx, data),
            Self::Tls(tls) => Pin::new(&mut **tls).poll_write_vectored(cx, data),
            Self::Exchange(exchange) => Pin::new(&mut **exchange).poll_write_vectored(cx, data),
            Self::Call(call) => Pin::new(&mut **call).poll_write_vectored(cx, data),
        }
    }

    #[inline]
    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(socket) => socket.is_write_vectored(),
            Self::Tls(tls) => tls.is_write_vectored(),
            Self::Exchange(_) | Self::Call(_) => false,
        }
    }

    #[inline]
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_flush(cx),
            Self::Tls(tls) => Pin::new(&mut **tls).poll_flush(cx),
            Self::Exchange(exchange) => Pin::new(&mut **exchange).poll_flush(cx),
            Self::Call(call) => Pin::new(&mut **call).poll_flush(cx),
        }
    }

    #[inline]
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_shutdown(cx),
            Self::Tls(tls) => Pin::new(&mut **tls).poll_shutdown(cx),
            Self::Exchange(exchange) => Pin::new(&mut **exchange).poll_shutdown(cx),
            Self::Call(call) => Pin::new(&mut **call).poll_shutdown(cx),
        }
    }
}
