//! Numbers of owners: a handle has six bits for an owner, [`Owner::User`] has sixteen.
//!
//! Agent, proxy and dataplane have the first numbers. A set of user rules gets the next free one, and a filter in a chain that no
//! frame reaches remembers which: so that another process, after this one, knows whose rules it finds.

use dpumesh_core::MacAddr;
use dpumesh_core::steering::{Masked, Owner, Pattern};

use super::filter::{Filter, OWNERS, Place, Skip};
use super::key::Keys;
use super::step::Step;

/// The chain that remembers owners: the highest but some.
pub(super) const CHAIN: u32 = 0x0fff_fff0;
const COOKIE: u128 = u128::from_be_bytes(*b"dpumesh-owner\0\0\0");
const FIXED: [Owner; 3] = [Owner::Agent, Owner::Proxy, Owner::Dataplane];

/// Who has which number.
#[derive(Clone, Debug)]
pub(super) struct Owners(Vec<Option<Owner>>);

impl Default for Owners {
    fn default() -> Self {
        Self(FIXED.into_iter().map(Some).collect())
    }
}

impl Owners {
    pub(super) fn number(&self, owner: Owner) -> Option<u8> {
        self.0
            .iter()
            .position(|there| *there == Some(owner))
            .map(|index| index as u8)
    }

    pub(super) fn owner(&self, number: u8) -> Option<Owner> {
        self.0.get(usize::from(number)).copied().flatten()
    }

    /// The filter that gives an owner the next number; `None` when all are given.
    pub(super) fn next(&self, owner: Owner) -> Option<(u8, Filter)> {
        let Owner::User(set) = owner else { return None };
        let number = self.0.iter().position(Option::is_none).unwrap_or(self.0.len()) as u8;
        (number < OWNERS).then(|| (number, filter(number, set)))
    }

    pub(super) fn enter(&mut self, number: u8, owner: Owner) {
        let index = usize::from(number);
        if self.0.len() <= index {
            self.0.resize(index + 1, None);
        }
        self.0[index] = Some(owner);
    }

    /// What a filter of the chain remembers.
    pub(super) fn read(filter: &Filter) -> Option<(u8, Owner)> {
        if filter.place.chain != CHAIN || filter.cookie != COOKIE {
            return None;
        }
        let mac = filter.keys.pattern(false)?.eth_dst?.value.0;
        let number = u8::try_from(filter.place.handle.checked_sub(1)?).ok()?;
        Some((number, Owner::User(u16::from_be_bytes([mac[4], mac[5]]))))
    }
}

fn filter(number: u8, set: u16) -> Filter {
    let [high, low] = set.to_be_bytes();
    let pattern = Pattern {
        eth_dst: Some(Masked {
            value: MacAddr([2, 0, 0, 0, high, low]),
            mask: MacAddr::BROADCAST,
        }),
        ..Pattern::default()
    };
    Filter {
        place: Place {
            chain: CHAIN,
            prio: 1,
            handle: u32::from(number) + 1,
        },
        skip: Skip::Hardware,
        keys: Keys::of(&pattern, None, None).unwrap_or_default(), // no EtherType, no family: nothing to contradict
        steps: vec![Step::Drop],
        cookie: COOKIE,
    }
}
