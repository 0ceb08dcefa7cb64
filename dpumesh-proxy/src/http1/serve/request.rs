//! What becomes of one request: refuse it, answer it here, or forward it; then count and log it.

use std::cell::Cell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::SystemTime;

use tokio::time::Instant;

use super::filters::{Filtered, Passing};
use super::forward::Forwarding;
use super::local::Reply;
use super::redirect::location;
use super::view::{View, forwarded_for};
use super::{Outcome, Session, same_place};
use crate::balance::{Ask, policy};
use crate::config::model::{ClusterRef, Codec, HttpManager, Underscores};
use crate::http1::head::{Framing, Refusal};
use crate::http1::path;
use crate::http1::rewrite::{self, Changes, Rewrite};
use crate::http2::PREFACE;
use crate::istio::Reporting;
use crate::route::{Action, AddHeader, AddHow, Forward, HeaderChanges, Route, Target};
use crate::stats::{Cluster as ClusterStat, Http as Stat};
use crate::upstream::Lane;
use crate::worker::{Buffers, Program};

/// The route that takes a request.
struct Way<'a, 'r> {
    levels: [&'r HeaderChanges; 3],
    route: &'a Route,
    forward: &'a Forward,
}

/// The cluster that a route names outright, for the log of a request that does not get there.
fn named_cluster(route: &Route) -> Option<Arc<str>> {
    match &route.action {
        Action::Forward(forward) => match &forward.to {
            Target::Cluster(cluster) => Some(Arc::clone(&cluster.name)),
            _ => None,
        },
        _ => None,
    }
}

/// Brings the path into its one form, where the connection manager is told to.
fn normalize(buffers: &mut Buffers, manager: &HttpManager) -> Option<Reply<'static>> {
    if buffers.request.connect {
        return None;
    }
    match path::normalized(rewrite::path(buffers), manager.policy.path) {
        Ok(None) => None,
        Ok(fresh) => {
            buffers.request.normalized = fresh;
            None
        }
        Err(path::Refused) => Some(Reply::new(400, "").because("path_normalization_failed")),
    }
}

impl Session {
    /// Serves the request whose head stands in the buffer; true when the connection may go on.
    pub(super) async fn request(&mut self, buffers: &mut Buffers, length: usize) -> bool {
        let begun = Instant::now();
        let Buffers {
            request_in, request, ..
        } = buffers;
        let parsed = request.parse(&mut request_in.unread_mut()[..length]);
        if let Err(refusal) = parsed {
            if refusal == Refusal::Version && self.begins_http2(buffers) {
                self.preface = true;
                return false;
            }
            return self.refuse(buffers, refusal).await;
        }
        if buffers.request.fields.fields.len() > self.manager.max_headers {
            return self.refuse(buffers, Refusal::TooLarge).await;
        }
        buffers.request_in.keep_head(length);
        self.catch_up();
        self.served += 1;
        let wall = if self.manager.access_log.is_empty() {
            SystemTime::UNIX_EPOCH
        } else {
            SystemTime::now()
        };
        let manager = Arc::clone(&self.manager);
        let program = Rc::clone(&self.program);
        manager.stats.inc(self.worker.shard, Stat::RqTotal);
        manager.stats.inc(self.worker.shard, Stat::RqActive);
        let reporting = self.reporting.clone();
        let mut rewrite = Rewrite::new(&manager, &buffers.request, buffers.request_in.head());
        rewrite.reporting = reporting.as_ref();
        let traced = self.begin_trace(buffers, &manager, &mut rewrite);
        let overloaded = self.refused_by_overload(&manager);
        let refused = self
            .refused_by_rule(buffers, &manager)
            .or_else(|| normalize(buffers, &manager))
            .map(Reply::and_close);
        let outcome = match overloaded.or(refused) {
            Some(reply) => self.reply(buffers, reply).await,
            None => self.route(buffers, &manager, &program, &mut rewrite, begun).await,
        };
        manager.stats.dec(self.worker.shard, Stat::RqActive);
        manager.stats.record_since(self.worker.shard, Stat::RqTime, begun);
        self.count(&outcome);
        if rewrite.tunnel.is_some() {
            manager.stats.dec(self.worker.shard, Stat::CxUpgradesActive);
        }
        if let Some(reporting) = &reporting {
            self.report(buffers, &rewrite, &outcome, reporting, begun.elapsed());
        }
        if let Some(traced) = &traced {
            self.end_trace(buffers, &manager, &rewrite, (traced, &outcome));
        }
        if !manager.access_log.is_empty() {
            self.log_request(buffers, &rewrite, &outcome, (wall, begun));
        }
        if !outcome.keep && outcome.flags != "DC" {
            self.linger(buffers).await;
        }
        outcome.keep
    }

