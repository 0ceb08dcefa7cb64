//! The HTTP filters between routing and the route's action: access rules, tokens, rate limits, faults, CORS, in the configured order.

use std::borrow::Cow;
use std::future::poll_fn;
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use super::exchange::AHEAD;
use super::local::Reply;
use super::view::{View, forwarded_for};
use super::{Outcome, Session};
use crate::config::model::HttpManager;
use crate::http1::policy::HttpFilter;
use crate::http1::rewrite::Rewrite;
use crate::jwt::Claims;
use crate::ratelimit::{LIMITED, LocalRate};
use crate::rbac::{self, DENIED_BODY};
use crate::route::cors::Cors;
use crate::route::fault::Fault;
use crate::route::{AddHeader, HeaderChanges, RequestView, Route};
use crate::stats::{Cors as CorsStat, Fault as FaultStat, Http as Stat};
use crate::worker::Buffers;

/// What the filters leave for the rest of a request's way.
#[derive(Debug, Default)]
pub(super) struct Filtered<'a> {
    /// Headers for the response.
    pub(super) response: Vec<AddHeader>,
    /// What the request's tokens say.
    pub(super) claims: Option<Box<Claims>>,
    /// What shadow rules came to, for filters behind them.
    pub(super) noted: Vec<rbac::Noted<'a>>,
    /// A fault held the request up: its time limits begin behind that.
    pub(super) delayed: bool,
}

/// The client went away.
#[derive(Debug)]
pub(super) struct Gone;

/// Where a request is on its way through the filters.
pub(super) struct Passing<'a, 'r> {
    pub(super) manager: &'a HttpManager,
    pub(super) rewrite: &'r Rewrite<'a>,
    pub(super) route: Option<&'a Route>,
    pub(super) levels: &'r [&'r HeaderChanges],
}

