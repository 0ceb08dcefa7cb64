//! [`TapOptions`]: what the caller says about a node's emulated card and about this side of it.

use std::net::IpAddr;
use std::path::PathBuf;

use dpumesh_core::{DpuId, Error, ErrorKind, Mtu, Result, Role};
use dpumesh_hw::wire::encap::{OVERHEAD_V4, OVERHEAD_V6};
use serde::{Deserialize, Serialize};

use crate::Profile;
use crate::impair::Impairments;
use crate::profile::LARGEST_MTU;

/// How an emulated card is made and found. Host and SoC are given the same `card`, `dpu`, `profile`, `vf_kind` and
/// `mode`, each in a process (or a value) of its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TapOptions {
    /// Directory of the card's silicon: what host and SoC both see. Made when it is not there.
    pub card: PathBuf,
    /// Name of the card.
    pub dpu: DpuId,
    /// Which side this is.
    pub role: Role,
    /// What the card can do.
    #[serde(default)]
    pub profile: Profile,
    /// What stands for a VF.
    #[serde(default)]
    pub vf_kind: VfKind,
    /// What the uplink speaks.
    pub mode: Mode,
    /// Largest L3 packet of the uplink.
    #[serde(default)]
    pub uplink_mtu: Mtu,
    /// Network namespace of the host, where VFs that are not attached live. `None`: that of the thread that opens the host's
    /// side; the SoC's side reads it from the card.
    #[serde(default)]
    pub host_namespace: Option<PathBuf>,
    /// Network namespace of the SoC, where the uplink is. `None`: that of the thread that opens the SoC's side.
    #[serde(default)]
    pub soc_namespace: Option<PathBuf>,
    /// Network namespace for the card's ends of veth VFs: best one with nothing else in it, since the kernel's stack sees
    /// their frames. It must outlive the SoC's processes, and both sides must name the same. `None`: the SoC's.
    #[serde(default)]
    pub fabric_namespace: Option<PathBuf>,
    /// What the uplink does to frames.
    #[serde(default)]
    pub impairments: Option<Impairments>,
}

/// What stands for a virtual function.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VfKind {
    /// A persistent TAP. Needs `/dev/net/tun`.
    #[default]
    Tap,
    /// A veth pair, the card's end read by a packet socket. Needs nothing but a user namespace.
    Veth,
}

impl VfKind {
    /// TAP where `/dev/net/tun` opens, veth elsewhere.
    pub fn available() -> Self {
        let opened = std::fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/net/tun");
        if opened.is_ok() { Self::Tap } else { Self::Veth }
    }

    /// Name of the driver that a selector may ask for.
    pub(crate) const fn driver(self) -> &'static str {
        match self {
            Self::Tap => "tun",
            Self::Veth => "veth",
        }
    }
}

/// What the uplink speaks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// VXLAN from this tunnel endpoint, an address of an interface in the SoC's namespace.
    Overlay {
        /// The tunnel endpoint.
        vtep: IpAddr,
    },
    /// Frames as they are, on this network device of the SoC's namespace.
    Underlay {
        /// Name of the device.
        ifname: String,
    },
}

impl TapOptions {
    /// A card without limits, TAP VFs, an uplink MTU of 1500, everything in the namespaces of the threads that open it.
    pub fn new(card: impl Into<PathBuf>, dpu: impl Into<String>, role: Role, mode: Mode) -> Self {
        Self {
            card: card.into(),
            dpu: DpuId(dpu.into()),
            role,
            profile: Profile::default(),
            vf_kind: VfKind::default(),
            mode,
            uplink_mtu: Mtu::default(),
            host_namespace: None,
            soc_namespace: None,
            fabric_namespace: None,
            impairments: None,
        }
    }

    /// Largest MTU of a VF: what the uplink leaves after encapsulation; in underlay mode what the device takes, since
    /// pods of one node need not keep to the uplink's.
    ///
    /// # Errors
    /// `Invalid` when the encapsulation leaves no room.
    pub fn vf_mtu(&self) -> Result<Mtu> {
        let overhead = match &self.mode {
            Mode::Overlay { vtep: IpAddr::V4(_) } => OVERHEAD_V4,
            Mode::Overlay { vtep: IpAddr::V6(_) } => OVERHEAD_V6,
            Mode::Underlay { .. } => return Ok(Mtu::try_from(LARGEST_MTU).unwrap_or_default()),
        };
        self.uplink_mtu.minus(overhead).ok_or_else(|| {
            let message = format!(
                "{} octets leave no room behind {overhead} of encapsulation",
                self.uplink_mtu
            );
            Error::new(ErrorKind::Invalid, "tap.open", message)
                .backend(crate::NAME)
                .field("uplink_mtu")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_overlay_takes_its_share_of_the_mtu() {
        let overlay = |vtep: &str, mtu: u16| {
            let mode = Mode::Overlay {
                vtep: vtep.parse().expect("an address"),
            };
            let mut options = TapOptions::new("/tmp/card", "dpu0", Role::Host, mode);
            options.uplink_mtu = mtu.try_into().expect("an MTU");
            options.vf_mtu().map(Mtu::get).map_err(|error| error.kind)
        };
        assert_eq!(overlay("192.0.2.1", 1500), Ok(1450));
        assert_eq!(overlay("fd00::1", 1500), Ok(1430));
        assert_eq!(overlay("192.0.2.1", 100), Err(ErrorKind::Invalid));
    }

    #[test]
    fn options_travel_and_unknown_ones_do_not() {
        let options = TapOptions::new(
            "/tmp/card",
            "dpu0",
            Role::Soc,
            Mode::Underlay { ifname: "up0".into() },
        );
        let json = serde_json::to_string(&options).expect("serialises");
        assert_eq!(
            serde_json::from_str::<TapOptions>(&json).expect("reads back"),
            options
        );
        let foreign = json.replacen('{', "{\"moon\":1,", 1);
        assert!(serde_json::from_str::<TapOptions>(&foreign).is_err());
    }
}
