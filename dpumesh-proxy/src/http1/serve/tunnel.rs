//! Tunnels: what comes of `upgrade` and of CONNECT once the endpoint has agreed.
//!
//! Nothing that a client sends behind its request reaches an endpoint before that: until 101 (2xx for CONNECT) has come
//! it stands in the read buffer, and if another answer comes it is dropped with the connection. A request with a body is
//! no request for a tunnel. Afterwards octets go both ways as they are; the client's end is passed on while the endpoint
//! goes on, the endpoint's end is the tunnel's, and what breaks one side resets the other. An open tunnel has no time
//! limit but the stream idle timeout; it ends with a drain, and soon after its filter chain is changed or gone.

use std::borrow::Cow;
use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use tokio::io::AsyncWrite;
use tokio::time::Instant;

use super::failure::Failure;
use super::forward::Forwarding;
use super::local::Reply;
use super::{Outcome, Session};
use crate::alarm::{Watch, earlier};
use crate::config::model::HttpManager;
use crate::http1::body::{Flow, FlowError, Out};
use crate::http1::buffer::Buffer;
use crate::http1::head::{FieldKind, Framing};
use crate::http1::rewrite;
use crate::route::upgrade::{CONNECT, Tunnel};
use crate::route::{Action, Route};
use crate::stats::{Cluster as ClusterStat, Http as Stat};
use crate::tls::Stream;
use crate::upstream::Pooled;
use crate::worker::Buffers;

/// How long a tunnel may go on whose filter chain is changed or gone.
const CHAIN_GONE: Duration = Duration::from_secs(10);

/// Whether the response whose head has been read opens the tunnel; `None` where it says 101 to something else.
pub(super) fn opens(tunnel: Tunnel, buffers: &Buffers) -> Option<bool> {
    let status = buffers.response.status;
    match tunnel {
        Tunnel::Connect => Some((200..300).contains(&status)),
        Tunnel::Upgrade if status == 101 => {
            let agreed = buffers
                .response
                .fields
                .get(buffers.response_in.head(), b"upgrade")?;
            let same = agreed.eq_ignore_ascii_case(kind(buffers)?);
            same.then_some(true)
        }
        Tunnel::Upgrade | Tunnel::Terminated => Some(false),
    }
}

/// What the request wants to become; `None` where it names more than one thing.
fn kind(buffers: &Buffers) -> Option<&[u8]> {
    if buffers.request.connect {
        return Some(CONNECT);
    }
    let fields = buffers.request.fields.fields.iter();
    let mut upgrades = fields.filter(|f| f.kind == FieldKind::Upgrade);
    let upgrade = upgrades.next()?;
    upgrades
        .next()
        .is_none()
        .then(|| upgrade.value.of_head(buffers.request_in.head()))
}

