//! The shared service proxy of a DPU's SoC.
//!
//! ```text
//! listener ─► filter chain ─► tls ─┬─ http1::serve ─► route ─┐   (http2: frames on either side)
//!                                  └─ tcp::relay ────────────┴─► upstream: cluster ─► endpoint ─► tls ─► connection
//! ```
//! Which endpoint is [`balance`]'s answer, by what [`health`] knows of them.
//!
//! Reads an Envoy v3 bootstrap ([`config`]), serves Envoy's admin paths ([`admin`]) and Envoy's statistics
//! ([`stats`]). One [`worker`] per core owns everything a request touches; [`program`] starts workers and the control
//! thread, for the program `dpu-proxy` and for whoever embeds it. What differs from Envoy: `dpumesh-proxy/README.md`.

#![forbid(unsafe_code)]

pub mod access_log;
pub mod admin;
mod alarm;
pub mod balance;
mod callout;
pub mod closing;
pub mod config;
pub mod dataplane;
mod dns;
pub mod entry;
pub mod ext_authz;
mod hand_over;
pub mod health;
pub mod histogram;
pub mod http1;
pub mod http2;
pub mod istio;
pub mod jwt;
pub mod levels;
pub mod listener;
pub mod overload;
pub mod program;
pub mod proxy_protocol;
pub mod ratelimit;
pub mod rbac;
pub mod route;
pub mod stats;
pub mod tcp;
pub mod tls;
pub mod trace;
mod turns;
pub mod upstream;
pub mod worker;
