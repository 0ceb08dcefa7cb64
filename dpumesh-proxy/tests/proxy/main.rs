//! The proxy as its clients and endpoints see it: started in this process, on loopback, with plain sockets around it.

mod balance;
mod config;
mod envoy;
mod floods;
mod framing;
mod h2spec;
mod harness;
mod health;
mod http;
mod http2;
mod istio_metrics;
mod jwt;
mod limits;
mod load;
mod mesh;
mod mesh_policy;
mod mirror;
mod netns;
mod observe;
mod outlier;
mod policy;
mod ratelimit;
mod reload;
mod stream;
mod tcp;
mod tunnel;
