//! The door of the SoC's end: connections whose caller is not known yet are few.
//!
//! Anybody who reaches the listener can open connections; only a certificate makes a caller known, and only with its first
//! call. Until then a connection is a stranger. There are at most [`STRANGERS`]: one more and the oldest is closed, so
//! that strangers hold few descriptors and never keep the agent out for longer than it takes to come again.

use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tonic::transport::server::Connected;

/// Most connections whose caller is not known yet.
pub(super) const STRANGERS: usize = 32;

/// Who came in and is not known yet, the oldest first.
#[derive(Debug, Default)]
pub(super) struct Door {
    strangers: VecDeque<Stranger>,
}

#[derive(Debug)]
struct Stranger {
    known: Caller,
    out: oneshot::Sender<()>,
}

/// Travels with each call of a connection.
#[derive(Clone, Debug, Default)]
pub(super) struct Caller(Arc<AtomicBool>);

/// A connection that the door can close as long as its caller is a stranger.
#[derive(Debug)]
pub(super) struct Guarded {
    tcp: TcpStream,
    caller: Caller,
    /// Ready when it must go; `None` when that cannot be any more.
    out: Option<oneshot::Receiver<()>>,
}

impl Door {
    /// Lets a connection in, and the oldest stranger out if there are too many.
    pub(super) fn enter(&mut self, tcp: TcpStream) -> Guarded {
        self.strangers
            .retain(|stranger| !stranger.known.is_known() && !stranger.out.is_closed());
        if self.strangers.len() >= STRANGERS
            && let Some(oldest) = self.strangers.pop_front()
        {
            tracing::warn!(
                strangers = STRANGERS,
                "channel connection closed: too many whose caller is not known"
            );
            let _ = oldest.out.send(()); // it may have gone by itself
        }
        let (out, told) = oneshot::channel();
        let caller = Caller::default();
        self.strangers.push_back(Stranger {
            known: caller.clone(),
            out,
        });
        Guarded {
            tcp,
            caller,
            out: Some(told),
        }
    }
}

impl Caller {
    /// The caller of this connection has shown who it is.
    pub(super) fn make_known(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    fn is_known(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

impl Guarded {
    fn check(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        let Some(out) = &mut self.out else {
            return Ok(());
        };
        match Pin::new(out).poll(context) {
            Poll::Pending => Ok(()),
            Poll::Ready(Ok(())) if !self.caller.is_known() => Err(io::ErrorKind::ConnectionAborted.into()),
            // The door has forgotten it, or it became known while it was being sent away.
            Poll::Ready(_) => {
                self.out = None;
                Ok(())
            }
        }
    }
}

impl AsyncRead for Guarded {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check(context)?;
        Pin::new(&mut self.tcp).poll_read(context, buffer)
    }
}

impl AsyncWrite for Guarded {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        octets: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tcp).poll_write(context, octets)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        octets: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tcp).poll_write_vectored(context, octets)
    }

    fn is_write_vectored(&self) -> bool {
        self.tcp.is_write_vectored()
    }
}

impl Connected for Guarded {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        self.caller.clone()
    }
}
