//! The keyed hash of the flow table and the classifier: multiply two words into 128 bits and fold the halves.
//!
//! The seed is secret and chosen per table by the caller, so that an outsider cannot aim packets at one bucket without
//! watching timings. It is a fast mixing function, not a cryptographic one: the tables stay correct (only slower)
//! under any input.

#![forbid(unsafe_code)]

/// The secret part of a table's hash.
///
/// Take it from the operating system's random source once per table; a constant is fine in tests only.
#[derive(Clone, Copy)]
pub struct HashSeed([u64; 14]);

impl HashSeed {
    /// Spreads 128 random bits over the words the hash needs.
    pub fn new(random: u128) -> Self {
        let mut state = random as u64;
        let high = (random >> 64) as u64;
        Self(std::array::from_fn(|_| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            split_mix(state) ^ split_mix(high ^ state.rotate_left(32))
        }))
    }

    /// Hash of five words: two independent products, then one over both.
    #[inline(always)]
    pub(super) fn hash5(&self, w: &[u64; 5]) -> u64 {
        let s = &self.0;
        let src = fold(w[0] ^ s[0], w[1] ^ s[1]);
        let dst = fold(w[2] ^ s[2], w[3] ^ s[3]);
        fold(src ^ w[4] ^ s[4], dst ^ s[5])
    }

    /// Hash of two words, with secrets of its own for each `pair` 0..4, so that such hashes can be summed.
    #[inline(always)]
    pub(super) fn pair(&self, pair: usize, a: u64, b: u64) -> u64 {
        let at = 6 + (pair & 3) * 2;
        fold(a ^ self.0[at], b ^ self.0[at + 1])
    }
}

impl std::fmt::Debug for HashSeed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("HashSeed(secret)")
    }
}

/// Maps a hash to `0..n` by its upper 32 bits, for any `n`.
#[inline(always)]
pub(super) fn spread(hash: u64, n: usize) -> usize {
    (((hash >> 32) * n as u64) >> 32) as usize
}

/// The 16-bit tag of a hash; never 0, which marks an empty lane.
#[inline(always)]
pub(super) fn tag(hash: u64) -> u16 {
    let tag = hash as u16;
    tag | u16::from(tag == 0)
}

#[inline(always)]
fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    (product as u64) ^ ((product >> 64) as u64)
}

/// SplitMix64's output function (Steele, Lea, Flood 2014).
fn split_mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Flows that differ in few low bits (one client counting its ports up) must still fill all buckets evenly.
    #[test]
    fn neighbouring_keys_spread_over_buckets_and_tags() {
        let seed = HashSeed::new(7);
        let (buckets, keys) = (1 << 10, 8 << 10);
        let mut load = vec![0u32; buckets];
        let mut tags = std::collections::HashSet::new();
        for port in 0..keys {
            let hash = seed.hash5(&[0, 0xffff_0a00_0001, 0, 0xffff_0a00_0002, port]);
            load[spread(hash, buckets)] += 1;
            tags.insert(tag(hash));
        }
        let fullest = load.iter().max().copied();
        assert!(
            fullest < Some(26),
            "fullest bucket holds {fullest:?} of a mean of 8"
        );
        assert!(tags.len() > 7_000, "{} tags for {keys} keys", tags.len());
    }

    #[test]
    fn seeds_change_everything() {
        let words = [1, 2, 3, 4, 5];
        let hashes: std::collections::HashSet<_> = (0..1000u128)
            .map(|s| HashSeed::new(s << 60).hash5(&words))
            .collect();
        assert_eq!(hashes.len(), 1000);
    }
}
