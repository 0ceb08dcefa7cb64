//! [`Ports`] of the emulated card: the uplink by its mode, VFs by their TAP or veth end.
//!
//! A VF opens when host and SoC hold the same lease, wherever its device is by then. One process at a time reads a port:
//! a lock file says so, which the kernel drops with its holder. An open port ends with `DeviceLost` when its lease is
//! revoked, when the card is lost, or when its device is deleted.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use async_trait::async_trait;
use dpumesh_core::{
    ErrorKind, Fence, Frame, MacAddr, PortInfo, PortIo, PortIoLimits, PortRef, Ports, Result,
};
use dpumesh_hw::journal::Guard;
use dpumesh_hw::netlink::{Link, Netlink};
use dpumesh_hw::netns::Namespace;

use crate::card::{Card, Change, Gate, error, index_of};
use crate::device::{PacketOptions, PacketPort, TapPort, UdpUplink};
use crate::impair::{Impaired, SystemClock};
use crate::{Mode, VfKind};

const UPLINK: PortRef = PortRef::Uplink(0);

/// Ports of an emulated card.
#[derive(Clone, Debug)]
pub(crate) struct TapPorts {
    card: Arc<Card>,
}

impl TapPorts {
    pub(crate) fn new(card: Arc<Card>) -> Self {
        Self { card }
    }

    async fn blocking<T: Send + 'static>(
        &self,
        operation: &'static str,
        work: impl FnOnce(&Self) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let ports = self.clone();
        let done = tokio::task::spawn_blocking(move || work(&ports)).await;
        done.unwrap_or_else(|failed| {
            Err(error(ErrorKind::Fault, operation, "the call broke off").source(failed))
        })
    }

    fn observe(&self) -> Result<Vec<PortInfo>> {
        const LIST: &str = "ports.list";
        let look = self.card.look(LIST)?;
        let mut ports = Vec::with_capacity(look.state.functions.len() + 1);
        let uplink = self.uplink_link(LIST)?;
        let mut info = PortInfo::new(UPLINK, self.card.options.uplink_mtu);
        info.mac = uplink.as_ref().and_then(|link| link.mac).map(MacAddr);
        info.link_up = uplink.as_ref().is_some_and(|link| link.up && link.carrier);
        info.netdev = uplink.map(|link| link.name);
        ports.push(info);
        if look.state.functions.is_empty() {
            return Ok(ports);
        }
        let mut yard = look.yard()?;
        for (index, function) in &look.state.functions {
            let found = yard.find(*index, function)?;
            let link = found.as_ref().map(|found| &found.link);
            let mtu = link.and_then(|link| u16::try_from(link.mtu).ok()?.try_into().ok());
            let mut info = PortInfo::new(PortRef::vf(*index), mtu.unwrap_or(function.attributes.mtu));
            info.mac = Some(
                link.and_then(|link| link.mac)
                    .map_or(function.attributes.mac, MacAddr),
            );
            info.link_up = link.is_some_and(|link| link.up);
            info.netdev = link.map(|link| link.name.clone());
            ports.push(info);
        }
        ports.sort_by_key(|info| info.port);
        Ok(ports)
    }

    fn attach(&self, fence: Fence, port: PortRef) -> Result<Box<dyn PortIo>> {
        const OPEN: &str = "ports.open";
        let change = self.card.fenced(OPEN, fence)?;
        let is_vf = change.state.function(port).is_some();
        if port != UPLINK && !is_vf {
            return Err(error(ErrorKind::NotFound, OPEN, "there is no such port").object(port));
        }
        if is_vf {
            check_lease(&change, OPEN, port)?;
        }
        let claim = self.card.claim(OPEN, port)?;
        let device = if is_vf {
            self.open_vf(&change, OPEN, port)?
        } else {
            self.open_uplink(OPEN)?
        };
        let gate = self.card.register(port, &change.state);
        Ok(Box::new(GuardedPort {
            device,
            gate,
            _claim: claim,
        }))
    }

    fn open_vf(
        &self,
        change: &Change<'_>,
        operation: &'static str,
        port: PortRef,
    ) -> Result<Box<dyn PortIo>> {
        let lost = || {
            error(
                ErrorKind::DeviceLost,
                operation,
                "its device is nowhere to be found",
            )
            .object(port)
        };
        let (Some(index), Some(function)) = (index_of(port), change.state.function(port)) else {
            return Err(lost());
        };
        let (namespace, name) = change.yard()?.representor(index, function)?.ok_or_else(lost)?;
        let mtu = function.attributes.mtu;
        Ok(match change.state.kind {
            VfKind::Tap => Box::new(TapPort::attach(port, &namespace, &name, mtu)?),
            VfKind::Veth => {
                let options = PacketOptions { bypass_qdisc: true };
                Box::new(PacketPort::open(port, &namespace, &name, mtu, options)?)
            }
        })
    }

    fn open_uplink(&self, operation: &'static str) -> Result<Box<dyn PortIo>> {
        let options = &self.card.options;
        let soc = self.soc(operation)?;
        let link = self.uplink_link(operation)?;
        let Some(link) = link else {
            let message = match &options.mode {
                Mode::Overlay { vtep } => {
                    format!("no interface of the SoC has the tunnel endpoint's address {vtep}")
                }
                Mode::Underlay { ifname } => format!("the SoC has no interface {ifname}"),
            };
            return Err(error(ErrorKind::NotFound, operation, message)
                .object(UPLINK)
                .field("mode"));
        };
        let mtu = options.uplink_mtu;
        if link.mtu < u32::from(mtu.get()) {
            let message = format!(
                "interface {} takes {} octets, {mtu} are asked for",
                link.name, link.mtu
            );
            return Err(error(ErrorKind::Invalid, operation, message)
                .object(UPLINK)
                .field("uplink_mtu"));
        }
        let device: Box<dyn PortIo> = match &options.mode {
            Mode::Overlay { vtep } => Box::new(UdpUplink::bind(UPLINK, soc, *vtep, mtu)?),
            Mode::Underlay { ifname } => {
                let options = PacketOptions { bypass_qdisc: false };
                Box::new(PacketPort::open(UPLINK, soc, ifname, mtu, options)?)
            }
        };
        Ok(match options.impairments {
            Some(impairments) => Box::new(Impaired::new(device, impairments, SystemClock::new()?)?),
            None => device,
        })
    }

    /// The interface behind the uplink.
    fn uplink_link(&self, operation: &'static str) -> Result<Option<Link>> {
        let failed = |failed: dpumesh_hw::netlink::NetlinkError| {
            error(ErrorKind::Io, operation, failed.to_string())
                .object(UPLINK)
                .source(failed)
        };
        let mut netlink = Netlink::open_in(self.soc(operation)?).map_err(failed)?;
        let links = netlink.links().map_err(failed)?;
        Ok(match &self.card.options.mode {
            Mode::Underlay { ifname } => links.into_iter().find(|link| link.name == *ifname),
            Mode::Overlay { vtep } => {
                let addresses = netlink.addresses().map_err(failed)?;
                let owner = addresses.into_iter().find(|address| address.net.addr() == *vtep);
                owner.and_then(|owner| links.into_iter().find(|link| link.index == owner.link))
            }
        })
    }

    fn soc(&self, operation: &'static str) -> Result<&Namespace> {
        self.card
            .soc
            .as_ref()
            .ok_or_else(|| error(ErrorKind::Unsupported, operation, "this side is not the SoC"))
    }
}

