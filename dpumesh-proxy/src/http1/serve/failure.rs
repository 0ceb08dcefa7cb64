//! Why an endpoint gave no (whole) response, and what the client is told in its place.

use std::net::SocketAddr;

use h2::Reason;

use super::local::{Reply, RequestBody};
use super::{Outcome, Session};
use crate::health::outlier::Outcome as Noted;
use crate::http1::body::FlowError;
use crate::http1::head::Framing;
use crate::http2;
use crate::stats::{Cluster as ClusterStat, Http as Stat};
use crate::upstream::{Lane, NoConnection};
use crate::worker::Buffers;

/// gRPC's status for it.
const DEADLINE_EXCEEDED: u32 = 4;

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
    /// One attempt's time limit.
    TryTimeout,
    /// The connection manager's or the route's limit on the exchange as a whole.
    StreamDuration,
    /// The cluster's limit on an attempt as a whole.
    AttemptDuration,
    /// The endpoint closed; `answered` if it had said something, `begun` if something had been sent to it.
    Upstream { answered: bool, begun: bool },
    /// The endpoint reset the HTTP/2 stream; `refused` if it says that it has not looked at the request.
    Reset { refused: bool, begun: bool },
    /// The endpoint does not speak HTTP.
    Protocol { begun: bool },
}

/// Why an attempt gave no response.
#[derive(Debug)]
pub(super) enum Broken {
    /// There was no connection.
    NotConnected(NoConnection),
    /// There was one.
    Failed(Failure),
}

impl Failure {
    pub(super) fn from_client(error: FlowError) -> Self {
        if matches!(error, FlowError::Framing(_)) {
            Self::BadBody
        } else {
            Self::Client
        }
    }

    /// What an error in reading from the endpoint is.
    pub(super) fn from_endpoint(error: Option<&std::io::Error>, answered: bool, begun: bool) -> Self {
        match error.and_then(http2::reset_of) {
            Some(reset) if reset.ours => Self::Protocol { begun },
            Some(reset) => Self::Reset {
                refused: reset.reason == Reason::REFUSED_STREAM,
                begun,
            },
            None => Self::Upstream { answered, begun },
        }
    }

    /// What outlier detection makes of it.
    pub(super) fn noted(&self) -> Option<Noted> {
        match self {
            Self::Upstream { .. } | Self::Reset { .. } | Self::Protocol { .. } => Some(Noted::Failed),
            Self::Timeout | Self::TryTimeout => Some(Noted::TimedOut),
            Self::Client | Self::BadBody | Self::Idle | Self::StreamDuration | Self::AttemptDuration => None,
        }
    }

    /// Envoy's response flags for it.
    pub(super) fn flags(&self) -> &'static str {
        match self {
            Self::Client => "DC",
            Self::BadBody => "DPE",
            Self::Timeout | Self::TryTimeout => "UT",
            Self::Idle => "SI",
            Self::StreamDuration => "",
            Self::AttemptDuration => "UMSDR",
            Self::Upstream { .. } => "UC",
            Self::Reset { .. } => "UR",
            Self::Protocol { .. } => "UPE",
        }
    }

    /// Envoy's details for it, before the response has begun.
    fn details(&self) -> &'static str {
        match self {
            Self::Client => "downstream_remote_disconnect",
            Self::BadBody => "http1.codec_error",
            Self::Timeout => "response_timeout",
            Self::TryTimeout => "upstream_per_try_timeout",
            Self::Idle => "stream_idle_timeout",
            Self::StreamDuration => "max_duration_timeout",
            Self::AttemptDuration => "upstream_max_stream_duration_reached",
            Self::Upstream { .. } => "upstream_reset_before_response_started{connection_termination}",
            Self::Reset { refused: false, .. } => "upstream_reset_before_response_started{remote_reset}",
            Self::Reset { refused: true, .. } => {
                "upstream_reset_before_response_started{remote_refused_stream_reset}"
            }
            Self::Protocol { .. } => "upstream_reset_before_response_started{protocol_error}",
        }
    }

    /// Envoy's details for it, once the response has begun.
    pub(super) fn late_details(&self) -> &'static str {
        match self {
            Self::Upstream { .. } => "upstream_reset_after_response_started{connection_termination}",
            Self::Reset { refused: false, .. } => "upstream_reset_after_response_started{remote_reset}",
            Self::Reset { refused: true, .. } => {
                "upstream_reset_after_response_started{remote_refused_stream_reset}"
            }
            Self::Protocol { .. } => "upstream_reset_after_response_started{protocol_error}",
            other => other.details(),
        }
    }
}

