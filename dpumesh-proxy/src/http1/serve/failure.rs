//! Why an endpoint gave no (whole) response, and what the client is told in its place.

use std::net::SocketAddr;

use super::local::{Reply, RequestBody};
use super::{Outcome, Session};
use crate::http1::body::FlowError;
use crate::stats::{Cluster as ClusterStat, Http as Stat};
use crate::upstream::{Lane, NoConnection};
use crate::worker::Buffers;

const DISCONNECTED: &str = "upstream connect error or disconnect/reset before headers. reset reason: ";

/// Why a request got no (whole) response.
#[derive(Debug)]
pub(super) enum Failure {
    /// The client went away.
    Client,
    /// The client's body is malformed.
    BadBody,
    /// The route's timeout.
    Timeout,
    /// Nothing moved for the stream idle timeout.
    Idle,
    /// The endpoint closed; `answered` if it had said something.
    Upstream { answered: bool },
    /// The endpoint does not speak HTTP.
    Protocol,
}

impl Failure {
    pub(super) fn from_client(error: FlowError) -> Self {
        if matches!(error, FlowError::Framing(_)) {
            Self::BadBody
        } else {
            Self::Client
        }
    }

    /// Envoy's response flags for it.
    pub(super) fn flags(&self) -> &'static str {
        match self {
            Self::Client => "DC",
            Self::BadBody => "DPE",
            Self::Timeout => "UT",
            Self::Idle => "SI",
            Self::Upstream { .. } => "UC",
            Self::Protocol => "UPE",
        }
    }
}

impl Session {
    /// Answers for an endpoint to which there is no connection.
    pub(super) async fn not_connected(
        &mut self,
        buffers: &mut Buffers,
        failure: NoConnection,
        address: SocketAddr,
        body: RequestBody,
    ) -> Outcome {
        let (flags, reason) = match &failure {
            NoConnection::Overflow => ("UO", "overflow"),
            NoConnection::TimedOut => ("UF", "connection timeout"),
            NoConnection::Failed(error) => {
                tracing::debug!(endpoint = %address, %error, "connecting failed");
                ("UF", "remote connection failure")
            }
        };
        let text = format!("{DISCONNECTED}{reason}");
        let mut reply = Reply::new(503, flags)
            .body(&text)
            .for_endpoint(address)
            .after(body);
        if matches!(failure, NoConnection::Overflow) {
            reply = reply.header(b"x-envoy-overloaded", b"true");
        }
        self.reply(buffers, reply).await
    }

    /// Answers for an endpoint that did not.
    pub(super) async fn failed(
        &mut self,
        buffers: &mut Buffers,
        lane: &Lane,
        failure: Failure,
        address: SocketAddr,
        body: RequestBody,
    ) -> Outcome {
        let (stats, shard) = (&lane.cluster.stats, self.worker.shard);
        let (status, text) = match &failure {
            Failure::Client => {
                stats.inc(shard, ClusterStat::RqTxReset);
                self.manager.stats.inc(shard, Stat::RqRxReset);
                let mut outcome = Outcome::new(0, failure.flags());
                outcome.upstream = Some(address);
                return outcome;
            }
            Failure::BadBody => {
                stats.inc(shard, ClusterStat::RqTxReset);
                self.manager.stats.inc(shard, Stat::CxProtocolError);
                (400, "Bad Request".to_owned())
            }
            Failure::Timeout => {
                stats.inc(shard, ClusterStat::RqTimeout);
                (504, "upstream request timeout".to_owned())
            }
            Failure::Idle => {
                self.manager.stats.inc(shard, Stat::RqIdleTimeout);
                (408, "stream timeout".to_owned())
            }
            Failure::Upstream { .. } => {
                stats.inc(shard, ClusterStat::RqRxReset);
                (503, format!("{DISCONNECTED}connection termination"))
            }
            Failure::Protocol => {
                stats.inc(shard, ClusterStat::CxProtocolError);
                (502, format!("{DISCONNECTED}protocol error"))
            }
        };
        if status >= 500 {
            lane.count(status);
        }
        let reply = Reply::new(status, failure.flags())
            .body(&text)
            .for_endpoint(address)
            .after(body);
        self.reply(buffers, reply).await
    }
}
