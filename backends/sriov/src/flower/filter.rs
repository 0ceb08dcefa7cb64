//! [`Filter`]: one flower filter as an rtnetlink message and back, and where in tc's order a rule stands.
//!
//! ```text
//! struct tcmsg  ifindex = block magic, parent = block, handle, info = prio << 16 | ETH_P_ALL
//! TCA_KIND "flower"   TCA_CHAIN group   TCA_OPTIONS { keys…, TCA_FLOWER_FLAGS, TCA_FLOWER_ACT }
//! ```
//! All filters stand in one block that the card's netdevs share, so that a rule without a port is one filter. The protocol is
//! `ETH_P_ALL`, since tc takes only one per priority; the EtherType is a key.
//!
//! **Priority.** A priority of the contract becomes eight of tc: the first for frames whose TTL ends at a `DecrementTtl`, the
//! others for rules of equal priority, pattern and actions, which tc would refuse as duplicates.
//!
//! **Handle.** tc keeps 32 bits that the caller chooses: what of a rule has no other place in a filter.
//!
//! | bits | |
//! |---|---|
//! | 31–30 | which filter of its rule: 0 IPv4 or any, 1 IPv6, 2 and 3 the same for frames whose TTL ends |
//! | 29–26 | where `Count` stood: 0 nowhere, else its index and 1 |
//! | 25 | the EtherType was written out |
//! | 24 | the rule asked for a placement: `skip_hw` or `skip_sw` was its wish, not our choice |
//! | 23–18 | number of the owner, see [`super::owners`] |
//! | 17–0 | number of the rule |

use netlink_packet_core::{NLM_F_CREATE, NLM_F_DUMP, NLM_F_ECHO, NLM_F_EXCL};

use super::kernel::Request;
use super::key::Keys;
use super::octets::{Writer, attributes, find, text, u32_at};
use super::step::{self, Observed, Step};

/// Where a filter stands, and its number there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Place {
    pub(super) chain: u32,
    pub(super) prio: u16,
    pub(super) handle: u32,
}

/// One flower filter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Filter {
    pub(super) place: Place,
    pub(super) skip: Skip,
    pub(super) keys: Keys,
    pub(super) steps: Vec<Step>,
    pub(super) cookie: u128,
}

/// Where a filter is not to act.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Skip {
    /// Hardware if it can, software too.
    Nothing,
    /// `skip_hw`.
    Hardware,
    /// `skip_sw`.
    Software,
}

/// A filter as the kernel shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Shown {
    pub(super) filter: Filter,
    /// The driver took it.
    pub(super) in_hardware: bool,
    pub(super) observed: Observed,
}

/// What a handle tells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Handle {
    pub(super) part: u8,
    /// Index of `Count` among the actions.
    pub(super) count: Option<usize>,
    pub(super) explicit: bool,
    pub(super) asked: bool,
    pub(super) owner: u8,
    pub(super) number: u32,
}

/// Rules that can be told apart.
pub(super) const NUMBERS: u32 = 1 << 18;
/// Owners that can be told apart.
pub(super) const OWNERS: u8 = 1 << 6;

impl Handle {
    pub(super) fn pack(self) -> u32 {
        let count = self.count.map_or(0, |index| index as u32 + 1) & 0xf;
        let flags = (u32::from(self.explicit) << 25) | (u32::from(self.asked) << 24);
        let owner = u32::from(self.owner % OWNERS) << 18;
        (u32::from(self.part & 3) << 30) | (count << 26) | flags | owner | (self.number % NUMBERS)
    }

    pub(super) fn unpack(handle: u32) -> Self {
        Self {
            part: (handle >> 30) as u8,
            count: ((handle >> 26) as usize & 0xf).checked_sub(1),
            explicit: handle & (1 << 25) != 0,
            asked: handle & (1 << 24) != 0,
            owner: (handle >> 18) as u8 % OWNERS,
            number: handle % NUMBERS,
        }
    }
}

/// tc priorities per priority of the contract.
const SLOTS: u16 = 8;
/// Filters of equal key and priority that can stand beside one another.
pub(super) const COPIES: u8 = SLOTS as u8 - 1;
/// Priorities of the contract; tc's last ones are for what no rule matches.
pub(super) const PRIORITIES: u32 = (u16::MAX / SLOTS) as u32 - 2;

/// tc's priority of a contract's, for the given copy (1 to [`COPIES`]), or 0 for frames whose TTL ends.
pub(super) fn prio_of(priority: u32, slot: u8) -> u16 {
    (priority.min(PRIORITIES) as u16) * SLOTS + 1 + u16::from(slot)
}

/// The contract's priority and the slot of tc's.
pub(super) fn priority_of(prio: u16) -> Option<(u32, u8)> {
    let prio = prio.checked_sub(1)?;
    let priority = u32::from(prio / SLOTS);
    (priority < PRIORITIES).then_some((priority, (prio % SLOTS) as u8))
}

