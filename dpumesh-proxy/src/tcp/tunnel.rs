//! A connection that goes on in a CONNECT request (`tunneling_config`), as HBONE has it: over HTTP/2, many of them share one connection.

use std::io;

use tokio::io::AsyncWriteExt;

use crate::access_log::{Record, Template};
use crate::callout;
use crate::http1::buffer::Buffer;
use crate::route::AddHeader;
use crate::upstream::Pooled;
use crate::worker::{Buffers, Worker};

/// `TunnelingConfig`.
#[derive(Debug)]
pub struct Tunneling {
    /// Makes the `host:port` that the endpoint is to connect to.
    pub host: Template,
    /// Headers of the request.
    pub headers: Vec<AddHeader>,
}

/// Asks the endpoint for a tunnel. What it sent behind its answer, if anything, is unread in the buffers.
///
/// # Errors
/// The connection's; an answer that is none, or not 2xx; a host or header that cannot be sent.
pub(super) async fn open(
    tunneling: &Tunneling,
    worker: &Worker,
    record: &Record<'_>,
    server: &mut Pooled,
) -> io::Result<Box<Buffers>> {
    let host = tunneling.host.render(record);
    if host.is_empty() || !host.iter().all(u8::is_ascii_graphic) {
        let host = String::from_utf8_lossy(&host).into_owned();
        return Err(io::Error::other(format!("{host:?} is no host to tunnel to")));
    }
    let mut head = [
        b"CONNECT ",
        host.as_slice(),
        b" HTTP/1.1\r\nhost: ",
        &host,
        b"\r\n",
    ]
    .concat();
    for header in &tunneling.headers {
        let rendered = header.template.as_ref().map(|template| template.render(record));
        let value = rendered.as_ref().unwrap_or(&header.value);
        if !value.is_empty() && crate::route::is_value(value) {
            head.extend_from_slice(&[&header.name, b": ".as_slice(), value, b"\r\n"].concat());
        }
    }
    head.extend_from_slice(b"\r\n");
    server.stream.write_all(&head).await?;
    server.stream.flush().await?;
    let mut buffers = worker.take_buffers(None);
    callout::response_head(&mut server.stream, &mut buffers).await?;
    let status = buffers.response.status;
    if !(200..300).contains(&status) {
        return Err(io::Error::other(format!("the tunnel was answered {status}")));
    }
    let early = Buffer::from(buffers.response_in.unread());
    buffers.response_in.clear();
    buffers.request_in = early;
    Ok(buffers)
}
