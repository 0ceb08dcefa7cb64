//! Another service is asked whether a request may pass; what it answers is done.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::time::timeout;

use super::filters::{Filtered, Gone, Passing};
use super::local::Reply;
use super::{Outcome, Session};
use crate::callout::{self, Answer};
use crate::ext_authz::{self, Changes, Decision, Denial, FLAG, Filter, Question, Service, WithBody};
use crate::http1::body;
use crate::http1::head::{FieldKind, Framing};
use crate::http1::reply;
use crate::route::{AddHeader, AddHow, RequestView};
use crate::stats::{ExtAuthz as Stat, Http as HttpStat};
use crate::worker::Buffers;

/// What an endpoint is told where nobody decided.
const FAILURE_ALLOWED: &[u8] = b"x-envoy-auth-failure-mode-allowed";

/// The body that goes with a question.
type Body = Option<(Vec<u8>, bool)>;

impl Session {
    /// Runs the filter; `Err` when the request does not pass.
    pub(super) async fn authorize<'a>(
        &mut self,
        buffers: &mut Buffers,
        passing: &Passing<'a, '_>,
        filter: &'a Filter,
        filtered: &mut Filtered<'a>,
    ) -> Result<(), Outcome> {
        let of_route = passing.route.and_then(|r| r.ext_authz.as_deref());
        if of_route.is_some_and(|r| r.disabled) {
            return Ok(());
        }
        let shard = self.worker.shard;
        if !is_asked(filter, filtered) {
            filter.stats.inc(shard, Stat::Disabled);
            if filter.deny_at_disable {
                return Err(self
                    .not_authorized(buffers, passing, filter.status_on_error)
                    .await);
            }
            return Ok(());
        }
        let body = match of_route.and_then(|r| r.body).unwrap_or(filter.body) {
            Some(with) => self.body_ahead(buffers, passing, with).await?,
            None => None,
        };
        let as_bytes = filter.body.is_some_and(|with| with.as_bytes);
        let context = of_route.map_or(&[][..], |r| &r.context);
        let question = self.question(buffers, passing, (&body, as_bytes), context);
        let request = match &filter.service {
            Service::Grpc { authority, metadata } => {
                let message = ext_authz::check_request(filter, &question);
                let authority = Some(authority.as_str()).filter(|a| !a.is_empty());
                let authority = authority.unwrap_or(&filter.cluster.name);
                callout::grpc_request(ext_authz::CHECK, authority, metadata, &message)
            }
            Service::Http(http) => ext_authz::http_request(filter, http, &question),
        };
        drop(question);
        let asking = self.ask(filter, request);
        let Ok(answered) = self.meanwhile(buffers, asking).await else {
            return Err(self.gone(passing));
        };
        let decision = match (answered, &filter.service) {
            (Some(answer), Service::Grpc { .. }) => match answer.grpc_message() {
                Ok(message) => ext_authz::grpc_decision(message),
                Err(error) => {
                    tracing::debug!(cluster = %filter.cluster.name, %error, "no authorization");
                    Decision::Failed(None)
                }
            },
            (Some(answer), Service::Http(http)) => ext_authz::http_decision(http, answer),
            (None, _) => Decision::Failed(None),
        };
        match decision {
            Decision::Passed(changes) => {
                filter.stats.inc(shard, Stat::Ok);
                change(buffers, passing, &changes);
                filtered.response.extend(changes.response);
                Ok(())
            }
            Decision::Denied(denial) => {
                filter.stats.inc(shard, Stat::Denied);
                Err(self.denied(buffers, passing, &denial).await)
            }
            Decision::Failed(status) => {
                filter.stats.inc(shard, Stat::Error);
                if let Some(tell) = filter.failure_mode_allow {
                    filter.stats.inc(shard, Stat::FailureModeAllowed);
                    if tell {
                        buffers.add_to_request(FAILURE_ALLOWED, b"true");
                    }
                    return Ok(());
                }
                let status = status.unwrap_or(filter.status_on_error);
                Err(self.not_authorized(buffers, passing, status).await)
            }
        }
    }

    /// Asks; `None` without an answer in time.
    fn ask(&self, filter: &Filter, request: Vec<u8>) -> impl Future<Output = Option<Answer>> + use<> {
        let lane = filter.cluster.index.and_then(|i| self.program.lanes.get(i));
        let lane = lane.map(Rc::clone);
        let (worker, name) = (Rc::clone(&self.worker), Arc::clone(&filter.cluster.name));
        let peer = callout::asks_for(&self.peer, self.place.listener.direction);
        let (limit, stats) = (filter.timeout, Arc::clone(&filter.stats));
        async move {
            let shard = worker.shard;
            let Some(lane) = lane else {
                tracing::debug!(cluster = %name, "no authorization: there is no such cluster");
                return None;
            };
            let call = callout::call(worker, lane, peer, request, ext_authz::LONGEST_ANSWER);
            match timeout(limit.unwrap_or(Duration::MAX), call).await {
                Ok(Ok(answer)) => Some(answer),
                Ok(Err(error)) => {
                    tracing::debug!(cluster = %name, %error, "no authorization");
                    None
                }
                Err(_) => {
                    stats.inc(shard, Stat::Timeout);
                    None
                }
            }
        }
    }

    fn question<'b>(
        &'b self,
        buffers: &'b Buffers,
        passing: &'b Passing<'_, '_>,
        (body, as_bytes): (&'b Body, bool),
        context: &'b [(String, String)],
    ) -> Question<'b> {
        let head = buffers.request_in.head();
        let request = &buffers.request;
        let authority = request.authority.of_head(head);
        let tls = self.peer.connection.tls;
        let view = self.view(buffers, passing);
        let believed =
            crate::http1::client_cert::passes(passing.manager.policy.client_cert, &self.peer.connection);
        let mut fields: Vec<(&[u8], &[u8])> = Vec::with_capacity(request.fields.fields.len() + 2);
        let (mut service, mut has_scheme): (&[u8], bool) = (b"", false);
        for field in &request.fields.fields {
            let (name, value) = (field.name.of_head(head), field.value.of_head(head));
            match field.kind {
                FieldKind::Host
                | FieldKind::Hop
                | FieldKind::Connection
                | FieldKind::TransferEncoding
                | FieldKind::ExpectContinue
                | FieldKind::Te => continue,
                FieldKind::ClientCert if !believed => continue,
                FieldKind::ForwardedProto => has_scheme = true,
                FieldKind::EnvoyInternal if name == b"x-envoy-downstream-service-cluster" => service = value,
                _ => {}
            }
            fields.push((name, value));
        }
        if !has_scheme {
            fields.push((b"x-forwarded-proto", if tls { b"https" } else { b"http" }));
        }
        if passing.rewrite.made_id {
            fields.push((b"x-request-id", &passing.rewrite.request_id));
        }
        let scheme: &[u8] = if view.scheme() == b"https" {
            b"https"
        } else {
            b"http"
        };
        Question {
            id: self.peer.id.to_string(),
            method: request.method.of_head(head),
            path: crate::http1::rewrite::path(buffers),
            host: passing.rewrite.default_host.unwrap_or(authority),
            scheme,
            protocol: match (self.stream.is_http2(), request.fields.http11) {
                (true, _) => "HTTP/2",
                (_, true) => "HTTP/1.1",
                _ => "HTTP/1.0",
            },
            fields,
            size: match request.fields.framing {
                Framing::Length(length) => i64::try_from(length).unwrap_or(i64::MAX),
                _ => -1,
            },
            body: body.as_ref().map(|(octets, cut)| (octets.as_slice(), *cut)),
            as_bytes,
            client: self.peer.remote,
            local: self.peer.local,
            connection: &self.peer.connection,
            service,
            context,
        }
    }

    /// Waits for the body, as much of it as may go with the question; it stays to be forwarded. `None` where there is none.
    async fn body_ahead(
        &mut self,
        buffers: &mut Buffers,
        passing: &Passing<'_, '_>,
        with: WithBody,
    ) -> Result<Body, Outcome> {
        let framing = buffers.request.fields.framing;
        if framing == Framing::None || buffers.request.connect || buffers.request.upgrade {
            return Ok(None);
        }
        loop {
            let Ok((mut octets, whole)) = body::peek(framing, buffers.request_in.unread()) else {
                let reply = Reply::new(400, "DPE").because("http1.codec_error").and_close();
                return Err(self.reply(buffers, reply).await);
            };
            if octets.len() > with.most && !with.partial {
                let reply = Reply::new(413, "")
                    .body(reply::reason(413))
                    .because("request_payload_too_large")
                    .changed_by(passing.levels);
                return Err(self.reply(buffers, reply).await);
            }
            if whole || octets.len() >= with.most {
                let cut = octets.len() > with.most || !whole;
                octets.truncate(with.most);
                return Ok(Some((octets, cut)));
            }
            match self.more(buffers).await {
                Ok(true) => {}
                Ok(false) => {
                    let reply = Reply::new(408, "SI").because("stream_idle_timeout").and_close();
                    return Err(self.reply(buffers, reply).await);
                }
                Err(Gone) => return Err(self.gone(passing)),
            }
        }
    }

    /// Reads more of the request's body; `false` when none comes in time.
    async fn more(&mut self, buffers: &mut Buffers) -> Result<bool, Gone> {
        let limit = self.manager.stream_idle_timeout.unwrap_or(Duration::MAX);
        let (stream, request) = (&mut self.stream, &mut buffers.request);
        if request.expects_continue {
            stream.write_all(reply::CONTINUE).await.map_err(|_| Gone)?;
            self.manager.stats.inc(self.worker.shard, HttpStat::Rq1xx);
            request.expects_continue = false;
        }
        let input = &mut buffers.request_in;
        let filled = std::future::poll_fn(|cx| input.poll_fill(cx, stream));
        match timeout(limit, filled).await {
            Ok(Ok(n)) if n > 0 => Ok(true),
            Ok(_) => Err(Gone),
            Err(_) => Ok(false),
        }
    }

    async fn denied(&mut self, buffers: &mut Buffers, passing: &Passing<'_, '_>, denial: &Denial) -> Outcome {
        let reply = Reply::new(denial.status, FLAG)
            .body(&denial.body)
            .because("ext_authz_denied")
            .changed_by(passing.levels)
            .adding(&denial.headers);
        self.reply(buffers, reply).await
    }

    async fn not_authorized(
        &mut self,
        buffers: &mut Buffers,
        passing: &Passing<'_, '_>,
        status: u16,
    ) -> Outcome {
        let reply = Reply::new(status, FLAG)
            .because("ext_authz_error")
            .changed_by(passing.levels);
        self.reply(buffers, reply).await
    }
}

