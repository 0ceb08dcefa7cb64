//! Requests of the proxy's own to a cluster: it asks an authorization service, it fetches keys.
//!
//! They go the way that clients' requests go ([`crate::upstream`]): the cluster's balancing, pools, TLS and limits hold for them, and its
//! statistics count them. Nothing is tried twice.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use tokio::io::{AsyncWrite, AsyncWriteExt};

use crate::balance::Ask;
use crate::config::model::Direction;
use crate::http1::body::{Flow, FlowError, Out};
use crate::http1::head::{Framing, Scan};
use crate::http1::serve::LARGEST_RESPONSE_HEAD;
use crate::stats::Cluster as Stat;
use crate::tls::Stream;
use crate::upstream::{Active, Lane};
use crate::worker::{Buffers, Peer, Worker};

/// What a service answered.
#[derive(Debug, Default)]
pub(crate) struct Answer {
    /// The status.
    pub(crate) status: u16,
    /// Its header lines, names in lower case.
    pub(crate) fields: Vec<(Vec<u8>, Vec<u8>)>,
    /// Its body.
    pub(crate) body: Vec<u8>,
    /// Its trailers, lines as they came.
    trailers: Vec<u8>,
}

impl Answer {
    /// The first value of a header (lower case).
    pub(crate) fn get(&self, name: &[u8]) -> Option<&[u8]> {
        let field = self.fields.iter().find(|(known, _)| known == name);
        field.map(|(_, value)| value.as_slice())
    }