impl Session {
    /// Whether the request may become a tunnel, and how; `None` where no route takes it. Counts it from now on.
    pub(super) fn tunnel_asked_for(
        &self,
        buffers: &Buffers,
        manager: &HttpManager,
        route: Option<&Route>,
    ) -> Result<Option<Tunnel>, Box<Reply<'static>>> {
        let (stats, shard) = (&manager.stats, self.worker.shard);
        let of_route = match route.map(|r| &r.action) {
            Some(Action::Forward(forward)) => Some(&forward.upgrades),
            _ => None,
        };
        let may = if self.stream.is_http2() {
            manager.http2.connect
        } else {
            buffers.request.fields.http11
        };
        let kind = kind(buffers).filter(|_| may);
        let tunnel = kind.and_then(|kind| manager.policy.upgrades.allow(of_route, kind));
        if route.is_some() && tunnel.is_none() {
            stats.inc(shard, Stat::RqUpgradeRefused);
            return Err(Box::new(Reply::new(403, "").because("upgrade_failed")));
        }
        if tunnel.is_some() && buffers.request.fields.framing != Framing::None {
            let reply = Reply::new(400, "DPE").body("Bad Request");
            return Err(Box::new(reply.because("http1.body_disallowed")));
        }
        if tunnel.is_some() {
            stats.inc(shard, Stat::CxUpgradesTotal);
        }
        let tunnel = tunnel.filter(|_| route.is_some());
        if tunnel.is_some() {
            stats.inc(shard, Stat::CxUpgradesActive);
        }
        Ok(tunnel)
    }

    /// Opens a tunnel that ends here: the connection to the endpoint is all that was asked for.
    pub(super) async fn terminate(
        &mut self,
        buffers: &mut Buffers,
        call: &mut Forwarding<'_, '_>,
        connection: Pooled,
    ) -> Outcome {
        buffers.response_in.clear();
        let mut head = *b"HTTP/1.1 200 OK\r\n\r\n";
        buffers
            .response
            .parse(&mut head)
            .expect("a well-formed head without fields");
        self.tunnel(buffers, call, connection).await
    }

    /// Passes the head that opened the tunnel on, and then octets both ways until the endpoint has ended.
    pub(super) async fn tunnel(
        &mut self,
        buffers: &mut Buffers,
        call: &mut Forwarding<'_, '_>,
        mut connection: Pooled,
    ) -> Outcome {
        let (stats, shard) = (&call.lane.cluster.stats, self.worker.shard);
        // A length beside what opens a tunnel says nothing (RFC 9110, 9.3.6).
        buffers.response.fields.framing = Framing::None;
        call.rewrite.tunnel_open = true;
        call.rewrite.note_service_time();
        rewrite::response_head(
            buffers,
            call.manager,
            call.rewrite,
            &call.changes,
            Out::Plain,
            false,
            self.worker.date.borrow_mut().at(SystemTime::now()),
        );
        buffers.request_out.clear();
        let status = buffers.response.status;
        call.lane.count(status);
        let idle_timeout = call.forward.idle_timeout;
        let idle_timeout = idle_timeout.unwrap_or(call.manager.stream_idle_timeout);
        let (mut up, mut down) = (Way::default(), Way::default());
        let ended = self
            .relay_tunnel(buffers, &mut connection, idle_timeout, (&mut up, &mut down))
            .await;
        stats.add(shard, ClusterStat::CxTxBytes, up.flow.wire_out);
        stats.add(shard, ClusterStat::CxRxBytes, down.flow.wire_in);
        call.manager.stats.add(shard, Stat::CxRxBytes, up.flow.wire_in);
        call.manager.stats.add(shard, Stat::CxTxBytes, down.flow.wire_out);
        let mut outcome = Outcome::new(status, "");
        outcome.has_response = true;
        outcome.details = Cow::Borrowed("via_upstream");
        (outcome.received, outcome.sent) = (up.flow.body, down.flow.body);
        match &ended {
            Ok(()) => {}
            Err(Failure::Client) => connection.stream.reset_on_close(),
            Err(failure) => {
                if matches!(failure, Failure::Idle) {
                    call.manager.stats.inc(shard, Stat::RqIdleTimeout);
                }
                self.stream.reset_on_close();
            }
        }
        if let Err(failure) = ended {
            outcome.flags = failure.flags();
            outcome.details = Cow::Borrowed(failure.late_details());
        }
        outcome
    }

    async fn relay_tunnel(
        &mut self,
        buffers: &mut Buffers,
        connection: &mut Pooled,
        idle_timeout: Option<Duration>,
        (up, down): (&mut Way, &mut Way),
    ) -> Result<(), Failure> {
        let Self {
            stream,
            alarm,
            worker,
            entry,
            place,
            ..
        } = self;
        let Buffers {
            request_in,
            request_out,
            response_in,
            response_out,
            ..
        } = buffers;
        let mut watch = Watch::new(idle_timeout);
        let (mut generation, mut gone) = (worker.generation(), None);
        poll_fn(|cx| {
            let endpoint = &mut connection.stream;
            let broken = |error: FlowError, reader: Failure, writer: Failure| match error {
                FlowError::Write(_) => writer,
                FlowError::Read(_) | FlowError::Framing(_) => reader,
            };
            let upstream = Failure::Upstream {
                answered: true,
                begun: true,
            };
            match up.poll(cx, stream, endpoint, request_in, request_out) {
                Poll::Ready(Err(error)) => {
                    return Poll::Ready(Err(broken(error, Failure::Client, upstream)));
                }
                // What the endpoint still has to say goes on.
                Poll::Ready(Ok(())) | Poll::Pending => {}
            }
            match down.poll(cx, endpoint, stream, response_in, response_out) {
                Poll::Ready(Err(error)) => {
                    return Poll::Ready(Err(broken(error, upstream, Failure::Client)));
                }
                Poll::Ready(Ok(())) => return Poll::Ready(Ok(())),
                Poll::Pending => {}
            }
            entry.wake_by(cx.waker());
            if generation != worker.generation() {
                generation = worker.generation();
                gone = if place.is_in_force(&worker.program()) {
                    None
                } else {
                    gone.or_else(|| Some(Instant::now() + CHAIN_GONE))
                };
            }
            let last = earlier(worker.draining().map(|(_, deadline)| deadline), gone);
            if alarm.poll(cx, last).is_ready() {
                return Poll::Ready(Ok(()));
            }
            let moved = up.flow.wire_in + up.flow.wire_out + down.flow.wire_in + down.flow.wire_out;
            if watch.poll(cx, alarm, moved).is_ready() {
                return Poll::Ready(Err(Failure::Idle));
            }
            Poll::Pending
        })
        .await
    }
}

/// One direction: octets until the source ends, and then its end.
struct Way {
    flow: Flow,
    shut: bool,
}

impl Default for Way {
    fn default() -> Self {
        Self {
            flow: Flow::new(Framing::Close, Out::Plain),
            shut: false,
        }
    }
}

impl Way {
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut Stream,
        to: &mut Stream,
        source: &mut Buffer,
        pending: &mut Vec<u8>,
    ) -> Poll<Result<(), FlowError>> {
        if self.shut {
            return Poll::Ready(Ok(()));
        }
        std::task::ready!(self.flow.poll(cx, from, to, source, pending))?;
        std::task::ready!(Pin::new(to).poll_shutdown(cx)).map_err(FlowError::Write)?;
        self.shut = true;
        Poll::Ready(Ok(()))
    }
}
