//! [`Options`]: which card, which library, what under it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use dpumesh_core::steering::Owner;
use dpumesh_core::{Backend, DpuId, PciAddress, Role};

/// How to open a card.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Options {
    /// Its name on this node.
    pub dpu: DpuId,
    /// Which side of it this is; where a floor is given, the floor's.
    pub role: Role,
    /// Address of its physical function; `None` takes the only card there is.
    pub pci: Option<PciAddress>,
    /// The vendor's library; `None` looks in [`crate::LIBRARY_PATHS`].
    pub library: Option<PathBuf>,
    /// Settings that the library takes as they are.
    pub profile: String,
    /// How long a call of the library may take. Once one takes longer, the card is failed until that call returns: health says so, who waits
    /// gets `Timeout`, and every further call is refused at once.
    pub deadline: Duration,
    /// Where sysfs is mounted.
    pub sysfs: PathBuf,
    /// Firmware that goes with this program.
    pub firmware: Firmware,
    /// What the card can do without its network processor: VFs, ports, rules in software (`dpumesh-sriov`). Without one,
    /// those parts are missing, and a rule that hardware cannot hold is refused.
    pub floor: Option<Arc<dyn Backend>>,
    /// Whose rules in the floor's software are left from a former process: they are removed when the card is opened, since
    /// the processor's own were lost sight of with that process. Their owners replay.
    pub owners: Vec<Owner>,
}

impl Options {
    /// The only card of this machine, with the library where it usually is, on this floor.
    pub fn new(dpu: impl Into<String>, floor: Option<Arc<dyn Backend>>) -> Self {
        let users = (0..16).map(Owner::User);
        Self {
            dpu: DpuId(dpu.into()),
            role: floor.as_ref().map_or(Role::Soc, |floor| floor.info().role),
            pci: None,
            library: None,
            profile: String::new(),
            deadline: Duration::from_secs(30),
            sysfs: PathBuf::from("/sys"),
            firmware: Firmware::default(),
            floor,
            owners: [Owner::Agent, Owner::Proxy, Owner::Dataplane]
                .into_iter()
                .chain(users)
                .collect(),
        }
    }
}

/// Versions of firmware that are taken: one major version, from a minor one on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Firmware {
    /// The major version.
    pub major: u32,
    /// The least minor version.
    pub minor: u32,
}

impl Default for Firmware {
    /// 2.0 and later versions of 2: our assumption, like the rest of the interface.
    fn default() -> Self {
        Self { major: 2, minor: 0 }
    }
}

impl Firmware {
    /// Whether `text` ("major.minor.patch") is such a version.
    pub fn takes(self, text: &str) -> bool {
        let mut parts = text.split('.').map(str::parse::<u32>);
        match (parts.next(), parts.next()) {
            (Some(Ok(major)), Some(Ok(minor))) => major == self.major && minor >= self.minor,
            _ => false,
        }
    }
}

/// What the card is set to. A change is a new life of the network processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Mode {
    /// A NIC with SR-IOV: everything is the floor's.
    Legacy,
    /// The processor steers; no programs, no connections.
    SmartNic,
    /// Everything.
    Dpu,
}

impl Mode {
    /// Name, as in [`dpumesh_core::Capabilities::mode`].
    pub const fn name(self) -> &'static str {
        match self {
            Self::Legacy => "legacy",
            Self::SmartNic => "smartnic",
            Self::Dpu => "dpu",
        }
    }

    pub(crate) const fn number(self) -> u32 {
        self as u32
    }

    pub(crate) const fn of_number(number: u32) -> Option<Self> {
        match number {
            0 => Some(Self::Legacy),
            1 => Some(Self::SmartNic),
            2 => Some(Self::Dpu),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn firmware_of_the_same_major_version_is_taken() {
        let wanted = Firmware { major: 2, minor: 3 };
        for text in ["2.3.0", "2.4", "2.10.1-rc1"] {
            assert!(wanted.takes(text), "{text}");
        }
        for text in ["2.2.9", "3.3.0", "1.9.0", "", "2", "two.three"] {
            assert!(!wanted.takes(text), "{text}");
        }
    }
}
