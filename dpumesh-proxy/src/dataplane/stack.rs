//! The stack namespace: where the proxy's sockets are, and the port through which frames get there.
//!
//! The interface outlives the dataplane (a persistent TAP, or a veth pair), so that connections of the proxy survive
//! its restart; preparing an existing stack again changes nothing that is right already.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use clap::Args as ClapArgs;
use dpumesh_core::{MacAddr, Mtu, PortIo, PortRef};
use dpumesh_hw::dataplane::PortPolicy;
use dpumesh_hw::netlink::{LinkChange, Netlink, NetlinkError};
use dpumesh_hw::netns::{Namespace, NamespaceError};
use dpumesh_hw::stream::kernel::{InboundPort, KernelStack, KernelStackConfig, LocalSource};
use dpumesh_tap::VfKind;
use dpumesh_tap::device::{PacketOptions, PacketPort, TapPort, create_pair, create_tap, ready_card_end};

use super::STACK_GATEWAY;

/// Name of the interface in the stack namespace.
const INTERFACE: &str = "stk0";
/// Name of the card's end of a veth stack interface.
const CARD_END: &str = "stk0-card";

/// Where the proxy is.
#[derive(Debug, Clone, ClapArgs)]
pub struct StackArgs {
    /// Network namespace in which the proxy's workers run
    #[arg(
        long,
        value_name = "PATH",
        required_unless_present = "completions",
        default_value = "unset",
        hide_default_value = true
    )]
    pub stack_netns: PathBuf,
    /// TCP port of the proxy's transparent listener
    #[arg(long, value_name = "PORT", default_value_t = 15001)]
    pub proxy_port: u16,
    /// TCP port of the proxy's transparent listener for what comes to pods, where that is another one: from the network, and
    /// from the proxy itself for pods of this node
    #[arg(long, value_name = "PORT")]
    pub inbound_port: Option<u16>,
    /// IPv4 source of the node's own connections and of a pod's connections to itself
    #[arg(long, value_name = "ADDR", default_value = "169.254.77.1")]
    pub local_source_v4: Ipv4Addr,
    /// The same for IPv6
    #[arg(long, value_name = "ADDR", default_value = "fd77::1")]
    pub local_source_v6: Ipv6Addr,
    /// Congestion control of the proxy's connections; the system's by default
    #[arg(long, value_name = "NAME")]
    pub congestion: Option<String>,
}

/// What kept the stack from being opened.
#[derive(Debug, thiserror::Error)]
pub enum StackError {
    /// The namespace.
    #[error("--stack-netns: {0}")]
    Namespace(#[from] NamespaceError),
    /// Its interface.
    #[error("stack interface: {0}")]
    Link(#[from] NetlinkError),
    /// Its port.
    #[error("stack port: {0}")]
    Port(#[from] dpumesh_core::Error),
    /// Routing and interception in it.
    #[error(transparent)]
    Prepare(#[from] dpumesh_hw::stream::kernel::StackError),
}

/// The way into the stack.
#[derive(Debug)]
pub(super) struct Stack {
    pub(super) port: Box<dyn PortIo>,
    pub(super) policy: PortPolicy,
    pub(super) kernel: KernelStack,
}

/// Makes the interface if need be, sets up interception, and opens the port. The card's end of a veth interface is in
/// `fabric`.
pub(super) fn open(
    args: &StackArgs,
    kind: VfKind,
    fabric: &Namespace,
    mtu: Mtu,
) -> Result<Stack, StackError> {
    let namespace = Namespace::open(&args.stack_netns)?;
    make_interface(&namespace, fabric, kind)?;
    let mut netlink = Netlink::open_in(&namespace)?;
    let link = netlink.link(INTERFACE)?;
    netlink.change_link(
        link.index,
        &LinkChange::new().mtu(u32::from(mtu.get())).arp(false),
    )?;
    let port = PortRef::Stack(0);
    // The port first: a TAP has no carrier, and preparing waits for one, until somebody holds it.
    let port: Box<dyn PortIo> = match kind {
        VfKind::Tap => Box::new(TapPort::attach(port, &namespace, INTERFACE, mtu)?),
        VfKind::Veth => {
            let options = PacketOptions { bypass_qdisc: true };
            Box::new(PacketPort::open(port, fabric, CARD_END, mtu, options)?)
        }
    };
    let local = LocalSource {
        v4: Some(args.local_source_v4),
        v6: Some(args.local_source_v6),
    };
    let mut config = KernelStackConfig::new(INTERFACE, args.proxy_port, local);
    config.metrics.congestion.clone_from(&args.congestion);
    config.inbound = args.inbound_port.map(|port| InboundPort {
        port,
        network: super::uplink_ingress(),
    });
    let kernel = KernelStack::prepare(&namespace, config)?;
    // Those of a former life are told anew.
    kernel.set_local_pods(&BTreeSet::new())?;
    let mac = MacAddr(link.mac.unwrap_or_default()); // Ethernet: always there
    let policy = PortPolicy::Stack {
        mac,
        gateway: STACK_GATEWAY,
    };
    Ok(Stack { port, policy, kernel })
}

fn make_interface(namespace: &Namespace, fabric: &Namespace, kind: VfKind) -> Result<(), StackError> {
    let is_there = match Netlink::open_in(namespace)?.link(INTERFACE) {
        Ok(_) => true,
        Err(error) if error.is_missing() => false,
        Err(error) => return Err(error.into()),
    };
    match (kind, is_there) {
        (VfKind::Tap, true) => {}
        (VfKind::Tap, false) => create_tap(namespace, INTERFACE)?,
        // A dataplane that died may have left it half made.
        (VfKind::Veth, true) => ready_card_end(fabric, CARD_END)?,
        (VfKind::Veth, false) => create_pair(namespace, INTERFACE, fabric, CARD_END)?,
    }
    Ok(())
}
