//! One name space for resources that many control-plane streams call the same.
//!
//! Resources with the same name and the same content are one. Of those that differ, the one most pods have keeps the name; the others
//! get `@` and the start of their hash. What holds one proxy's state always carries its pod's name.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::ir::Hash;

/// What tells resources of one name apart.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Variant {
    pub(super) hash: Hash,
    /// The only pod that may use it.
    pub(super) owner: Option<String>,
}

/// All variants of all names, with the number of pods that have each.
#[derive(Debug, Default)]
pub(super) struct Census(BTreeMap<String, BTreeMap<Variant, usize>>);

impl Census {
    pub(super) fn add(&mut self, name: &str, variant: Variant) {
        *self
            .0
            .entry(name.to_owned())
            .or_default()
            .entry(variant)
            .or_default() += 1;
    }

    /// The final name of each variant of each name.
    pub(super) fn settle(self) -> HashMap<(String, Variant), String> {
        let mut settled = HashMap::new();
        let mut taken: BTreeSet<String> = self.0.keys().cloned().collect();
        for (name, variants) in self.0 {
            let most = variants
                .iter()
                .filter(|(variant, _)| variant.owner.is_none())
                .max_by(|a, b| a.1.cmp(b.1).then_with(|| b.0.cmp(a.0)))
                .map(|(variant, _)| variant.clone());
            for variant in variants.into_keys() {
                let new = match &variant.owner {
                    _ if most.as_ref() == Some(&variant) => name.clone(),
                    Some(pod) => format!("{name}@{pod}"),
                    None => format!("{name}@{}", variant.hash.short()),
                };
                let new = if new == name || taken.insert(new.clone()) {
                    new
                } else {
                    let longer = format!("{new}-{}", variant.hash.version());
                    taken.insert(longer.clone());
                    longer
                };
                settled.insert((name.clone(), variant), new);
            }
        }
        settled
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_common_variant_keeps_the_name() {
        let variant = |text: &str, owner: Option<&str>| Variant {
            hash: Hash::of(text.as_bytes()),
            owner: owner.map(str::to_owned),
        };
        let mut census = Census::default();
        for hash in ["a", "b", "b"] {
            census.add("80", variant(hash, None));
        }
        census.add("c", variant("x", Some("p.ns")));
        let settled = census.settle();
        assert_eq!(settled[&("80".to_owned(), variant("b", None))], "80");
        let rare = variant("a", None);
        assert_eq!(
            settled[&("80".to_owned(), rare.clone())],
            format!("80@{}", rare.hash.short())
        );
        assert_eq!(settled[&("c".to_owned(), variant("x", Some("p.ns")))], "c@p.ns");
    }
}
