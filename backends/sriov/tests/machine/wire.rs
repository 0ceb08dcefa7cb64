//! Frames in the machine: ends at which one can send and see them.

use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use dpumesh_core::{Frame, Mtu, PortIo, PortRef};
use dpumesh_hw::netlink::{LinkChange, Netlink, sysctl};
use dpumesh_hw::netns::Namespace;
use dpumesh_tap::device::{PacketOptions, PacketPort};

/// EtherType for experiments (IEEE 802): nobody else speaks it.
const EXPERIMENT: [u8; 2] = [0x88, 0xb5];

/// One network device at which frames are sent and seen.
pub(crate) struct End {
    pub(crate) name: &'static str,
    pub(crate) mac: [u8; 6],
    port: PacketPort,
}

impl End {
    /// Opens a device that is there, switches it on, and waits until it passes packets.
    pub(crate) fn open(name: &'static str, namespace: &Namespace, ifname: &str) -> Result<Self, String> {
        let _ = sysctl::set(namespace, &format!("ipv6/conf/{ifname}/disable_ipv6"), "1");
        let mut netlink = Netlink::open_in(namespace).map_err(|error| error.to_string())?;
        let link = netlink.link(ifname).map_err(|error| error.to_string())?;
        netlink
            .change_link(link.index, &LinkChange::new().arp(false).up())
            .map_err(|error| error.to_string())?;
        let until = Instant::now() + Duration::from_secs(10);
        while !netlink.link(ifname).map_err(|error| error.to_string())?.running && Instant::now() < until {
            thread::sleep(Duration::from_millis(20));
        }
        let options = PacketOptions { bypass_qdisc: false };
        let port = PacketPort::open(PortRef::Uplink(0), namespace, ifname, Mtu::ETHERNET, options)
            .map_err(|error| error.to_string())?;
        Ok(Self {
            name,
            mac: link.mac.unwrap_or_default(),
            port,
        })
    }

    /// Sends a marked frame.
    pub(crate) fn send(
        &mut self,
        to: [u8; 6],
        from: [u8; 6],
        vlan: Option<u16>,
        mark: u32,
    ) -> Result<(), String> {
        let mut octets = Vec::new();
        octets.extend(to);
        octets.extend(from);
        if let Some(vlan) = vlan {
            octets.extend([0x81, 0]);
            octets.extend(vlan.to_be_bytes());
        }
        octets.extend(EXPERIMENT);
        octets.extend(mark.to_be_bytes());
        octets.resize(64, 0);
        let mut frames = [Frame::copy_of(&octets)];
        self.port
            .transmit(&mut frames)
            .map(drop)
            .map_err(|error| error.to_string())
    }

    /// Marks of frames that arrived, with the VLAN tag that they had.
    pub(crate) fn seen(&mut self) -> Vec<(u32, Option<u16>)> {
        let mut frames: Vec<Frame> = (0..16).map(|_| Frame::new()).collect();
        let mut marks = Vec::new();
        while let Ok(count @ 1..) = self.port.receive(&mut frames) {
            marks.extend(frames[..count].iter().filter_map(|frame| mark_of(frame.octets())));
        }
        marks
    }
}

fn mark_of(octets: &[u8]) -> Option<(u32, Option<u16>)> {
    let (vlan, rest) = match octets.get(12..14)? {
        [0x81, 0] | [0x88, 0xa8] => (
            Some(u16::from_be_bytes([*octets.get(14)?, *octets.get(15)?]) & 0xfff),
            octets.get(16..)?,
        ),
        _ => (None, octets.get(12..)?),
    };
    let mark = rest.strip_prefix(&EXPERIMENT)?.first_chunk()?;
    Some((u32::from_be_bytes(*mark), vlan))
}

/// Runs busybox's `ip` in a namespace.
pub(crate) fn ip(namespace: &Namespace, arguments: &str) -> Result<(), String> {
    let arguments: Vec<String> = arguments.split(' ').map(str::to_owned).collect();
    let status = namespace
        .run(|| Command::new("/bin/ip").args(&arguments).status())
        .map_err(|error| error.to_string())?;
    match status {
        Ok(status) if status.success() => Ok(()),
        other => Err(format!("ip {arguments:?}: {other:?}")),
    }
}
