//! Consistent hashing: rings and Maglev's tables, entry for entry as Envoy makes them, so that a key finds the same endpoint at both.
//!
//! An endpoint is known by its address in text. Hashes are XXH64.

use twox_hash::XxHash64;

use super::Spread;
use crate::config::model::{Balance, Endpoint};

/// XXH64 of `octets`, seed 0.
pub fn hash(octets: &[u8]) -> u64 {
    XxHash64::oneshot(0, octets)
}

/// XXH64 of several texts, each with the hash of those before as its seed.
pub fn hash_all<'a>(texts: impl IntoIterator<Item = &'a [u8]>) -> u64 {
    let chained = |seed, text: &[u8]| XxHash64::oneshot(seed, text);
    texts.into_iter().fold(0, chained)
}

/// Which endpoint a hash belongs to.
#[derive(Debug)]
pub enum Table {
    /// Points of a ring in order; a hash belongs to the next one.
    Ring(Vec<(u64, u32)>),
    /// Places of a table; a hash belongs to the one it leads to.
    Maglev(Vec<u32>),
}

/// An endpoint and its part of the whole, all of which is 1.
type Part = (u32, f64);

impl Table {
    /// Of the endpoints `members`.
    pub(super) fn new(spread: &Spread, endpoints: &[Endpoint], members: &[u32]) -> Self {
        let parts = parts(spread, endpoints, members);
        let key = |member: u32| endpoints[member as usize].address.to_string();
        match spread.balance {
            Balance::Maglev { size } => Self::Maglev(maglev(&parts, key, u64::from(size))),
            Balance::RingHash { least, most } => Self::Ring(ring(&parts, key, least, most)),
            _ => Self::Ring(ring(&parts, key, 1024, 1024)),
        }
    }

    /// The endpoint that `hash` belongs to, or another one for a further `attempt`.
    pub(super) fn find(&self, hash: u64, attempt: u32) -> Option<u32> {
        match self {
            Self::Ring(points) if points.is_empty() => None,
            Self::Ring(points) => {
                let next = points.partition_point(|(point, _)| *point < hash) % points.len();
                Some(points[(next + attempt as usize) % points.len()].1)
            }
            Self::Maglev(places) if places.is_empty() => None,
            Self::Maglev(places) => {
                let turned = match attempt {
                    0 => hash,
                    attempt => hash ^ (u64::MAX - u64::from(attempt) + 1),
                };
                Some(places[(turned % places.len() as u64) as usize])
            }
        }
    }
}

/// Each endpoint's part: by its weight, and by its locality's where those count.
fn parts(spread: &Spread, endpoints: &[Endpoint], members: &[u32]) -> Vec<Part> {
    let weight = |m: &u32| f64::from(endpoints[*m as usize].weight.max(1));
    let within = |group: &[u32], share: f64| -> Vec<Part> {
        let sum: f64 = group.iter().map(weight).sum();
        group.iter().map(|m| (*m, weight(m) * share / sum)).collect()
    };
    let locality = |m: &u32| endpoints[*m as usize].locality as usize;
    let Some(priority) = members.first().map(|m| spread.localities[locality(m)].priority) else {
        return Vec::new();
    };
    let here = |at: &usize| spread.localities[*at].priority == priority;
    let weighted: Vec<usize> = (0..spread.localities.len()).filter(here).collect();
    let sum: f64 = weighted
        .iter()
        .map(|at| f64::from(spread.localities[*at].weight))
        .sum();
    if !spread.by_locality || sum == 0.0 {
        return within(members, 1.0);
    }
    let mut parts = Vec::with_capacity(members.len());
    for at in weighted {
        let weight = spread.localities[at].weight;
        let group: Vec<u32> = members.iter().filter(|m| locality(m) == at).copied().collect();
        if weight > 0 {
            parts.extend(within(&group, f64::from(weight) / sum));
        }
    }
    parts
}

/// A ring of at least `least` points, unless that takes more than `most`.
fn ring(parts: &[Part], key: impl Fn(u32) -> String, least: u64, most: u64) -> Vec<(u64, u32)> {
    let smallest = parts.iter().map(|(_, part)| *part).fold(1.0, f64::min);
    let scale = ((smallest * least as f64).ceil() / smallest).min(most as f64);
    let mut points = Vec::with_capacity(if parts.is_empty() {
        0
    } else {
        scale.ceil() as usize
    });
    // Running sums over all endpoints: what rounding takes from one the next one has.
    let (mut made, mut due) = (0.0, 0.0);
    for (member, part) in parts {
        let key = key(*member);
        due += scale * part;
        let mut index = 0u64;
        while made < due {
            points.push((hash(format!("{key}_{index}").as_bytes()), *member));
            index += 1;
            made += 1.0;
        }
    }
    points.sort_by_key(|(point, _)| *point);
    points
}

