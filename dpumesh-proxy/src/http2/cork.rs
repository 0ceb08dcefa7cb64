//! [`Cork`]: the frames of one turn of a connection leave in one system call, and over TLS in one record.
//!
//! `h2` flushes after every DATA frame that has some length, so that twenty answers were twenty writes. Here they are gathered; who
//! drives the connection lets them go with [`Cork::poll_drain`] when `h2` has nothing more to say. More than 16 KiB leave
//! at once, and what is large is not copied.

use std::cell::RefCell;
use std::fmt;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::tls::Stream;

/// Octets that are gathered at most; a frame as large as this goes past.
const ROOM: usize = 16 * 1024;

/// A connection whose writes are gathered. Its clones are the same connection: one is `h2`'s, one its driver's.
#[derive(Clone)]
pub struct Cork(Rc<RefCell<Wire>>);

struct Wire {
    stream: Stream,
    /// What was written and has not left.
    held: Vec<u8>,
    /// How much of it has.
    left: usize,
}

impl fmt::Debug for Cork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Cork").field(&self.0.borrow().stream).finish()
    }
}

impl From<Stream> for Cork {
    fn from(stream: Stream) -> Self {
        Self(Rc::new(RefCell::new(Wire {
            stream,
            held: Vec::new(),
            left: 0,
        })))
    }
}

impl Cork {
    /// Lets go what was gathered. `Pending` is woken by the connection, as any write.
    ///
    /// # Errors
    /// The connection's.
    pub fn poll_drain(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut wire = self.0.borrow_mut();
        ready!(wire.drain(cx))?;
        Pin::new(&mut wire.stream).poll_flush(cx)
    }
}

impl Wire {
    fn drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.left < self.held.len() {
            match ready!(Pin::new(&mut self.stream).poll_write(cx, &self.held[self.left..]))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                n => self.left += n,
            }
        }
        // An idle connection holds nothing.
        (self.held, self.left) = (Vec::new(), 0);
        Poll::Ready(Ok(()))
    }

    fn gather(&mut self, cx: &mut Context<'_>, data: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let octets = data.iter().map(|part| part.len()).sum::<usize>();
        if self.held.len() + octets > ROOM {
            ready!(self.drain(cx))?;
            if octets > ROOM {
                return Pin::new(&mut self.stream).poll_write_vectored(cx, data);
            }
        }
        data.iter().for_each(|part| self.held.extend_from_slice(part));
        Poll::Ready(Ok(octets))
    }
}

impl AsyncRead for Cork {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, room: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0.borrow_mut().stream).poll_read(cx, room)
    }
}

impl AsyncWrite for Cork {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        self.0.borrow_mut().gather(cx, &[IoSlice::new(data)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.0.borrow_mut().gather(cx, data)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// Does nothing: see [`Cork::poll_drain`].
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut wire = self.0.borrow_mut();
        ready!(wire.drain(cx))?;
        Pin::new(&mut wire.stream).poll_shutdown(cx)
    }
}
