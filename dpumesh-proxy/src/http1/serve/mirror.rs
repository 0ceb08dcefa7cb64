//! Copies of requests for other clusters (`request_mirror_policies`): sent by tasks of their own, answers dropped.
//!
//! A copy has the head that the first attempt has, for the host `HOST-shadow`. Its body is copied as it passes; a mirror
//! that falls too far behind is given up, the request itself never waits and never fails for one.

use std::io;
use std::rc::Rc;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::time::timeout;

use super::Session;
use super::forward::Forwarding;
use crate::balance::Ask;
use crate::callout;
use crate::http1::copy::{Piece, Reader, Writer, copy};
use crate::http1::head::Framing;
use crate::http1::rewrite;
use crate::stats::Cluster as ClusterStat;
use crate::upstream::{Active, Lane, Pooled};
use crate::worker::{Buffers, Peer, Worker};

/// Octets of a body that may wait for one mirror.
const MOST_WAITING: usize = 256 * 1024;

/// How long a mirror may take where its route has no timeout.
const LONGEST: Duration = Duration::from_secs(300);

/// A copied request on its way.
struct Copy {
    worker: Rc<Worker>,
    lane: Rc<Lane>,
    peer: Peer,
    head: Vec<u8>,
    framing: Framing,
    body: Reader,
    /// There is no body in the answer (HEAD).
    bodiless: bool,
}

impl Session {
    /// Starts the mirrors that this request is for; what their bodies are written to.
    pub(super) fn begin_mirrors(&self, buffers: &mut Buffers, call: &mut Forwarding<'_, '_>) -> Vec<Writer> {
        let mut writers = Vec::new();
        for mirror in &call.forward.mirrors {
            let lane = mirror.cluster.index.and_then(|i| self.program.lanes.get(i));
            let Some(lane) = lane.filter(|_| mirror.share.takes(fastrand::u64(..))) else {
                continue;
            };
            let limit = call.deadline.map(|at| at - call.begun);
            let (connection, changes) = (&self.peer.connection, &call.changes);
            rewrite::request_head(buffers, call.manager, connection, call.rewrite, changes, limit);
            let mut head = std::mem::take(&mut buffers.request_out);
            if mirror.renames_host {
                head = for_shadow(&head);
            }
            let (writer, body) = copy(MOST_WAITING);
            writers.push(writer);
            let method = buffers.request.method.of_head(buffers.request_in.head());
            let copied = Copy {
                worker: Rc::clone(&self.worker),
                lane: Rc::clone(lane),
                peer: self.peer.clone(),
                head,
                framing: buffers.request.fields.framing,
                body,
                bodiless: method == b"HEAD",
            };
            let limit = call.forward.timeout.unwrap_or(LONGEST);
            tokio::task::spawn_local(async move {
                let lane = Rc::clone(&copied.lane);
                if timeout(limit, copied.send()).await.is_err() {
                    tracing::debug!(cluster = %lane.cluster.name, "a mirrored request timed out");
                }
            });
        }
        writers
    }
}

/// A head for the host `HOST-shadow`, or `HOST-shadow:PORT`. The host is the first line after the request line.
fn for_shadow(head: &[u8]) -> Vec<u8> {
    const HOST: &[u8] = b"host: ";
    let lines = |from: usize| memchr::memchr(b'\r', &head[from..]).map_or(head.len(), |at| from + at);
    let begin = (lines(0) + 2 + HOST.len()).min(head.len());
    let end = lines(begin);
    let host = &head[begin..end];
    let port = host.iter().rposition(|b| *b == b':');
    let port = port
        .filter(|at| !host[*at..].contains(&b']'))
        .unwrap_or(host.len());
    [&head[..begin + port], b"-shadow", &head[begin + port..]].concat()
}

impl Copy {
    async fn send(mut self) {
        let lane = Rc::clone(&self.lane);
        let (stats, shard) = (&lane.cluster.stats, self.worker.shard);
        let Some(picked) = lane.pick(&Ask::any(self.peer.local)) else {
            stats.inc(shard, ClusterStat::CxNoneHealthy);
            return;
        };
        if lane.is_full() {
            stats.inc(shard, ClusterStat::RqPendingOverflow);
            return;
        }
        let _active = Active::new(&lane);
        let connection = match lane.take_idle(&picked, &self.peer, true) {
            Some(pooled) => Ok(pooled),
            None => lane.connect(&picked, &self.peer).await,
        };
        let Ok(mut connection) = connection else {
            return;
        };
        stats.inc(shard, ClusterStat::RqTotal);
        let mut buffers = self.worker.take_buffers(None);
        let result = self.exchange(&mut connection, &mut buffers).await;
        if buffers.response.status >= 200 && result.is_ok() {
            lane.count(buffers.response.status);
        }
        self.worker.return_buffers(buffers);
        match result {
            Ok(true) => lane.give_back(&picked, &self.peer, connection),
            Ok(false) => {}
            Err(error) => {
                stats.inc(shard, ClusterStat::RqRxReset);
                tracing::debug!(cluster = %lane.cluster.name, %error, "a mirrored request failed");
            }
        }
    }

    /// Sends the request and takes the answer in; whether the connection may serve again.
    async fn exchange(&mut self, connection: &mut Pooled, buffers: &mut Buffers) -> io::Result<bool> {
        let stream = &mut connection.stream;
        stream.write_all(&self.head).await?;
        if self.framing != Framing::None {
            loop {
                match self.body.next().await {
                    Piece::Octets(octets) if self.framing == Framing::Chunked => {
                        let size = format!("{:x}\r\n", octets.len());
                        stream
                            .write_all(&[size.as_bytes(), &octets, b"\r\n"].concat())
                            .await?;
                    }
                    Piece::Octets(octets) => stream.write_all(&octets).await?,
                    Piece::End if self.framing == Framing::Chunked => {
                        stream.write_all(b"0\r\n\r\n").await?;
                        break;
                    }
                    Piece::End => break,
                    Piece::Cut => return Err(io::Error::other("the copy was cut")),
                }
            }
        }
        callout::response_head(stream, buffers).await?;
        let mut nowhere = tokio::io::sink();
        let (reusable, _) = callout::response_body(stream, buffers, self.bodiless, &mut nowhere).await?;
        Ok(reusable)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shadows_host_is_named_so() {
        for (host, wanted) in [
            ("a", "a-shadow"),
            ("a.example:80", "a.example-shadow:80"),
            ("[::1]:80", "[::1]-shadow:80"),
            ("[::1]", "[::1]-shadow"),
        ] {
            let head = |host: &str| format!("GET / HTTP/1.1\r\nhost: {host}\r\nx: y:1\r\n\r\n").into_bytes();
            assert_eq!(for_shadow(&head(host)), head(wanted), "{host}");
        }
    }
}
