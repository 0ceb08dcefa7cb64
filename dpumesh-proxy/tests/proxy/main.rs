//! The proxy as its clients and endpoints see it: started in this process, on loopback, with plain sockets around it.

mod config;
mod envoy;
mod floods;
mod framing;
mod h2spec;
mod harness;
mod http;
mod http2;
mod limits;
mod load;
mod mesh;
mod mesh_policy;
mod netns;
mod policy;
mod reload;
mod stream;
mod tcp;