    /// The message of a gRPC call that went well.
    ///
    /// # Errors
    /// The call went wrong, by its status or its form.
    pub(crate) fn grpc_message(&self) -> io::Result<&[u8]> {
        let said = |lines: &[u8]| {
            let mut lines = lines.split(|b| *b == b'\n');
            let status = lines.find_map(|line| line.strip_prefix(b"grpc-status:"))?;
            Some(status.trim_ascii().to_vec())
        };
        let status = said(&self.trailers).or_else(|| self.get(b"grpc-status").map(<[u8]>::to_vec));
        if self.status != 200 || status.as_deref() != Some(b"0") {
            let status = status.unwrap_or_default();
            return Err(io::Error::other(format!(
                "status {}, grpc-status {:?}",
                self.status,
                String::from_utf8_lossy(&status)
            )));
        }
        match self.body.split_at_checked(5) {
            Some(([0, length @ ..], message)) if length == (message.len() as u32).to_be_bytes() => {
                Ok(message)
            }
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

/// A gRPC request in text, as [`call`] sends it: the path, the authority, more header lines, the message.
pub(crate) fn grpc_request(path: &str, authority: &str, more: &[u8], message: &[u8]) -> Vec<u8> {
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: {authority}\r\ncontent-type: application/grpc\r\nte: trailers\r\ncontent-length: {}\r\n",
        message.len() + 5
    );
    let length = (message.len() as u32).to_be_bytes();
    [head.as_bytes(), more, b"\r\n\0", &length, message].concat()
}

/// Who asks when the proxy asks on behalf of a client's connection: with that pod's certificate and, where the pod is the client, from its
/// address; of a connection that came in for a pod the address is another's.
pub(crate) fn asks_for(peer: &Peer, direction: Option<Direction>) -> Peer {
    Peer {
        source: peer.source.filter(|_| direction != Some(Direction::Inbound)),
        protocols: None,
        http2: true,
        small: None,
        ..peer.clone()
    }
}

/// Sends a request, head and body in text, and takes the answer, whose body may have `most` octets.
///
/// # Errors
/// There is no endpoint, no connection, no room in the cluster; the connection's own; an answer that cannot be read or is too long.
pub(crate) async fn call(
    worker: Rc<Worker>,
    lane: Rc<Lane>,
    peer: Peer,
    request: Vec<u8>,
    most: usize,
) -> io::Result<Answer> {
    let (stats, shard) = (&lane.cluster.stats, worker.shard);
    let Some(picked) = lane.pick(&Ask::any(peer.local)) else {
        stats.inc(shard, Stat::CxNoneHealthy);
        return Err(io::Error::other("no healthy endpoint"));
    };
    if lane.is_full() {
        stats.inc(shard, Stat::RqPendingOverflow);
        return Err(io::Error::other("too many requests"));
    }
    let _active = Active::new(&lane);
    let mut connection = match lane.take_idle(&picked, &peer, true) {
        Some(pooled) => pooled,
        None => lane.connect(&picked, &peer).await.map_err(io::Error::from)?,
    };
    stats.inc(shard, Stat::RqTotal);
    let mut buffers = worker.take_buffers(None);
    let taken = exchange(&mut connection.stream, &mut buffers, &request, most).await;
    worker.return_buffers(buffers);
    match taken {
        Ok((answer, reusable)) => {
            lane.count(answer.status);
            if reusable {
                lane.give_back(&picked, &peer, connection);
            }
            Ok(answer)
        }
        Err(error) => {
            stats.inc(shard, Stat::RqRxReset);
            Err(error)
        }
    }
}

async fn exchange(
    stream: &mut Stream,
    buffers: &mut Buffers,
    request: &[u8],
    most: usize,
) -> io::Result<(Answer, bool)> {
    stream.write_all(request).await?;
    stream.flush().await?;
    response_head(stream, buffers).await?;
    let (head, response) = (buffers.response_in.head(), &buffers.response);
    let line =
        |f: &crate::http1::head::Field| (f.name.of_head(head).to_vec(), f.value.of_head(head).to_vec());
    let mut answer = Answer {
        status: response.status,
        fields: response.fields.fields.iter().map(line).collect(),
        ..Answer::default()
    };
    let mut body = Bounded {
        octets: Vec::new(),
        most,
    };
    let bodiless = request.starts_with(b"HEAD ");
    let (reusable, trailers) = response_body(stream, buffers, bodiless, &mut body).await?;
    answer.body = body.octets;
    answer.trailers = trailers.unwrap_or_default();
    Ok((answer, reusable))
}

fn malformed() -> io::Error {
    io::ErrorKind::InvalidData.into()
}

/// Reads until a response's final head stands in the buffers.
///
/// # Errors
/// The connection's; a head that is malformed, too long, or opens a tunnel.
pub(crate) async fn response_head(stream: &mut Stream, buffers: &mut Buffers) -> io::Result<()> {
    let Buffers {
        response_in,
        response,
        ..
    } = buffers;
    response_in.clear();
    loop {
        let mut scan = Scan::default();
        let length = loop {
            if let Some(length) = scan.find(response_in.unread()).map_err(|_| malformed())? {
                break length;
            }
            if response_in.unread().len() > LARGEST_RESPONSE_HEAD {
                return Err(malformed());
            }
            if poll_fn(|cx| response_in.poll_fill(cx, stream)).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        };
        response
            .parse(&mut response_in.unread_mut()[..length])
            .map_err(|_| malformed())?;
        match response.status {
            101 => return Err(malformed()),
            100..=199 => {
                response_in.consume(length);
                response_in.rewind();
            }
            _ => {
                response_in.keep_head(length);
                return Ok(());
            }
        }
    }
}

/// Takes the body behind that head in; whether the connection may serve again, and the trailers. `bodiless`: it answers HEAD.
///
/// # Errors
/// The connection's, malformed framing, what `body` says.
pub(crate) async fn response_body<W: AsyncWrite + Unpin>(
    stream: &mut Stream,
    buffers: &mut Buffers,
    bodiless: bool,
    body: &mut W,
) -> io::Result<(bool, Option<Vec<u8>>)> {
    let Buffers {
        response_in,
        response_out,
        response,
        ..
    } = buffers;
    let framing = match response.fields.framing {
        _ if bodiless || matches!(response.status, 204 | 304) => Framing::None,
        framing => framing,
    };
    let mut flow = Flow::new(framing, Out::Plain);
    flow.pass_trailers();
    response_out.clear();
    let taken = poll_fn(|cx| flow.poll(cx, stream, body, response_in, response_out)).await;
    taken.map_err(|error| match error {
        FlowError::Read(Some(error)) | FlowError::Write(error) => error,
        FlowError::Read(None) => io::ErrorKind::UnexpectedEof.into(),
        FlowError::Framing(_) => malformed(),
    })?;
    let reusable = response.fields.persistent() && framing != Framing::Close && response_in.is_empty();
    Ok((reusable, flow.take_trailers()))
}

/// Takes so much and no more.
struct Bounded {
    octets: Vec<u8>,
    most: usize,
}

impl AsyncWrite for Bounded {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.octets.len() + data.len() > this.most {
            return Poll::Ready(Err(io::Error::other("the answer is too long")));
        }
        this.octets.extend_from_slice(data);
        Poll::Ready(Ok(data.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_went_well_or_did_not() {
        let answer = |status, fields: &[(&str, &str)], body: &[u8], trailers: &str| Answer {
            status,
            fields: fields
                .iter()
                .map(|(n, v)| (n.as_bytes().to_vec(), v.as_bytes().to_vec()))
                .collect(),
            body: body.to_vec(),
            trailers: trailers.as_bytes().to_vec(),
        };
        let good = b"\0\0\0\0\x02ab";
        assert_eq!(
            answer(200, &[], good, "grpc-status: 0\r\n")
                .grpc_message()
                .unwrap(),
            b"ab"
        );
        for bad in [
            answer(503, &[], good, "grpc-status: 0\r\n"),
            answer(200, &[], good, ""),
            answer(200, &[("grpc-status", "0")], b"", ""),
            answer(200, &[("grpc-status", "14")], b"", ""),
            answer(
                200,
                &[("grpc-status", "0")],
                good,
                "grpc-message: x\r\ngrpc-status: 7\r\n",
            ),
            answer(200, &[], b"\x01\0\0\0\x02ab", "grpc-status: 0\r\n"),
            answer(200, &[], b"\0\0\0\0\x03ab", "grpc-status: 0\r\n"),
        ] {
            assert!(bad.grpc_message().is_err(), "{bad:?}");
        }
    }
}
