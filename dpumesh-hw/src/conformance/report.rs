//! What a run found: one [`Entry`] per case, as a table for people and as JSON for programs.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::expected::{Difference, Expectations};

/// What became of one case.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The sentence held.
    Passed,
    /// It did not.
    Failed {
        /// What was seen instead.
        message: String,
    },
    /// It cannot be shown on this card or with this fixture.
    NotSupported {
        /// Which ability is missing.
        capability: String,
        /// Why.
        reason: String,
    },
    /// It did not hold, and the expectations say so.
    ExpectedFailure {
        /// Why that is accepted.
        reason: String,
        /// What was seen.
        message: String,
    },
}

/// One case of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The part of the contract.
    pub part: String,
    /// Name of the case.
    pub case: String,
    /// The doc sentence that it proves.
    pub sentence: String,
    /// What became of it.
    pub outcome: Outcome,
    /// How long it took, in microseconds.
    pub micros: u64,
}

/// What a run found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Name of the fixture.
    pub fixture: String,
    /// Version of the kit.
    pub kit: String,
    /// One per case, in the order of the list of cases.
    pub entries: Vec<Entry>,
}

/// How many cases ended how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Held.
    pub passed: usize,
    /// Did not.
    pub failed: usize,
    /// Could not be shown.
    pub not_supported: usize,
    /// Did not hold, as expected.
    pub expected_failures: usize,
}

impl Report {
    /// How many cases ended how.
    pub fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        for entry in &self.entries {
            match entry.outcome {
                Outcome::Passed => counts.passed += 1,
                Outcome::Failed { .. } => counts.failed += 1,
                Outcome::NotSupported { .. } => counts.not_supported += 1,
                Outcome::ExpectedFailure { .. } => counts.expected_failures += 1,
            }
        }
        counts
    }

    /// True when no case failed beyond what was expected.
    pub fn is_clean(&self) -> bool {
        self.counts().failed == 0
    }

    /// The outcome of a case; `None` when it was not run.
    pub fn outcome(&self, case: &str) -> Option<&Outcome> {
        self.entries
            .iter()
            .find(|entry| entry.case == case)
            .map(|entry| &entry.outcome)
    }

    /// The report as JSON, indented.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("strings and numbers always serialise")
    }

    /// What of this run the expectations do not say, and what they say that did not happen; empty when both agree.
    pub fn differences(&self, expected: &Expectations) -> Vec<Difference> {
        expected.compare(self)
    }

    /// The expectations that this run would agree with, to be checked in after each reason was looked at. Failures take
    /// over the reasons of `known`; new ones say what was seen.
    pub fn to_expectations(&self, known: &Expectations) -> Expectations {
        let mut expectations = Expectations::default();
        for entry in &self.entries {
            let case = entry.case.clone();
            match &entry.outcome {
                Outcome::Passed => continue,
                Outcome::NotSupported { capability, reason } => {
                    expectations.skips.insert(case, format!("{capability}: {reason}"))
                }
                Outcome::ExpectedFailure { reason, .. } => expectations.failures.insert(case, reason.clone()),
                Outcome::Failed { message } => {
                    let reason = known.failures.get(&case).unwrap_or(message).clone();
                    expectations.failures.insert(case, reason)
                }
            };
        }
        expectations
    }
}

/// The end of a report: skips by missing ability, then the counts.
#[derive(Clone, Copy, Debug)]
pub struct Summary<'a>(&'a Report);

impl Report {
    /// The end of the report.
    pub fn summary(&self) -> Summary<'_> {
        Summary(self)
    }

    fn skips_by_capability(&self) -> BTreeMap<&str, usize> {
        let mut skips = BTreeMap::new();
        for entry in &self.entries {
            if let Outcome::NotSupported { capability, .. } = &entry.outcome {
                *skips.entry(capability.as_str()).or_default() += 1;
            }
        }
        skips
    }
}

impl fmt::Display for Report {
    /// A table: one [`Entry`] a line; then the [`Summary`].
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} against conformance kit {}", self.fixture, self.kit)?;
        for entry in &self.entries {
            writeln!(f, "{entry}")?;
        }
        self.summary().fmt(f)
    }
}

impl fmt::Display for Summary<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (capability, count) in self.0.skips_by_capability() {
            writeln!(f, "{count} not supported for want of {capability}")?;
        }
        let counts = self.0.counts();
        write!(
            f,
            "{} cases: {} passed, {} failed, {} expected failures, {} not supported",
            self.0.entries.len(),
            counts.passed,
            counts.failed,
            counts.expected_failures,
            counts.not_supported
        )
    }
}

impl fmt::Display for Entry {
    /// Part, case, milliseconds, outcome.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let time = Duration::from_micros(self.micros).as_secs_f64() * 1000.0;
        write!(
            f,
            "{:<10} {:<LONGEST_NAME$} {:>9.1} ms  {}",
            self.part, self.case, time, self.outcome
        )
    }
}

/// Octets of a column that holds any case's name.
const LONGEST_NAME: usize = 67;

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Passed => f.write_str("passed"),
            Self::Failed { message } => write!(f, "FAILED: {message}"),
            Self::NotSupported { capability, reason } => write!(f, "not supported: {capability}: {reason}"),
            Self::ExpectedFailure { reason, message } => write!(f, "expected failure: {reason}: {message}"),
        }
    }
}
