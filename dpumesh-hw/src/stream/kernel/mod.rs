//! The engine `kernel`: the kernel's own TCP in a private network namespace, the *stack namespace*.
//!
//! Steered frames enter it by the stack interface (`stk0`: the dataplane holds the other side of it); tproxy hands
//! every TCP packet to a transparent socket of the proxy ([`crate::netlink::nft`]); replies and the proxy's own
//! connections are routed out by the same interface, back to the dataplane.
//!
//! [`KernelStack::prepare`] makes a namespace such a stack, [`KernelEngine`] serves streams from it, and
//! [`transparent_listener`] and [`connect_from`] are its two kinds of socket. A proxy whose listeners have addresses and
//! options of their own uses the sockets without the engine: [`listen`], [`connect`], [`ingress`].

mod engine;
mod socket;
mod stack;

pub use engine::KernelEngine;
pub use socket::{
    Origin, SocketOptions, connect, connect_from, ingress, listen, original_destination, transparent_listener,
};
pub use stack::{HAIRPIN_MARK, InboundPort, KernelStack, KernelStackConfig, LocalSource, StackError};
