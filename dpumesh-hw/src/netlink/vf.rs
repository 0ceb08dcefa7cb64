//! Virtual functions of an SR-IOV interface as its physical function administers them: what `ip link show PF` lists and
//! `ip link set PF vf N …` sets.
//!
//! `IFLA_VFINFO_LIST` (22) of the PF's link holds one `IFLA_VF_INFO` (1) per VF, that holds structures which begin with the VF's
//! number (`linux/if_link.h`). The list is one attribute of at most 64 KiB, and the kernel cuts it short: the counters are
//! therefore not asked for, which leaves room for some 300 VFs instead of 200.

use netlink_packet_core::NlasIterator;

use super::attribute::{Attributes, half_at, word_at};
use super::channel::HEADER;
use super::{LinkIndex, Netlink, NetlinkError, attributes};

const IFLA_VFINFO_LIST: u16 = 22;
const IFLA_EXT_MASK: u16 = 29;
const RTEXT_FILTER_VF: u32 = 1;
const RTEXT_FILTER_SKIP_STATS: u32 = 1 << 3;
const IFLA_VF_INFO: u16 = 1;
const IFLA_VF_MAC: u16 = 1;
const IFLA_VF_VLAN: u16 = 2;
const IFLA_VF_SPOOFCHK: u16 = 4;
const IFLA_VF_LINK_STATE: u16 = 5;
const IFLA_VF_RATE: u16 = 6;
const IFLA_VF_TRUST: u16 = 9;
const IFLA_VF_VLAN_LIST: u16 = 12;
const IFLA_VF_VLAN_INFO: u16 = 1;
/// Largest link-layer address in the kernel (`MAX_ADDR_LEN`).
const ADDRESS: usize = 32;

/// EtherType of a customer tag (802.1Q).
pub const VLAN_8021Q: u16 = 0x8100;
/// EtherType of a service tag (802.1ad).
pub const VLAN_8021AD: u16 = 0x88a8;

/// A VF as its PF has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vf {
    /// Its number on the PF.
    pub index: u16,
    /// Administrative MAC; zero when the PF set none.
    pub mac: [u8; 6],
    /// VLAN that the switch adds and removes; 0 for none.
    pub vlan: u16,
    /// Priority code point of that VLAN.
    pub qos: u8,
    /// EtherType of its tag.
    pub vlan_protocol: u16,
    /// Frames with a foreign source are dropped; `None` when the driver does not tell.
    pub spoof_check: Option<bool>,
    /// It may change its MAC and be promiscuous; `None` when the driver does not tell.
    pub trust: Option<bool>,
    /// Link state that it sees.
    pub link_state: VfLinkState,
    /// Guaranteed rate, Mbit/s; 0 for none.
    pub min_rate: u32,
    /// Largest rate, Mbit/s; 0 for unlimited.
    pub max_rate: u32,
}

impl Vf {
    /// VF `index` with nothing set, by a driver that tells nothing.
    pub fn new(index: u16) -> Self {
        Self {
            index,
            mac: [0; 6],
            vlan: 0,
            qos: 0,
            vlan_protocol: VLAN_8021Q,
            spoof_check: None,
            trust: None,
            link_state: VfLinkState::Auto,
            min_rate: 0,
            max_rate: 0,
        }
    }
}

/// Link state as a VF sees it (`IFLA_VF_LINK_STATE_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VfLinkState {
    /// Follows the PF's.
    Auto,
    /// Always up.
    Enable,
    /// Always down.
    Disable,
}

/// One attribute of a VF to be set by its PF.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VfSetting {
    /// Administrative MAC; zero takes it off.
    Mac([u8; 6]),
    /// VLAN of the switch.
    Vlan {
        /// Identifier; 0 takes it off.
        id: u16,
        /// Priority code point.
        qos: u8,
        /// EtherType of the tag.
        protocol: u16,
    },
    /// Anti-spoofing.
    SpoofCheck(bool),
    /// Trust.
    Trust(bool),
    /// Link state.
    LinkState(VfLinkState),
    /// Both rates, Mbit/s: the kernel has one call for them.
    Rate {
        /// Guaranteed.
        min: u32,
        /// Largest.
        max: u32,
    },
}

