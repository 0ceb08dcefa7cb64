//! Tokens of a request: verified, taken out where they go no further, their claims kept for the access rules behind.

use std::borrow::Cow;
use std::io;
use std::rc::Rc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::{URL_SAFE, URL_SAFE_NO_PAD};
use tokio::time::timeout;

use super::filters::{Filtered, Passing};
use super::local::Reply;
use super::{Outcome, Session};
use crate::callout;
use crate::http1::rewrite;
use crate::jwt::remote::Remote;
use crate::jwt::token::Fault;
use crate::jwt::{Filter, Source, Verified};
use crate::route::RequestView;
use crate::stats::Jwt as Stat;
use crate::worker::Buffers;

/// Octets of a key set that are taken.
const LONGEST_KEYS: usize = 1 << 20;

impl Session {
    /// Runs the filter; `Err` when it refused the request.
    pub(super) async fn authenticate(
        &mut self,
        buffers: &mut Buffers,
        passing: &Passing<'_, '_>,
        filter: &Filter,
        filtered: &mut Filtered<'_>,
    ) -> Result<(), Outcome> {
        let shard = self.worker.shard;
        if filter.bypass_preflight && is_preflight(buffers) {
            filter.stats.inc(shard, Stat::CorsPreflightBypassed);
            filter.stats.inc(shard, Stat::Allowed);
            return Ok(());
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let unfetched = {
            let view = self.view(buffers, passing);
            let requirement = filter.requirement(&view);
            requirement.map_or_else(Vec::new, |r| filter.unfetched(r, &view))
        };
        for remote in unfetched {
            let fetching = self.fetch(filter, remote);
            if Box::pin(self.meanwhile(buffers, fetching)).await.is_err() {
                return Err(self.gone(passing));
            }
        }
        let verified = {
            let view = self.view(buffers, passing);
            match filter.requirement(&view) {
                None => Ok(Verified::default()),
                Some(requirement) => filter.verify(requirement, &view, now.as_secs()),
            }
        };
        // Nobody but this filter says what a token said.
        for (name, _) in filter.providers.iter().filter_map(|p| p.payload_header.as_ref()) {
            let head = buffers.request_in.head();
            buffers.request.fields.remove(head, name);
        }
        match verified {
            Ok(verified) => {
                filter.stats.inc(shard, Stat::Allowed);
                take(buffers, filter, verified, filtered);
                Ok(())
            }
            Err(fault) => {
                filter.stats.inc(shard, Stat::Denied);
                let realm = self.realm(buffers, passing, fault);
                let reply = Reply::new(fault.status(), "")
                    .header(b"www-authenticate", &realm)
                    .body(fault.text())
                    .changed_by(passing.levels);
                let mut outcome = self.reply(buffers, reply).await;
                outcome.details = Cow::Owned(fault.details());
                Err(outcome)
            }
        }
    }

    /// Fetches a provider's keys, if nobody else does.
    fn fetch<'f>(&self, filter: &'f Filter, remote: &'f Remote) -> impl Future<Output = ()> + use<'f> {
        let lane = remote.cluster.index.and_then(|i| self.program.lanes.get(i));
        let lane = lane.map(Rc::clone);
        let worker = Rc::clone(&self.worker);
        let peer = callout::asks_for(&self.peer, self.place.listener.direction);
        async move {
            let Some(_turn) = remote.turn().await else {
                return;
            };
            let shard = worker.shard;
            let answer = match lane {
                Some(lane) => {
                    let call = callout::call(worker, lane, peer, remote.request.clone(), LONGEST_KEYS);
                    timeout(remote.timeout.unwrap_or(Duration::MAX), call).await
                }
                None => Ok(Err(io::Error::other("there is no such cluster"))),
            };
            let answer = match answer {
                Ok(Ok(answer)) if answer.status == 200 => Ok(answer.body),
                Ok(Ok(answer)) => Err(format!("status {}", answer.status)),
                Ok(Err(error)) => Err(error.to_string()),
                Err(_) => Err("no answer in time".to_owned()),
            };
            let kept = remote.keep(answer.as_deref().ok());
            let member = if kept.is_ok() {
                Stat::JwksFetchSuccess
            } else {
                Stat::JwksFetchFailed
            };
            filter.stats.inc(shard, member);
            if let Err(error) = answer.map(|_| ()).and(kept) {
                tracing::warn!(cluster = %remote.cluster.name, %error, "no keys for tokens");
            }
        }
    }

    fn realm(&self, buffers: &Buffers, passing: &Passing<'_, '_>, fault: Fault) -> Vec<u8> {
        let view = self.view(buffers, passing);
        let path = view.path();
        let path = path.split(|b| *b == b'?').next().unwrap_or(path);
        let error: &[u8] = if fault == Fault::Missing {
            b""
        } else {
            b", error=\"invalid_token\""
        };
        [
            b"Bearer realm=\"".as_slice(),
            view.scheme(),
            b"://",
            view.host(),
            path,
            b"\"",
            error,
        ]
        .concat()
    }
}

fn is_preflight(buffers: &Buffers) -> bool {
    let head = buffers.request_in.head();
    let fields = &buffers.request.fields;
    let said = |name: &[u8]| fields.get(head, name).is_some_and(|value| !value.is_empty());
    buffers.request.method.of_head(head) == b"OPTIONS"
        && said(b"origin")
        && said(b"access-control-request-method")
}

/// Does with good tokens what their providers say.
fn take(buffers: &mut Buffers, filter: &Filter, verified: Verified, filtered: &mut Filtered<'_>) {
    for (index, token) in &verified.tokens {
        let provider = &filter.providers[*index];
        if let Some((name, pad)) = &provider.payload_header {
            let payload = token.split('.').nth(1).unwrap_or_default();
            let value = match URL_SAFE_NO_PAD.decode(payload) {
                Ok(octets) if *pad => URL_SAFE.encode(octets),
                _ => payload.to_owned(),
            };
            buffers.add_to_request(name, value.as_bytes());
        }
        if !provider.forward {
            for source in &provider.sources {
                remove(buffers, source, token);
            }
        }
    }
    filtered.claims.get_or_insert_default().add(verified.claims);
}

fn remove(buffers: &mut Buffers, source: &Source, token: &str) {
    match source {
        Source::Header(name, _) => {
            let head = buffers.request_in.head();
            let fields = &mut buffers.request.fields;
            let holds = |value: &[u8]| memchr::memmem::find(value, token.as_bytes()).is_some();
            if fields.get(head, name).is_some_and(holds) {
                fields.remove(head, name);
            }
        }
        Source::Parameter(name) => {
            let path = rewrite::path(buffers);
            let Some(mark) = path.iter().position(|b| *b == b'?') else {
                return;
            };
            let named = |pair: &&[u8]| pair.split(|b| *b == b'=').next() == Some(name);
            let pairs = path[mark + 1..].split(|b| *b == b'&');
            if !pairs.clone().any(|pair| named(&pair)) {
                return;
            }
            let left: Vec<&[u8]> = pairs.filter(|pair| !named(pair)).collect();
            let mut fresh = path[..mark].to_vec();
            if !left.is_empty() {
                fresh.push(b'?');
                fresh.extend_from_slice(&left.join(&b'&'));
            }
            buffers.request.normalized = Some(fresh);
        }
        // As in Envoy, cookies stay.
        Source::Cookie(_) => {}
    }
}
