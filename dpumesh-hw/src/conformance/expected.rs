//! The checked-in side of a run: which cases are skipped and which fail, each with a reason.
//!
//! ```json
//! { "skips":    { "attach_moves_the_vf": "rig.namespaces: the card has no namespaces" },
//!   "failures": { "list_is_in_order": "firmware 3.2 sorts by handle; fixed in 3.3" } }
//! ```
//!
//! A backend keeps one such file per fixture. What the file does not say is a difference, in both directions, so that
//! nothing is skipped silently and no excuse outlives its bug.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::report::{Outcome, Report};

/// Skips and failures that are known, by the name of the case.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Expectations {
    /// Cases that cannot be shown, and why.
    pub skips: BTreeMap<String, String>,
    /// Cases that fail, and why that is accepted for now.
    pub failures: BTreeMap<String, String>,
}

/// A disagreement between a run and its expectations.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Which case.
    pub case: String,
    /// What the expectations say of it.
    pub expected: &'static str,
    /// What happened.
    pub found: String,
}

impl Expectations {
    /// Reads the file's text.
    ///
    /// # Errors
    /// Where and why the text is no expectations file.
    pub fn from_json(text: &str) -> Result<Self, serde_json::Error> {
        serde_json::from_str(text)
    }

    /// The text to be checked in, ending in a newline.
    pub fn to_json(&self) -> String {
        let mut text = serde_json::to_string_pretty(self).expect("maps of strings always serialise");
        text.push('\n');
        text
    }

    pub(super) fn compare(&self, report: &Report) -> Vec<Difference> {
        let mut differences: Vec<Difference> = report
            .entries
            .iter()
            .filter_map(|entry| {
                let expected = self.of(&entry.case);
                (expected != word(&entry.outcome)).then(|| Difference {
                    case: entry.case.clone(),
                    expected,
                    found: entry.outcome.to_string(),
                })
            })
            .collect();
        let listed = self.skips.keys().chain(self.failures.keys());
        for case in listed.filter(|case| report.outcome(case).is_none()) {
            differences.push(Difference {
                case: case.clone(),
                expected: self.of(case),
                found: "no such case was run".to_owned(),
            });
        }
        differences
    }

    fn of(&self, case: &str) -> &'static str {
        if self.failures.contains_key(case) {
            FAIL
        } else if self.skips.contains_key(case) {
            SKIP
        } else {
            PASS
        }
    }
}

const PASS: &str = "to pass";
const SKIP: &str = "to be skipped";
const FAIL: &str = "to fail";

fn word(outcome: &Outcome) -> &'static str {
    match outcome {
        Outcome::Passed => PASS,
        Outcome::NotSupported { .. } => SKIP,
        Outcome::Failed { .. } | Outcome::ExpectedFailure { .. } => FAIL,
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: expected {}, found: {}",
            self.case, self.expected, self.found
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance::report::Entry;

    fn report(outcomes: &[(&str, Outcome)]) -> Report {
        let entries = outcomes
            .iter()
            .map(|(case, outcome)| Entry {
                part: "vf".into(),
                case: (*case).into(),
                sentence: String::new(),
                outcome: outcome.clone(),
                micros: 1,
            })
            .collect();
        Report {
            fixture: "test".into(),
            kit: "1".into(),
            entries,
        }
    }

    fn skipped() -> Outcome {
        Outcome::NotSupported {
            capability: "rig.probe".into(),
            reason: "none".into(),
        }
    }

    fn failed() -> Outcome {
        Outcome::Failed { message: "no".into() }
    }

    #[test]
    fn what_nobody_listed_and_what_no_longer_happens_are_differences() {
        let expected = Expectations::from_json(
            r#"{"skips": {"a": "x", "b": "x"}, "failures": {"c": "y", "d": "y", "gone": "y"}}"#,
        )
        .expect("valid");
        let run = report(&[
            ("a", skipped()),
            ("b", Outcome::Passed),
            ("c", failed()),
            ("d", Outcome::Passed),
            ("e", failed()),
            ("f", skipped()),
            ("g", Outcome::Passed),
        ]);
        let cases: Vec<String> = run.differences(&expected).into_iter().map(|d| d.case).collect();
        assert_eq!(cases, ["b", "d", "e", "f", "gone"]);
    }

    #[test]
    fn a_run_agrees_with_the_expectations_made_from_it() {
        let run = report(&[("a", skipped()), ("b", Outcome::Passed), ("c", failed())]);
        let expected = run.to_expectations(&Expectations::default());
        assert!(run.differences(&expected).is_empty());
        assert_eq!(
            Expectations::from_json(&expected.to_json()).expect("valid"),
            expected
        );
        assert_eq!(run.counts().failed, 1);
        assert!(
            run.to_string()
                .ends_with("3 cases: 1 passed, 1 failed, 0 expected failures, 1 not supported")
        );
    }

    #[test]
    fn a_file_with_unknown_words_is_refused() {
        assert!(Expectations::from_json(r#"{"skip": {}}"#).is_err());
    }
}