    /// Whether the octets that could not be read are the beginning of HTTP/2, and the connection may go on in it.
    fn begins_http2(&self, buffers: &Buffers) -> bool {
        let may = self.manager.codec == Codec::Auto && self.peer.connection.alpn.is_none();
        let first = self.served == 0 && !self.stream.is_http2();
        let octets = buffers.request_in.unread();
        let length = octets.len().min(PREFACE.len());
        may && first && octets[..length] == PREFACE[..length]
    }

    /// Takes up a newer configuration: same chain, new routes; a chain that is changed or gone, close after this request,
    /// which still goes by the old one as a whole: its references are places in its own list of clusters.
    fn catch_up(&mut self) {
        if self.worker.generation() == self.program.config.generation {
            return;
        }
        let program = self.worker.program();
        match same_place(&self.place, &program) {
            Some((place, manager)) => {
                self.manager = manager.unwrap_or_else(|| Arc::clone(&self.manager));
                self.place = place;
                self.reporting = Reporting::of(&program.config, &self.place.listener, &self.peer);
                self.program = program;
            }
            None => self.closing = true,
        }
    }

    /// The answer to a request where there is too much already.
    fn refused_by_overload(&self, manager: &HttpManager) -> Option<Reply<'static>> {
        self.worker.overload.refuses_request().then(|| {
            manager.stats.inc(self.worker.shard, Stat::RqOverloadClose);
            Reply::new(503, "OM").body("envoy overloaded").because("overload")
        })
    }

    /// The answer to a request that is refused whatever the routes say.
    fn refused_by_rule(&self, buffers: &Buffers, manager: &HttpManager) -> Option<Reply<'static>> {
        let request = &buffers.request;
        let head = buffers.request_in.head();
        if !request.fields.http11 && !manager.accept_http_10 {
            let reply = Reply::new(426, "DPE").body("Upgrade Required");
            return Some(reply.because("low_version"));
        }
        if request.absolute && !request.connect {
            manager.stats.inc(self.worker.shard, Stat::RqNonRelativePath);
        }
        if !request.has_host && (request.fields.http11 || manager.default_host_http_10.is_none()) {
            return Some(Reply::new(400, "").because("missing_host_header"));
        }
        if request.has_host && request.authority.is_empty() {
            return Some(Reply::new(400, "").because("missing_host_header"));
        }
        let has_underscore = || {
            let mut names = request.fields.fields.iter().map(|f| f.name.of_head(head));
            names.any(|name| name.contains(&b'_'))
        };
        (manager.underscores == Underscores::Reject && has_underscore()).then(|| Reply::new(400, ""))
    }

    async fn route<'a>(
        &mut self,
        buffers: &mut Buffers,
        manager: &'a HttpManager,
        program: &'a Program,
        rewrite: &mut Rewrite<'a>,
        begun: Instant,
    ) -> Outcome {
        let shard = self.worker.shard;
        let found = {
            let connection = &self.peer.connection;
            let view = View::new(buffers, rewrite.default_host, manager, connection);
            manager.routes.find(&view)
        };
        let configured = found.map(|(host, route)| [&route.headers, &host.headers, &manager.routes.headers]);
        let rendered = configured.map(|levels| levels.map(|level| self.rendered(buffers, rewrite, level)));
        let levels = configured.map(|levels| {
            let mut levels: [&HeaderChanges; 3] = levels;
            for (level, own) in levels.iter_mut().zip(rendered.iter().flatten()) {
                *level = own.as_deref().unwrap_or(level);
            }
            levels
        });
        rewrite.route_name = found.map(|(_, route)| route.name.as_str());
        if buffers.request.upgrade || buffers.request.connect {
            // Whatever is answered, no other request follows: what does follow may be meant for the tunnel.
            self.closing = true;
            let route = found.map(|(_, route)| route);
            match self.tunnel_asked_for(buffers, manager, route) {
                Ok(tunnel) => rewrite.tunnel = tunnel,
                Err(reply) => return self.reply(buffers, *reply).await,
            }
        }
        let mut filtered = Filtered::default();
        if !manager.policy.filters.is_empty() {
            let passing = Passing {
                manager,
                rewrite,
                route: found.map(|(_, route)| route),
                levels: levels.as_ref().map_or(&[], |l| l.as_slice()),
            };
            match self.filter(buffers, &passing).await {
                Ok(passed) => filtered = passed,
                Err(mut outcome) => {
                    outcome.cluster = found.and_then(|(_, route)| named_cluster(route));
                    return outcome;
                }
            }
        }
        let (Some((host, route)), Some(levels)) = (found, levels) else {
            manager.stats.inc(shard, Stat::NoRoute);
            let reply = Reply::new(404, "NR").because("route_not_found");
            return self.reply(buffers, reply).await;
        };
        let mut outcome = match &route.action {
            Action::Direct { status, body } => {
                manager.stats.inc(shard, Stat::RqDirectResponse);
                let reply = Reply::new(*status, "")
                    .body(body)
                    .because("direct_response")
                    .changed_by(&levels)
                    .adding(&filtered.response);
                self.reply(buffers, reply).await
            }
            Action::Redirect(redirect) => {
                manager.stats.inc(shard, Stat::RqRedirect);
                let location = location(redirect, route, buffers, rewrite);
                let reply = Reply::new(redirect.status, "")
                    .header(b"location", &location)
                    .because("direct_response")
                    .changed_by(&levels)
                    .adding(&filtered.response);
                self.reply(buffers, reply).await
            }
            Action::Forward(forward) => {
                manager.stats.inc(shard, Stat::RouterRqTotal);
                rewrite.tell_attempt = (host.attempt_count_in_request, host.attempt_count_in_response);
                let begun = if filtered.delayed { Instant::now() } else { begun };
                let way = Way {
                    levels,
                    route,
                    forward,
                };
                self.dispatch(buffers, manager, program, rewrite, (way, &filtered), begun)
                    .await
            }
        };
        outcome.besides.delayed = filtered.delayed;
        outcome
    }

    /// Finds the cluster that the route names and forwards the request to it.
    async fn dispatch<'a>(
        &mut self,
        buffers: &mut Buffers,
        manager: &'a HttpManager,
        program: &'a Program,
        rewrite: &mut Rewrite<'a>,
        (way, filtered): (Way<'a, '_>, &Filtered<'_>),
        begun: Instant,
    ) -> Outcome {
        let Way {
            levels: [of_route, of_host, of_table],
            route,
            forward,
        } = way;
        let mut of_cluster: Option<&HeaderChanges> = None;
        let mut subset = forward.subset.as_ref();
        let cluster = match &forward.to {
            Target::Cluster(cluster) => Some(cluster),
            Target::Weighted(split) => {
                let (cluster, changes, of_split) = split.pick(fastrand::u64(..));
                of_cluster = Some(changes);
                subset = of_split.as_ref().or(subset);
                Some(cluster)
            }
            Target::Header(name, all) => buffers
                .request
                .fields
                .get(buffers.request_in.head(), name)
                .and_then(|value| all.get(value)),
        };
        let lane = cluster.and_then(|c: &ClusterRef| program.lanes.get(c.index?));
        let original = lane.map(|lane| self.original(buffers, rewrite, lane));
        let mut outcome = match lane {
            Some(lane) if original == Some(None) => {
                // It says no address: there is no endpoint.
                lane.cluster
                    .stats
                    .inc(self.worker.shard, ClusterStat::CxNoneHealthy);
                let reply = Reply::new(503, "UH")
                    .body("no healthy upstream")
                    .because("no_healthy_upstream");
                self.reply(buffers, reply).await
            }
            Some(lane) => {
                let rendered = of_cluster.and_then(|level| self.rendered(buffers, rewrite, level));
                rewrite.plan(forward, route, buffers);
                let of_cluster = rendered.as_deref().or(of_cluster);
                let levels = [of_cluster, Some(of_route), Some(of_host), Some(of_table)];
                let mut cookies = Vec::new();
                let hash = self.hash(buffers, manager, rewrite, (forward, lane), &mut cookies);
                let mut changes = Changes::of(&levels);
                changes.add_to_response(&filtered.response);
                changes.add_to_response(&cookies);
                let bodiless = buffers.request.fields.framing == Framing::None;
                let deadline = rewrite.timeout(forward, buffers).map(|t| begun + t);
                let stream_end = rewrite.stream_limit(manager, forward, buffers).map(|t| begun + t);
                let mut forwarding = Forwarding {
                    manager,
                    lane,
                    ask: Ask {
                        hash,
                        subset,
                        ..Ask::any(original.flatten().unwrap_or(self.peer.local))
                    },
                    forward,
                    changes,
                    rewrite,
                    begun,
                    complete: Cell::new(bodiless.then_some(begun)),
                    sent: Cell::default(),
                    deadline,
                    try_deadline: None,
                    stream_end,
                    attempt_end: None,
                    head_length: 0,
                    copies: Vec::new(),
                };
                self.forward(buffers, &mut forwarding).await
            }
            None => {
                manager.stats.inc(self.worker.shard, Stat::NoCluster);
                let reply = Reply::new(forward.not_found_status, "NC").because("cluster_not_found");
                self.reply(buffers, reply).await
            }
        };
        outcome.cluster = cluster.map(|c| Arc::clone(&c.name));
        if self.reporting.is_some() {
            outcome.to = lane.map(|lane| Arc::clone(&lane.cluster));
        }
        outcome
    }

    /// The address that the client meant: the connection's, or what the request says of it where the cluster goes by that.
    fn original(&self, buffers: &Buffers, rewrite: &Rewrite<'_>, lane: &Lane) -> Option<SocketAddr> {
        let Some(name) = &lane.cluster.original_header else {
            return Some(self.peer.local);
        };
        let head = buffers.request_in.head();
        let text = if name == b":authority" {
            let authority = buffers.request.authority.of_head(head);
            rewrite.default_host.unwrap_or(authority)
        } else {
            buffers.request.fields.get(head, name)?
        };
        std::str::from_utf8(text).ok()?.parse().ok()
    }

    /// What consistent hashing goes by, where the cluster asks for it; cookies that are given to the client.
    fn hash(
        &self,
        buffers: &Buffers,
        manager: &HttpManager,
        rewrite: &Rewrite<'_>,
        (forward, lane): (&Forward, &Lane),
        cookies: &mut Vec<AddHeader>,
    ) -> Option<u64> {
        if forward.hash.is_empty() || !lane.cluster.spread.balance.hashes() {
            return None;
        }
        let view = View::new(buffers, rewrite.default_host, manager, &self.peer.connection);
        let sender = policy::Sender {
            ip: forwarded_for(buffers).unwrap_or_else(|| self.peer.remote.ip()),
            remote: self.peer.remote,
            local: self.peer.local,
        };
        policy::of_request(&forward.hash, &view, &sender, |value| {
            cookies.push(AddHeader {
                name: b"set-cookie".to_vec(),
                value,
                template: None,
                how: AddHow::Append,
            });
        })
    }
}
