//! A kernel in memory: filters of one block, netdevs and their qdiscs, and hardware of as many filters as a test wants.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use netlink_packet_core::NLM_F_DUMP;

use super::filter::{Filter, Place, RTM_DELTFILTER, RTM_GETTFILTER, RTM_NEWTFILTER, Skip};
use super::kernel::{Answer, Kernel, Message, Refusal, Request};
use super::key::Keys;
use super::octets::{Writer, find, u32_at};

/// The block of fake cards that tests of this module make.
#[cfg(test)]
pub(super) const BLOCK: u32 = 77;

/// What the fake kernel holds, and how it behaves.
#[derive(Clone, Debug, Default)]
pub(crate) struct State {
    pub(super) filters: BTreeMap<Place, Vec<u8>>,
    /// Those that were added by a request: what they match, and whether the driver took them.
    added: BTreeMap<Place, (Keys, bool)>,
    /// Filters that the driver takes; `None`: it has no tc at all.
    pub(super) hardware: Option<usize>,
    /// Rules, by cookie, that it refuses with this errno.
    pub(super) refuse: BTreeMap<u128, i32>,
    /// The link to it breaks.
    pub(super) broken: bool,
    pub(crate) links: BTreeMap<u32, String>,
    /// Netdevs of the block, with its number.
    bound: BTreeMap<u32, u32>,
    /// Netdevs with a qdisc of somebody else's.
    pub(super) taken: BTreeSet<u32>,
}

/// The kernel; clones share their state.
#[derive(Clone, Debug)]
pub(crate) struct FakeKernel(pub(super) Arc<Mutex<State>>);

impl FakeKernel {
    /// Netdevs 1 to `links`, called `rep1`….
    pub(crate) fn new(links: u32, hardware: Option<usize>) -> Self {
        let links = (1..=links).map(|link| (link, format!("rep{link}"))).collect();
        Self(Arc::new(Mutex::new(State {
            links,
            hardware,
            ..State::default()
        })))
    }

    pub(crate) fn with<T>(&self, look: impl FnOnce(&mut State) -> T) -> T {
        look(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Kernel for FakeKernel {
    fn exchange(&mut self, requests: &[Request]) -> io::Result<Vec<Answer>> {
        self.with(|state| {
            if state.broken {
                return Err(io::Error::from_raw_os_error(libc::ENOBUFS));
            }
            Ok(requests.iter().map(|request| state.answer(request)).collect())
        })
    }
}

impl State {
    fn answer(&mut self, request: &Request) -> Answer {
        let link = u32_at(&request.body, 4).unwrap_or(0);
        match request.kind {
            18 => Ok(self
                .links
                .iter()
                .map(|(link, name)| link_message(*link, name))
                .collect()),
            36 => {
                let block = find(&request.body[20..], 13).and_then(|block| u32_at(block, 0));
                self.bound.insert(link, block.unwrap_or(0));
                Ok(Vec::new())
            }
            37 => {
                self.bound.remove(&link);
                if self.bound.is_empty() {
                    self.filters.clear();
                    self.added.clear();
                }
                Ok(Vec::new())
            }
            38 => {
                let ours = self
                    .bound
                    .iter()
                    .map(|(link, block)| qdisc_message(*link, Some(*block)));
                Ok(ours
                    .chain(self.taken.iter().map(|link| qdisc_message(*link, None)))
                    .collect())
            }
            RTM_NEWTFILTER => self.add(&request.body),
            RTM_GETTFILTER if request.flags & NLM_F_DUMP == NLM_F_DUMP => {
                Ok(self.filters.values().map(|body| filter_message(body)).collect())
            }
            RTM_GETTFILTER => {
                let found = self
                    .filters
                    .get(&place(&request.body))
                    .map(|body| vec![filter_message(body)]);
                found.ok_or_else(|| refusal(libc::ENOENT))
            }
            RTM_DELTFILTER => {
                let place = place(&request.body);
                self.added.remove(&place);
                let found = self
                    .filters
                    .remove(&place)
                    .map(|body| vec![filter_message(&body)]);
                found.ok_or_else(|| refusal(libc::ENOENT))
            }
            _ => Err(refusal(libc::EOPNOTSUPP)),
        }
    }

    fn add(&mut self, body: &[u8]) -> Answer {
        // A card's devices are all in one block.
        let block = self.bound.values().next().copied().unwrap_or(0);
        let Some(shown) = Filter::read(body, block) else {
            return Err(refusal(libc::EINVAL));
        };
        let filter = shown.filter;
        if let Some(errno) = self.refuse.get(&filter.cookie) {
            return Err(refusal(*errno));
        }
        let of_place = |handle| Place {
            handle,
            ..filter.place
        };
        let same = self
            .added
            .range(of_place(0)..=of_place(u32::MAX))
            .any(|(place, (keys, _))| place.handle == filter.place.handle || *keys == filter.keys);
        if same {
            return Err(refusal(libc::EEXIST));
        }
        let used = self.added.values().filter(|(_, taken)| *taken).count();
        let taken = filter.skip != Skip::Hardware && self.hardware.is_some_and(|room| used < room);
        if filter.skip == Skip::Software && !taken {
            let errno = if self.hardware.is_some() {
                libc::ENOSPC
            } else {
                libc::EOPNOTSUPP
            };
            return Err(refusal(errno));
        }
        let body = with_flag(body, if taken { 1 << 2 } else { 1 << 3 });
        let message = filter_message(&body);
        self.filters.insert(filter.place, body);
        self.added.insert(filter.place, (filter.keys, taken));
        Ok(vec![message])
    }
}

fn place(body: &[u8]) -> Place {
    Place {
        chain: find(&body[20..], 11)
            .and_then(|chain| u32_at(chain, 0))
            .unwrap_or(0),
        prio: (u32_at(body, 16).unwrap_or(0) >> 16) as u16,
        handle: u32_at(body, 8).unwrap_or(0),
    }
}

/// Sets bits of `TCA_FLOWER_FLAGS`, where it stands.
fn with_flag(body: &[u8], bits: u32) -> Vec<u8> {
    let mut body = body.to_vec();
    let header: Vec<u8> = [8_u16, 22].iter().flat_map(|half| half.to_ne_bytes()).collect();
    if let Some(at) = (20..body.len())
        .step_by(4)
        .find(|at| body[*at..].starts_with(&header))
    {
        let flags = u32_at(&body, at + 4).unwrap_or(0) | bits;
        body[at + 4..at + 8].copy_from_slice(&flags.to_ne_bytes());
    }
    body
}

fn refusal(errno: i32) -> Refusal {
    Refusal {
        errno,
        message: Some("so says the test".into()),
    }
}

fn filter_message(body: &[u8]) -> Message {
    Message {
        kind: RTM_NEWTFILTER,
        body: body.to_vec(),
    }
}

fn link_message(link: u32, name: &str) -> Message {
    let fixed: Vec<u8> = [0, link, 0, 0]
        .iter()
        .flat_map(|word| word.to_ne_bytes())
        .collect();
    Message {
        kind: 16,
        body: Writer::behind(fixed).text(3, name).finish(),
    }
}

fn qdisc_message(link: u32, block: Option<u32>) -> Message {
    let words = [0, link, 0xffff_0000, 0xffff_fff1, 0];
    let fixed: Vec<u8> = words.iter().flat_map(|word: &u32| word.to_ne_bytes()).collect();
    let body = Writer::behind(fixed).text(1, "clsact");
    let body = match block {
        Some(block) => body.u32(13, block),
        None => body,
    };
    Message {
        kind: 36,
        body: body.finish(),
    }
}