/// An endpoint that takes places of a table.
struct Seeker {
    member: u32,
    part: f64,
    offset: u64,
    skip: u64,
    tried: u64,
    due: f64,
}

/// A table of `size` places (a prime).
fn maglev(parts: &[Part], key: impl Fn(u32) -> String, size: u64) -> Vec<u32> {
    const FREE: u32 = u32::MAX;
    let largest = parts.iter().map(|(_, part)| *part).fold(0.0, f64::max);
    if largest <= 0.0 {
        return Vec::new();
    }
    let mut keyed: Vec<_> = parts.iter().map(|(m, part)| (key(*m), *m, *part)).collect();
    keyed.sort_by(|a, b| a.0.cmp(&b.0));
    let seeker = |(key, member, part): (String, u32, f64)| Seeker {
        member,
        part,
        offset: hash(key.as_bytes()) % size,
        skip: XxHash64::oneshot(1, key.as_bytes()) % (size - 1) + 1,
        tried: 0,
        due: 0.0,
    };
    let mut seekers: Vec<_> = keyed.into_iter().map(seeker).collect();
    let mut places = vec![FREE; size as usize];
    let (mut taken, mut round) = (0, 1.0);
    while taken < size {
        for seeker in &mut seekers {
            // One of the largest part takes a place in each round, the others as often as their part says.
            if taken == size || round * seeker.part < seeker.due {
                continue;
            }
            seeker.due += largest;
            let mut next = || {
                let place = (seeker.offset + seeker.skip * seeker.tried) % size;
                seeker.tried += 1;
                place as usize
            };
            let mut place = next();
            while places[place] != FREE {
                place = next();
            }
            places[place] = seeker.member;
            taken += 1;
        }
        round += 1.0;
    }
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(member: u32) -> String {
        format!("10.0.0.{member}:80")
    }

    fn even(members: u32) -> Vec<Part> {
        (0..members).map(|m| (m, 1.0 / f64::from(members))).collect()
    }

    fn owners(table: &Table, keys: u64) -> Vec<u32> {
        let one = |k: u64| table.find(hash(&k.to_be_bytes()), 0).unwrap();
        (0..keys).map(one).collect()
    }

    #[test]
    fn xxh64_is_the_one_of_its_specification() {
        assert_eq!(hash(b""), 0xEF46_DB37_51D8_E999);
        assert_eq!(hash(b"abc"), 0x44BC_2CF5_AD77_0999);
    }

    #[test]
    fn a_ring_has_the_points_that_were_asked_for() {
        assert_eq!(ring(&even(4), key, 1024, 8192).len(), 1024);
        assert_eq!(ring(&even(3), key, 1024, 8192).len(), 1026);
        assert_eq!(ring(&even(3), key, 1024, 1024).len(), 1024);
        let uneven = ring(&[(0, 0.25), (1, 0.75)], key, 1024, 8192);
        assert_eq!(uneven.iter().filter(|(_, m)| *m == 0).count(), 256);
        assert!(Table::Ring(ring(&[], key, 1024, 8192)).find(7, 0).is_none());
    }

    #[test]
    fn a_table_is_shared_out_by_weight_to_the_last_place() {
        let places = maglev(&even(5), key, 65_537);
        for member in 0..5 {
            let count = places.iter().filter(|m| **m == member).count();
            assert!(count.abs_diff(65_537 / 5) <= 1, "{count}");
        }
        let places = maglev(&[(0, 0.25), (1, 0.75)], key, 65_537);
        let count = places.iter().filter(|m| **m == 0).count();
        assert!(count.abs_diff(65_537 / 4) <= 1, "{count}");
        assert!(maglev(&[], key, 65_537).is_empty());
    }

    #[test]
    fn one_endpoint_less_moves_few_other_keys() {
        for tables in [
            [
                Table::Ring(ring(&even(5), key, 1024, 8192)),
                Table::Ring(ring(&even(4), key, 1024, 8192)),
            ],
            [
                Table::Maglev(maglev(&even(5), key, 65_537)),
                Table::Maglev(maglev(&even(4), key, 65_537)),
            ],
        ] {
            let [before, after] = tables.map(|table| owners(&table, 4000));
            let moved = before.iter().zip(&after).filter(|(b, a)| **b != 4 && a != b);
            let moved = moved.count();
            assert!(moved < 400, "{moved} of 4000");
        }
    }

    #[test]
    fn a_further_attempt_looks_elsewhere() {
        for table in [
            Table::Ring(ring(&even(5), key, 1024, 8192)),
            Table::Maglev(maglev(&even(5), key, 65_537)),
        ] {
            let other = |k: u64| {
                let first = table.find(hash(&k.to_be_bytes()), 0);
                (1..20).any(|attempt| table.find(hash(&k.to_be_bytes()), attempt) != first)
            };
            assert!((0..100).all(other));
        }
    }
}