fn check_lease(change: &Change<'_>, operation: &'static str, port: PortRef) -> Result<()> {
    let function = change.state.function(port);
    let admitted = function.and_then(|function| function.admitted.as_ref());
    let held = function
        .and_then(|function| function.held.as_ref())
        .map(|held| &held.lease);
    if admitted.is_some() && admitted == held {
        return Ok(());
    }
    let message = match (admitted, held) {
        (None, _) => "its lease was not admitted",
        _ => "host and SoC do not hold the same lease",
    };
    Err(error(ErrorKind::Denied, operation, message).object(port))
}

/// A device that the card can close.
#[derive(Debug)]
struct GuardedPort {
    // Closed before the claim is given up: fields are dropped in this order.
    device: Box<dyn PortIo>,
    gate: Arc<Gate>,
    _claim: Guard,
}

impl GuardedPort {
    fn check(&self, operation: &'static str) -> Result<()> {
        if self.gate.is_closed() {
            let message = "its lease was revoked, or the card was lost";
            return Err(error(ErrorKind::DeviceLost, operation, message).object(self.device.port()));
        }
        Ok(())
    }
}

impl PortIo for GuardedPort {
    fn port(&self) -> PortRef {
        self.device.port()
    }

    fn limits(&self) -> PortIoLimits {
        self.device.limits()
    }

    fn receive(&mut self, frames: &mut [Frame]) -> Result<usize> {
        self.check("port.receive")?;
        self.device.receive(frames)
    }

    fn transmit(&mut self, frames: &mut [Frame]) -> Result<usize> {
        self.check("port.transmit")?;
        self.device.transmit(frames)
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        self.device.poll_fd()
    }

    fn refused(&self) -> u64 {
        self.device.refused()
    }
}

#[async_trait]
impl Ports for TapPorts {
    async fn list(&self) -> Result<Vec<PortInfo>> {
        self.blocking("ports.list", Self::observe).await
    }

    async fn open(&self, fence: Fence, port: PortRef) -> Result<Box<dyn PortIo>> {
        self.blocking("ports.open", move |ports| ports.attach(fence, port))
            .await
    }
}
