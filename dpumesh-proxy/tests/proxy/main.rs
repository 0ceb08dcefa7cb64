//! The proxy as its clients and endpoints see it: started in this process, on loopback, with plain sockets around it.

mod config;
mod envoy;
mod framing;
mod harness;
mod http;
mod http2;
mod istio_metrics;
mod load;
mod mesh;
mod mesh_policy;
mod netns;
mod observe;
mod policy;
mod reload;
mod stream;
mod tcp;