impl Session {
    /// Runs the filters; `Err` when one of them answered.
    pub(super) async fn filter<'a>(
        &mut self,
        buffers: &mut Buffers,
        passing: &Passing<'a, '_>,
    ) -> Result<Filtered<'a>, Outcome> {
        let mut filtered = Filtered::default();
        for filter in &passing.manager.policy.filters {
            match filter {
                HttpFilter::Rbac(filter) => {
                    self.check_access(buffers, passing, filter, &mut filtered).await?;
                }
                HttpFilter::Jwt(filter) => {
                    self.authenticate(buffers, passing, filter, &mut filtered).await?;
                }
                HttpFilter::ExtAuthz(filter) => {
                    // Boxed, as what waits for keys is: a connection without such a filter does without its memory.
                    Box::pin(self.authorize(buffers, passing, filter, &mut filtered)).await?;
                }
                HttpFilter::LocalRate(own) => {
                    let of_route = passing.route.and_then(|r| r.local_rate.as_deref());
                    self.limit(buffers, passing, of_route.unwrap_or(own)).await?;
                }
                HttpFilter::Fault(own, stats) => {
                    let of_route = passing.route.and_then(|r| r.fault.as_deref());
                    if let Some(fault) = of_route.or(own.as_deref()) {
                        self.inject(buffers, passing, fault, (stats, &mut filtered))
                            .await?;
                    }
                }
                HttpFilter::Cors(stats) => {
                    if let Some(cors) = passing.route.and_then(|r| r.cors.as_deref()) {
                        self.cors(buffers, passing, cors, (stats, &mut filtered)).await?;
                    }
                }
            }
        }
        Ok(filtered)
    }

    async fn check_access<'a>(
        &mut self,
        buffers: &mut Buffers,
        passing: &Passing<'a, '_>,
        filter: &'a rbac::Filter,
        filtered: &mut Filtered<'a>,
    ) -> Result<(), Outcome> {
        let mut connection = rbac::Connection::of(&self.peer);
        connection.claims = filtered.claims.as_deref();
        connection.remote = forwarded_for(buffers).unwrap_or(connection.remote);
        let decision = {
            let view = self.view(buffers, passing);
            let noted = filter.try_shadow(&connection, &view, self.worker.shard);
            filtered.noted.extend(noted);
            filter.check(&connection, &view, self.worker.shard)
        };
        let Err(details) = decision else {
            return Ok(());
        };
        let reply = Reply::new(403, "").body(DENIED_BODY).changed_by(passing.levels);
        let mut outcome = self.reply(buffers, reply).await;
        outcome.details = Cow::Owned(details.to_owned());
        Err(outcome)
    }

    async fn limit(
        &mut self,
        buffers: &mut Buffers,
        passing: &Passing<'_, '_>,
        rate: &LocalRate,
    ) -> Result<(), Outcome> {
        let now = std::time::Instant::now();
        if rate.admits(now, || fastrand::u64(..), self.worker.shard) {
            return Ok(());
        }
        let reply = Reply::new(rate.status, "RL")
            .body(LIMITED)
            .because(LIMITED)
            .changed_by(passing.levels)
            .adding(&rate.response);
        Err(self.reply(buffers, reply).await)
    }

    pub(super) fn view<'b>(&self, buffers: &'b Buffers, passing: &'b Passing<'_, '_>) -> View<'b> {
        View::new(
            buffers,
            passing.rewrite.default_host,
            passing.manager,
            &self.peer.connection,
        )
    }

    async fn inject(
        &mut self,
        buffers: &mut Buffers,
        passing: &Passing<'_, '_>,
        fault: &Fault,
        (stats, filtered): (&crate::stats::Scope, &mut Filtered<'_>),
    ) -> Result<(), Outcome> {
        if !fault.concerns(&self.view(buffers, passing)) {
            return Ok(());
        }
        let shard = self.worker.shard;
        if let Some((share, pause)) = fault.delay
            && share.takes(fastrand::u64(..))
        {
            stats.inc(shard, FaultStat::DelaysInjected);
            filtered.delayed = true;
            let waited = self.pause(buffers, pause).await;
            if waited.is_err() {
                let mut outcome = self.gone(passing);
                outcome.besides.delayed = true;
                return Err(outcome);
            }
        }
        if let Some((share, status)) = fault.abort
            && share.takes(fastrand::u64(..))
        {
            stats.inc(shard, FaultStat::AbortsInjected);
            let mut reply = Reply::new(status, "FI")
                .body("fault filter abort")
                .because("fault_filter_abort")
                .changed_by(passing.levels);
            if let Some(grpc) = fault.grpc_status {
                reply = reply.grpc_status(grpc);
            }
            let mut outcome = self.reply(buffers, reply).await;
            outcome.besides.delayed = filtered.delayed;
            return Err(outcome);
        }
        Ok(())
    }

    /// Waits, while the client's connection stays open.
    ///
    /// # Errors
    /// The client went away.
    pub(super) async fn pause(&mut self, buffers: &mut Buffers, pause: Duration) -> Result<(), Gone> {
        self.meanwhile(buffers, tokio::time::sleep(pause)).await
    }

    /// Does something else, while the client's connection stays open.
    ///
    /// # Errors
    /// The client went away.
    pub(super) async fn meanwhile<F: Future>(
        &mut self,
        buffers: &mut Buffers,
        work: F,
    ) -> Result<F::Output, Gone> {
        let (stream, input) = (&mut self.stream, &mut buffers.request_in);
        let mut work = pin!(work);
        poll_fn(|cx| {
            if let Poll::Ready(done) = work.as_mut().poll(cx) {
                return Poll::Ready(Ok(done));
            }
            while input.unread().len() < AHEAD {
                match input.poll_fill(cx, stream) {
                    Poll::Ready(Ok(n)) if n > 0 => {}
                    Poll::Ready(_) => return Poll::Ready(Err(Gone)),
                    Poll::Pending => break,
                }
            }
            Poll::Pending
        })
        .await
    }

    /// What a request comes to whose client went away.
    pub(super) fn gone(&self, passing: &Passing<'_, '_>) -> Outcome {
        passing.manager.stats.inc(self.worker.shard, Stat::RqRxReset);
        let mut outcome = Outcome::new(0, "DC");
        outcome.details = Cow::Borrowed("downstream_remote_disconnect");
        outcome
    }

    async fn cors(
        &mut self,
        buffers: &mut Buffers,
        passing: &Passing<'_, '_>,
        cors: &Cors,
        (stats, filtered): (&crate::stats::Scope, &mut Filtered<'_>),
    ) -> Result<(), Outcome> {
        let head = buffers.request_in.head();
        let fields = &buffers.request.fields;
        let Some(origin) = fields.get(head, b"origin").filter(|o| !o.is_empty()) else {
            return Ok(());
        };
        if !cors.enabled.takes(fastrand::u64(..)) {
            return Ok(());
        }
        let allowed = cors.allows(origin);
        let member = if allowed {
            CorsStat::OriginValid
        } else {
            CorsStat::OriginInvalid
        };
        stats.inc(self.worker.shard, member);
        let asks = fields.get(head, b"access-control-request-method");
        let preflight =
            self.view(buffers, passing).method() == b"OPTIONS" && asks.is_some_and(|m| !m.is_empty());
        let answered = preflight && (allowed || !cors.forward_unmatched);
        let headers = cors.response_headers(allowed.then_some(origin), answered);
        if !answered {
            filtered.response = headers;
            return Ok(());
        }
        let reply = Reply::new(200, "").because("cors_response").adding(&headers);
        Err(self.reply(buffers, reply).await)
    }
}