impl Netlink {
    /// The VFs of a physical function, in the order of their numbers; none for an interface without.
    ///
    /// # Errors
    /// If there is no such interface (`is_missing`).
    pub fn vfs(&mut self, pf: LinkIndex) -> Result<Vec<Vf>, NetlinkError> {
        const RTM_GETLINK: u16 = 18;
        let body = Attributes::default().word(IFLA_EXT_MASK, RTEXT_FILTER_VF | RTEXT_FILTER_SKIP_STATS);
        let replies = self.ask("list VFs of", pf, RTM_GETLINK, &ifinfo(0, pf), &body)?;
        let mut vfs: Vec<Vf> = replies.iter().flat_map(|reply| parse(reply)).collect();
        vfs.sort_by_key(|vf| vf.index);
        Ok(vfs)
    }

    /// Sets one attribute of a VF. The driver decides what it takes and when it becomes effective.
    ///
    /// # Errors
    /// `EOPNOTSUPP` when the driver cannot, `EINVAL` when it does not want to, or when there is no such VF.
    pub fn set_vf(&mut self, pf: LinkIndex, vf: u16, setting: &VfSetting) -> Result<(), NetlinkError> {
        const RTM_SETLINK: u16 = 19;
        let info = Attributes::default().nest(IFLA_VF_INFO, emit(vf, setting));
        let body = Attributes::default().nest(IFLA_VFINFO_LIST, info);
        let object = format!("VF {vf} of {pf}");
        self.ask("set", object, RTM_SETLINK, &ifinfo(0, pf), &body)
            .map(drop)
    }
}

/// `struct ifinfomsg`: family (1), padding (1), type (2), index (4), flags (4), change mask (4).
pub(super) fn ifinfo(family: u8, link: LinkIndex) -> [u8; 16] {
    let mut octets = [0; 16];
    octets[0] = family;
    octets[4..8].copy_from_slice(&link.0.to_ne_bytes());
    octets
}

/// One message; its length is in its header, its sequence number is filled in when it is sent.
pub(super) fn message(kind: u16, flags: u16, head: &[u8], body: &Attributes) -> Vec<u8> {
    let length = HEADER + head.len() + body.as_slice().len();
    let mut octets = Vec::with_capacity(length);
    octets.extend((length as u32).to_ne_bytes());
    octets.extend(kind.to_ne_bytes());
    octets.extend(flags.to_ne_bytes());
    octets.extend([0; 8]);
    octets.extend(head);
    octets.extend(body.as_slice());
    octets
}

fn emit(vf: u16, setting: &VfSetting) -> Attributes {
    let vf = u32::from(vf);
    let all = Attributes::default();
    match *setting {
        VfSetting::Mac(mac) => {
            let mut octets = [0; 4 + ADDRESS];
            octets[..4].copy_from_slice(&vf.to_ne_bytes());
            octets[4..10].copy_from_slice(&mac);
            all.bytes(IFLA_VF_MAC, &octets)
        }
        VfSetting::Vlan { id, qos, protocol } if protocol == VLAN_8021Q => {
            all.words(IFLA_VF_VLAN, &[vf, id.into(), qos.into()])
        }
        VfSetting::Vlan { id, qos, protocol } => {
            let mut octets: Vec<u8> = [vf, id.into(), qos.into()]
                .iter()
                .flat_map(|value| value.to_ne_bytes())
                .collect();
            octets.extend(protocol.to_be_bytes());
            octets.extend([0; 2]);
            all.nest(
                IFLA_VF_VLAN_LIST,
                Attributes::default().bytes(IFLA_VF_VLAN_INFO, &octets),
            )
        }
        VfSetting::SpoofCheck(on) => all.words(IFLA_VF_SPOOFCHK, &[vf, on.into()]),
        VfSetting::Trust(on) => all.words(IFLA_VF_TRUST, &[vf, on.into()]),
        VfSetting::LinkState(state) => all.words(IFLA_VF_LINK_STATE, &[vf, state as u32]),
        VfSetting::Rate { min, max } => all.words(IFLA_VF_RATE, &[vf, min, max]),
    }
}

pub(super) fn parse(payload: &[u8]) -> Vec<Vf> {
    const IFINFOMSG: usize = 16;
    attributes(payload, IFINFOMSG)
        .filter(|attribute| attribute.kind() == IFLA_VFINFO_LIST)
        .flat_map(|list| {
            NlasIterator::new(list.value())
                .map_while(Result::ok)
                .filter(|info| info.kind() == IFLA_VF_INFO)
                .filter_map(|info| parse_info(info.value()))
                .collect::<Vec<_>>()
        })
        .collect()
}