pub(super) const RTM_NEWTFILTER: u16 = 44;
pub(super) const RTM_DELTFILTER: u16 = 45;
pub(super) const RTM_GETTFILTER: u16 = 46;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_CHAIN: u16 = 11;
const FLOWER_ACT: u16 = 3;
const FLOWER_FLAGS: u16 = 22;
/// `struct tcmsg`: family and padding, ifindex, handle, parent, info.
const TCMSG: usize = 20;
/// An ifindex that says: the parent is a block.
const BLOCK_MAGIC: u32 = u32::MAX;
/// `ETH_P_ALL` in network order.
const PROTOCOL: u32 = 0x0003_u16.to_be() as u32;

const SKIP_HW: u32 = 1;
const SKIP_SW: u32 = 1 << 1;
const IN_HW: u32 = 1 << 2;

/// `struct tcmsg` of a block.
fn tcmsg(block: u32, handle: u32, prio: u16) -> Vec<u8> {
    let info = (u32::from(prio) << 16) | PROTOCOL;
    [0, BLOCK_MAGIC, handle, block, info]
        .iter()
        .flat_map(|word| word.to_ne_bytes())
        .collect()
}

impl Filter {
    /// Asks the kernel to add it and to show what came of it.
    pub(super) fn add(&self, block: u32) -> Request {
        let mut options = Writer::default();
        for (kind, value) in self.keys.attributes() {
            options = options.put(kind, &value);
        }
        let flags = match self.skip {
            Skip::Nothing => 0,
            Skip::Hardware => SKIP_HW,
            Skip::Software => SKIP_SW,
        };
        let actions = Writer::behind(step::encode(&self.steps, self.cookie));
        let options = options.u32(FLOWER_FLAGS, flags).nest(FLOWER_ACT, actions);
        let Place { chain, prio, handle } = self.place;
        let body = Writer::behind(tcmsg(block, handle, prio))
            .text(TCA_KIND, "flower")
            .u32(TCA_CHAIN, chain)
            .nest(TCA_OPTIONS, options);
        Request {
            kind: RTM_NEWTFILTER,
            flags: NLM_F_CREATE | NLM_F_EXCL | NLM_F_ECHO,
            body: body.finish(),
        }
    }

    /// Reads a message body of a block. `None` for what [`Filter::add`] would not write: somebody else's.
    pub(super) fn read(body: &[u8], block: u32) -> Option<Shown> {
        let (link, handle) = (u32_at(body, 4)?, u32_at(body, 8)?);
        let (parent, info) = (u32_at(body, 12)?, u32_at(body, 16)?);
        if (link, parent, info & 0xffff) != (BLOCK_MAGIC, block, PROTOCOL) {
            return None;
        }
        let rest = body.get(TCMSG..)?;
        if text(find(rest, TCA_KIND)?)? != "flower" {
            return None;
        }
        let options = find(rest, TCA_OPTIONS)?;
        let flags = find(options, FLOWER_FLAGS)
            .and_then(|flags| u32_at(flags, 0))
            .unwrap_or(0);
        let (steps, cookie, observed) = step::decode(find(options, FLOWER_ACT)?)?;
        let filter = Self {
            place: Place {
                chain: find(rest, TCA_CHAIN)
                    .and_then(|chain| u32_at(chain, 0))
                    .unwrap_or(0),
                prio: (info >> 16) as u16,
                handle,
            },
            skip: match flags & (SKIP_HW | SKIP_SW) {
                SKIP_HW => Skip::Hardware,
                SKIP_SW => Skip::Software,
                _ => Skip::Nothing,
            },
            keys: Keys::read(attributes(options))?,
            steps,
            cookie,
        };
        Some(Shown {
            filter,
            in_hardware: flags & IN_HW != 0,
            observed,
        })
    }
}

impl Place {
    /// Asks the kernel to remove the filter here and to show it once more.
    pub(super) fn remove(self, block: u32) -> Request {
        Request {
            kind: RTM_DELTFILTER,
            flags: NLM_F_ECHO,
            body: self.body(block),
        }
    }

    /// Asks for the filter here.
    pub(super) fn get(self, block: u32) -> Request {
        Request {
            kind: RTM_GETTFILTER,
            flags: 0,
            body: self.body(block),
        }
    }

    fn body(self, block: u32) -> Vec<u8> {
        Writer::behind(tcmsg(block, self.handle, self.prio))
            .text(TCA_KIND, "flower")
            .u32(TCA_CHAIN, self.chain)
            .finish()
    }
}

/// Asks for every filter of a block.
pub(super) fn dump(block: u32) -> Request {
    Request {
        kind: RTM_GETTFILTER,
        flags: NLM_F_DUMP,
        body: tcmsg(block, 0, 0)[..16].iter().copied().chain([0; 4]).collect(),
    }
}
