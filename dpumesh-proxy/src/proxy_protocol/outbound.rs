//! `envoy.transport_sockets.upstream_proxy_protocol`: a header before all else on a connection to an endpoint.
//!
//! A connection has one header, so it serves the requests of one client connection only: [`Outbound::tells`] is part of a pool's key.

use std::net::SocketAddr;
use std::sync::Arc;

use super::{Ends, Passed, Version, chosen, local};
use crate::worker::Peer;

/// What is said to a cluster's endpoints.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outbound {
    /// In which version.
    pub version: Version,
    /// Which of the TLVs that came with the client's own header are passed on.
    pub passed: Passed,
    /// TLVs that are added, each as it is sent.
    pub added: Vec<u8>,
}

/// What a header says of a client, and so what a connection that has one is for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Told {
    ends: Ends,
    tlvs: Option<Arc<[u8]>>,
}

impl Outbound {
    /// What an endpoint is told of `peer`.
    pub fn tells(&self, peer: &Peer) -> Told {
        let passes = self.version == Version::V2 && self.passed != Passed::None;
        Told {
            ends: Ends {
                source: peer.remote,
                destination: peer.local,
            },
            tlvs: peer.tlvs.as_ref().filter(|_| passes).map(Arc::clone),
        }
    }

    /// The header of a connection for `peer`.
    pub fn header(&self, peer: &Peer) -> Vec<u8> {
        let Told { ends, tlvs } = self.tells(peer);
        if self.version == Version::V1 {
            return ends.line();
        }
        let mut all = self.added.clone();
        if let Some(tlvs) = tlvs {
            // One of a type that is added anew is not passed on.
            let added = |kind| !chosen(&self.added, |t| t == kind).is_empty();
            all.extend(chosen(&tlvs, |kind| self.passed.has(kind) && !added(kind)));
        }
        ends.binary(&all)
    }

    /// The header of a connection that the proxy makes for itself, from `source`.
    pub fn own(&self, source: SocketAddr, destination: SocketAddr) -> Vec<u8> {
        match self.version {
            Version::V1 => Ends { source, destination }.line(),
            Version::V2 => local(),
        }
    }
}