fn parse_info(info: &[u8]) -> Option<Vf> {
    let mut vf: Option<Vf> = None;
    for attribute in NlasIterator::new(info).map_while(Result::ok) {
        let value = attribute.value();
        let (Some(index), second, third) = (word_at(value, 0), word_at(value, 4), word_at(value, 8)) else {
            continue;
        };
        // A nest begins with an attribute's header instead of a VF's number.
        if attribute.kind() == IFLA_VF_VLAN_LIST {
            if let Some(vf) = &mut vf {
                vf.vlan_protocol = tag_of(value).unwrap_or(VLAN_8021Q);
            }
            continue;
        }
        let vf = vf.get_or_insert_with(|| Vf::new(u16::try_from(index).unwrap_or(u16::MAX)));
        match (attribute.kind(), second, third) {
            (IFLA_VF_MAC, ..) => {
                if let Some(mac) = value.get(4..).and_then(|mac| mac.first_chunk()) {
                    vf.mac = *mac;
                }
            }
            (IFLA_VF_VLAN, Some(id), Some(qos)) => {
                vf.vlan = u16::try_from(id).unwrap_or_default();
                vf.qos = u8::try_from(qos).unwrap_or_default();
            }
            (IFLA_VF_SPOOFCHK, Some(on), _) => vf.spoof_check = told(on),
            (IFLA_VF_TRUST, Some(on), _) => vf.trust = told(on),
            (IFLA_VF_LINK_STATE, Some(state), _) => {
                vf.link_state = match state {
                    1 => VfLinkState::Enable,
                    2 => VfLinkState::Disable,
                    _ => VfLinkState::Auto,
                };
            }
            (IFLA_VF_RATE, Some(min), Some(max)) => (vf.min_rate, vf.max_rate) = (min, max),
            _ => {}
        }
    }
    vf
}

/// The kernel fills in -1 where the driver says nothing.
fn told(value: u32) -> Option<bool> {
    match value {
        0 => Some(false),
        1 => Some(true),
        _ => None,
    }
}

fn tag_of(list: &[u8]) -> Option<u16> {
    let info = NlasIterator::new(list).map_while(Result::ok).next()?;
    let protocol = half_at(info.value(), 12)?;
    (protocol != 0).then(|| u16::from_be(protocol))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(infos: &[Attributes]) -> Vec<u8> {
        let mut list = Attributes::default();
        for info in infos {
            list = list.bytes(IFLA_VF_INFO, info.as_slice());
        }
        let mut octets = ifinfo(0, LinkIndex(3)).to_vec();
        octets.extend(
            Attributes::default()
                .bytes(IFLA_VFINFO_LIST, list.as_slice())
                .as_slice(),
        );
        octets
    }

    fn join(settings: &[VfSetting]) -> Attributes {
        settings.iter().fold(Attributes::default(), |all, setting| {
            let one = emit(1, setting);
            let attribute = NlasIterator::new(one.as_slice())
                .next()
                .expect("one")
                .expect("sound");
            let kind = attribute.kind();
            all.bytes(kind, attribute.value())
        })
    }

    #[test]
    fn what_is_set_is_what_is_read() {
        let settings = [
            VfSetting::Mac([2, 0, 0, 0, 0, 9]),
            VfSetting::Vlan {
                id: 100,
                qos: 3,
                protocol: VLAN_8021Q,
            },
            VfSetting::Vlan {
                id: 100,
                qos: 3,
                protocol: VLAN_8021AD,
            },
            VfSetting::SpoofCheck(true),
            VfSetting::Trust(false),
            VfSetting::LinkState(VfLinkState::Disable),
            VfSetting::Rate { min: 10, max: 1000 },
        ];
        let expected = Vf {
            index: 1,
            mac: [2, 0, 0, 0, 0, 9],
            vlan: 100,
            qos: 3,
            vlan_protocol: VLAN_8021AD,
            spoof_check: Some(true),
            trust: Some(false),
            link_state: VfLinkState::Disable,
            min_rate: 10,
            max_rate: 1000,
        };
        assert_eq!(parse(&link(&[join(&settings)])), [expected]);
    }

    #[test]
    fn what_the_driver_does_not_tell_is_none() {
        let info = Attributes::default()
            .words(IFLA_VF_SPOOFCHK, &[0, u32::MAX])
            .words(IFLA_VF_TRUST, &[0, u32::MAX]);
        assert_eq!(parse(&link(&[info])), [Vf::new(0)]);
    }

    #[test]
    fn no_truncation_panics() {
        let whole = link(&[join(&[
            VfSetting::Mac([2; 6]),
            VfSetting::Vlan {
                id: 7,
                qos: 0,
                protocol: VLAN_8021AD,
            },
            VfSetting::Rate { min: 1, max: 2 },
        ])]);
        for length in 0..whole.len() {
            parse(&whole[..length]);
        }
    }
}
