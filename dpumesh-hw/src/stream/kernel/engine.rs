//! Streams from a prepared stack.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::task::{Context, Poll, ready};

use async_trait::async_trait;
use tokio::net::{TcpListener, TcpStream};

use super::socket::{connect, ingress, transparent_listener};
use super::stack::KernelStack;
use crate::stream::{
    Accepted, ConnectRequest, Families, ListenOptions, Stream, StreamEngine, StreamError, StreamErrorKind,
    StreamListener,
};

/// The engine `kernel`.
#[derive(Debug)]
pub struct KernelEngine {
    stack: KernelStack,
}

impl KernelEngine {
    /// Serves streams from `stack`.
    pub fn new(stack: KernelStack) -> Self {
        Self { stack }
    }

    /// The stack it serves from.
    pub fn stack(&self) -> &KernelStack {
        &self.stack
    }

    /// A socket made by a thread elsewhere would bypass the stack, so none is made.
    fn check_entered(&self, operation: &'static str) -> Result<(), StreamError> {
        if self.stack.namespace().is_entered() {
            return Ok(());
        }
        Err(StreamError::new(
            StreamErrorKind::NotEntered,
            operation,
            self.stack.namespace().id(),
        ))
    }

    /// The address to connect from.
    fn source(&self, request: &ConnectRequest) -> Result<IpAddr, StreamError> {
        let destination = request.destination;
        let refuse = |kind| Err(StreamError::cannot_connect(kind, request.source, destination));
        match request.source.filter(|source| *source != destination.ip()) {
            Some(source) if source.is_ipv4() != destination.is_ipv4() => {
                refuse(StreamErrorKind::FamilyMismatch)
            }
            Some(source) => Ok(source),
            None => match self.stack.config().local_source.like(destination.ip()) {
                Some(source) => Ok(source),
                None => refuse(StreamErrorKind::NoLocalSource),
            },
        }
    }
}

#[async_trait]
impl StreamEngine for KernelEngine {
    fn name(&self) -> &'static str {
        "kernel"
    }

    fn enter_worker(&self) -> Result<(), StreamError> {
        let namespace = self.stack.namespace();
        namespace
            .enter_thread()
            .map_err(|error| StreamError::system("enter", namespace.id(), io::Error::other(error)))
    }

    fn listen(&self, options: &ListenOptions) -> Result<Box<dyn StreamListener>, StreamError> {
        const LISTEN: &str = "listen on";
        self.check_entered(LISTEN)?;
        let mut options = *options;
        if options.families == Families::Both && !self.stack.has_ipv6() {
            options.families = Families::V4;
        }
        let listener = transparent_listener(&options)
            .and_then(TcpListener::from_std)
            .map_err(|error| StreamError::system(LISTEN, format!("port {}", options.port), error))?;
        Ok(Box::new(KernelListener {
            listener,
            port: options.port,
        }))
    }

    async fn connect(&self, request: &ConnectRequest) -> Result<Stream, StreamError> {
        self.check_entered(super::super::error::CONNECT)?;
        let source = self.source(request)?;
        connect(request.destination, Some(source.into()))
            .await
            .map(Stream::Kernel)
            .map_err(|error| StreamError::connecting(Some(source), request.destination, error))
    }
}

#[derive(Debug)]
struct KernelListener {
    listener: TcpListener,
    port: u16,
}

impl StreamListener for KernelListener {
    fn poll_accept(&mut self, context: &mut Context<'_>) -> Poll<Result<Accepted, StreamError>> {
        let accepted =
            ready!(self.listener.poll_accept(context)).and_then(|(stream, peer)| describe(stream, peer));
        Poll::Ready(
            accepted.map_err(|error| StreamError::system("accept on", format!("port {}", self.port), error)),
        )
    }

    fn port(&self) -> u16 {
        self.port
    }
}

fn describe(stream: TcpStream, peer: SocketAddr) -> io::Result<Accepted> {
    let original_destination = plain(stream.local_addr()?);
    let ingress = ingress(&stream)?;
    Ok(Accepted {
        stream: Stream::Kernel(stream),
        source: plain(peer),
        original_destination,
        ingress,
    })
}

/// An IPv4 address is reported as such, also by a listener for both families.
fn plain(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
