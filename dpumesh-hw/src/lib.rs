//! What dpumesh backends and hosts share.
//!
//! | module | for |
//! |---|---|
//! | [`dataplane`] | the software engine: frames between the ports of a card, by steering rules |
//! | [`flow`] | its tables: exact flows and masked rules |
//! | [`wire`] | its packet formats, checksums, segmentation and encapsulation |
//! | [`steering`] | the steering contract as a data structure, for backends that keep rules themselves |
//! | [`stream`] | transparent interception: how the proxy gets the pods' TCP |
//! | [`memory`] | the reference backend: the contract in executable form |
//! | [`wrap`] | decorators over any backend: trace, fault, limit, validate |
//! | [`ring`], [`shm`] | channels over shared memory |
//! | [`netns`], [`netlink`] | network namespaces and rtnetlink, without the programs `ip` and `nft` |
//! | [`journal`], [`events`] | a card's memory on disk, bounded event queues |
//! | [`trust`] | files that nobody else could have written |
#![cfg_attr(
    feature = "channel",
    doc = "| [`channel`] | gRPC between the node agent and the dataplane |"
)]
#![cfg_attr(
    feature = "conformance",
    doc = "| [`conformance`] | the kit that proves a backend |"
)]
#![cfg_attr(
    feature = "loader",
    doc = "| [`loader`] | backends in foreign libraries, behind a C interface |"
)]
#![deny(unsafe_code)]

#[allow(unsafe_code, reason = "a named home of unsafe: loom's cells, in tests")]
pub mod ring;

// Under `--cfg loom` only the rings are explored: mapped memory and foreign runtimes cannot hold loom's atomics.
#[cfg(all(feature = "channel", not(loom)))]
pub mod channel;
#[cfg(all(feature = "conformance", not(loom)))]
pub mod conformance;
#[cfg(not(loom))]
pub mod dataplane;
#[cfg(not(loom))]
pub mod events;
#[cfg(not(loom))]
pub mod flow;
#[cfg(not(loom))]
pub mod journal;
#[cfg(all(feature = "loader", not(loom)))]
#[allow(unsafe_code, reason = "a named home of unsafe: the C interface")]
pub mod loader;
#[cfg(not(loom))]
pub mod memory;
#[cfg(not(loom))]
pub mod netlink;
#[cfg(not(loom))]
pub mod netns;
#[cfg(not(loom))]
#[allow(
    unsafe_code,
    reason = "a named home of unsafe: mappings and received descriptors"
)]
pub mod shm;
#[cfg(not(loom))]
pub mod steering;
#[cfg(not(loom))]
pub mod stream;
#[cfg(not(loom))]
pub mod trust;
#[cfg(not(loom))]
pub mod wire;
#[cfg(not(loom))]
pub mod wrap;
