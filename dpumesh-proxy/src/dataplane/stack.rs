//! The stack namespace: where the proxy's sockets are, and the port through which frames get there.
//!
//! The interface outlives the dataplane (a persistent TAP, or a veth pair), so that connections of the proxy survive
//! its restart; preparing an existing stack again changes nothing that is right already.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use clap::Args as ClapArgs;
use dpumesh_core::{MacAddr, Mtu, PortIo, PortRef};
use dpumesh_hw::dataplane::PortPolicy;
use dpumesh_hw::netlink::{LinkChange, Netlink, NetlinkError, VethEnd};
use dpumesh_hw::netns::{Namespace, NamespaceError};
use dpumesh_hw::stream::kernel::{KernelStack, KernelStackConfig, LocalSource};
use dpumesh_tap::VfKind;
use dpumesh_tap::device::{PacketOptions, PacketPort, TapPort, create_tap};

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
        default_value = ""
    )]
    pub stack_netns: PathBuf,
    /// TCP port of the proxy's transparent listener
    #[arg(long, value_name = "PORT", default_value_t = 15001)]
    pub proxy_port: u16,
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
}

/// Makes the interface if need be, sets up interception, and opens the port.
pub(super) fn open(args: &StackArgs, kind: VfKind, mtu: Mtu) -> Result<Stack, StackError> {
    let namespace = Namespace::open(&args.stack_netns)?;
    let soc = Namespace::current()?;
    make_interface(&namespace, &soc, kind)?;
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
            Box::new(PacketPort::open(port, &soc, CARD_END, mtu, options)?)
        }
    };
    let local = LocalSource {
        v4: Some(args.local_source_v4),
        v6: Some(args.local_source_v6),
    };
    let mut config = KernelStackConfig::new(INTERFACE, args.proxy_port, local);
    config.metrics.congestion.clone_from(&args.congestion);
    KernelStack::prepare(&namespace, config)?;
    let mac = MacAddr(link.mac.unwrap_or_default()); // Ethernet: always there
    let policy = PortPolicy::Stack {
        mac,
        gateway: STACK_GATEWAY,
    };
    Ok(Stack { port, policy })
}

fn make_interface(namespace: &Namespace, soc: &Namespace, kind: VfKind) -> Result<(), StackError> {
    match Netlink::open_in(namespace)?.link(INTERFACE) {
        Ok(_) => return Ok(()),
        Err(error) if error.is_missing() => {}
        Err(error) => return Err(error.into()),
    }
    match kind {
        VfKind::Tap => create_tap(namespace, INTERFACE)?,
        VfKind::Veth => {
            let stack_end = VethEnd::new(INTERFACE).in_namespace(namespace);
            let card_end = VethEnd::new(CARD_END);
            Netlink::open_in(soc)?.create_veth(&card_end, &stack_end)?;
        }
    }
    Ok(())
}