/// Whether the service is asked about this request.
fn is_asked(filter: &Filter, filtered: &Filtered<'_>) -> bool {
    let holds = |rule: &ext_authz::Noted| {
        let mut noted = filtered.noted.iter().rev();
        let noted = noted.find(|noted| noted.prefix == rule.prefix);
        rule.holds(noted.map(|noted| (noted.policy, noted.allowed)))
    };
    filter.enabled.takes(fastrand::u64(..)) && filter.enabled_by.as_ref().is_none_or(holds)
}

/// Makes the changes to the request.
fn change(buffers: &mut Buffers, passing: &Passing<'_, '_>, changes: &Changes) {
    for name in &changes.remove {
        let head = buffers.request_in.head();
        buffers.request.fields.remove(head, name);
    }
    for AddHeader { name, value, how, .. } in &changes.request {
        let head = buffers.request_in.head();
        let there = buffers.request.fields.get(head, name).is_some();
        match how {
            AddHow::IfAbsent if there => continue,
            AddHow::OverwriteIfExists if !there => continue,
            AddHow::Overwrite | AddHow::OverwriteIfExists => buffers.request.fields.remove(head, name),
            _ => {}
        }
        buffers.add_to_request(name, value);
    }
    for AddHeader { name, value, .. } in &changes.joined {
        let head = buffers.request_in.head();
        let joined = buffers
            .request
            .fields
            .get(head, name)
            .map(|first| [first, b",", value].concat());
        if let Some(joined) = joined {
            buffers.request.fields.remove(head, name);
            buffers.add_to_request(name, &joined);
        }
    }
    if passing.rewrite.tunnel.is_none()
        && let Some(path) = ext_authz::with_query(crate::http1::rewrite::path(buffers), changes)
    {
        buffers.request.normalized = Some(path);
    }
}
