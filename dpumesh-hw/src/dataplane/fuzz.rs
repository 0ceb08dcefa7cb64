//! What the fuzz target `rule` runs: arbitrary octets as a rule or a batch of rules, as they come over the channel.
//! The target in `fuzz/` calls it and nothing else; its corpus runs as a unit test here.
//!
//! # Panics
//! When a rule is broken: that is what a fuzzer looks for.

use dpumesh_core::steering::{Batch, Operation, SteeringRule};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::rules::refusal;
use super::software_capabilities;
use crate::steering::judge;

/// What is accepted is read back as it was written, and everything that judges a rule copes with it.
pub fn rule(data: &[u8]) {
    if let Some(rule) = read::<SteeringRule>(data) {
        examine(&rule);
    }
    if let Some(batch) = read::<Batch>(data) {
        for operation in &batch.operations {
            if let Operation::Add(rule) = operation {
                examine(rule);
            }
        }
    }
}

fn read<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(data: &[u8]) -> Option<T> {
    let value: T = serde_json::from_slice(data).ok()?;
    let text = serde_json::to_vec(&value).expect("what was read can be written");
    let again: T = serde_json::from_slice(&text).expect("what was written can be read");
    assert_eq!(again, value);
    Some(value)
}

fn examine(rule: &SteeringRule) {
    let verdict = judge(rule, &software_capabilities(1));
    if rule.check().is_err() {
        assert!(!verdict.is_possible(), "a senseless rule is refused: {rule:?}");
        return;
    }
    let refused = refusal(rule);
    if let Some(refused) = &refused {
        assert!(!refused.field.is_empty() && !refused.reason.is_empty());
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn corpus() -> Vec<(String, Vec<u8>)> {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/rule");
        let files = std::fs::read_dir(folder)
            .expect("the corpus")
            .map(|file| file.expect("a file"));
        files
            .map(|file| {
                let name = file.file_name().into_string().expect("a name");
                (name, std::fs::read(file.path()).expect("readable"))
            })
            .collect()
    }

    #[test]
    fn the_corpus_holds_at_every_length_and_says_in_its_names_what_is_accepted() {
        let corpus = corpus();
        assert!(corpus.len() > 20, "{} files", corpus.len());
        for (name, octets) in corpus {
            let rule = serde_json::from_slice::<SteeringRule>(&octets).is_ok();
            let batch = serde_json::from_slice::<Batch>(&octets).is_ok();
            assert_eq!(rule, name.starts_with("rule_"), "{name}");
            assert_eq!(batch, name.starts_with("batch_"), "{name}");
            (0..=octets.len()).for_each(|length| super::rule(&octets[..length]));
        }
    }

    proptest! {
        #[test]
        fn changed_octets_do_no_harm(
            file in any::<prop::sample::Index>(),
            changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        ) {
            let corpus = corpus();
            let mut octets = corpus[file.index(corpus.len())].1.clone();
            for (at, value) in changes {
                if !octets.is_empty() {
                    let at = at.index(octets.len());
                    octets[at] = value;
                }
            }
            super::rule(&octets);
        }
    }
}