impl Session {
    /// Answers for an endpoint that gave no response.
    pub(super) async fn broken(
        &mut self,
        buffers: &mut Buffers,
        lane: &Lane,
        broken: Broken,
        address: SocketAddr,
        body: RequestBody,
    ) -> Outcome {
        match broken {
            Broken::NotConnected(failure) => self.not_connected(buffers, failure, address, body).await,
            Broken::Failed(failure) => self.failed(buffers, lane, failure, address, body).await,
        }
    }

    /// Answers for an endpoint to which there is no connection.
    async fn not_connected(
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
        let details = match &failure {
            NoConnection::Overflow => "upstream_reset_before_response_started{overflow}",
            NoConnection::TimedOut => "upstream_reset_before_response_started{connection_timeout}",
            NoConnection::Failed(_) => "upstream_reset_before_response_started{remote_connection_failure}",
        };
        let mut reply = Reply::new(503, flags)
            .body(&text)
            .because(details)
            .for_endpoint(address)
            .after(body);
        if matches!(failure, NoConnection::Overflow) {
            reply = reply.header(b"x-envoy-overloaded", b"true");
        }
        let mut outcome = self.reply(buffers, reply).await;
        if let NoConnection::Failed(error) = &failure {
            let text = error.to_string();
            // "(os error 111)" is no part of the reason.
            let text = text.split(" (os error").next().unwrap_or_default();
            outcome.transport_failure = Some(text.replace(' ', "_"));
        }
        outcome
    }

    /// Answers for an endpoint that did not.
    async fn failed(
        &mut self,
        buffers: &mut Buffers,
        lane: &Lane,
        failure: Failure,
        address: SocketAddr,
        body: RequestBody,
    ) -> Outcome {
        let (stats, shard) = (&lane.cluster.stats, self.worker.shard);
        // Of a client that has not said all, it is not the endpoint that is late.
        let late = if body == RequestBody::Taken || buffers.request.fields.framing == Framing::None {
            504
        } else {
            408
        };
        let (status, text) = match &failure {
            Failure::Client => {
                stats.inc(shard, ClusterStat::RqTxReset);
                self.manager.stats.inc(shard, Stat::RqRxReset);
                let mut outcome = Outcome::new(0, failure.flags());
                outcome.details = failure.details().into();
                outcome.upstream = Some(address);
                return outcome;
            }
            Failure::BadBody => {
                stats.inc(shard, ClusterStat::RqTxReset);
                self.manager.stats.inc(shard, Stat::CxProtocolError);
                (400, "Bad Request".to_owned())
            }
            Failure::Timeout | Failure::TryTimeout => {
                let per_try = matches!(failure, Failure::TryTimeout);
                let member = if per_try {
                    ClusterStat::RqPerTryTimeout
                } else {
                    ClusterStat::RqTimeout
                };
                stats.inc(shard, member);
                (504, "upstream request timeout".to_owned())
            }
            Failure::StreamDuration => {
                self.manager.stats.inc(shard, Stat::RqMaxDuration);
                stats.inc(shard, ClusterStat::RqTxReset);
                (late, "downstream duration timeout".to_owned())
            }
            Failure::AttemptDuration => {
                stats.inc(shard, ClusterStat::RqMaxDuration);
                stats.inc(shard, ClusterStat::RqTxReset);
                (late, "upstream max stream duration reached".to_owned())
            }
            Failure::Idle => {
                self.manager.stats.inc(shard, Stat::RqIdleTimeout);
                (408, "stream timeout".to_owned())
            }
            Failure::Upstream { .. } => {
                stats.inc(shard, ClusterStat::RqRxReset);
                (503, format!("{DISCONNECTED}connection termination"))
            }
            Failure::Reset { refused, .. } => {
                stats.inc(shard, ClusterStat::RqRxReset);
                let reason = if *refused {
                    "remote refused stream reset"
                } else {
                    "remote reset"
                };
                (503, format!("{DISCONNECTED}{reason}"))
            }
            Failure::Protocol { .. } => {
                stats.inc(shard, ClusterStat::CxProtocolError);
                (502, format!("{DISCONNECTED}protocol error"))
            }
        };
        if status >= 500 {
            lane.count(status);
        }
        let mut reply = Reply::new(status, failure.flags());
        if matches!(failure, Failure::StreamDuration) {
            reply = reply.grpc_status(DEADLINE_EXCEEDED);
        }
        let reply = reply
            .body(&text)
            .because(failure.details())
            .for_endpoint(address)
            .after(body);
        self.reply(buffers, reply).await
    }
}
