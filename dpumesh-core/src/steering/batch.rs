//! Batches of rule changes and what became of each.

use serde::{Deserialize, Serialize};

use super::{Cookie, Counters, Owner, Placement, SteeringRule};
use crate::error::Error;

/// Changes to be carried out together, in order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Batch {
    /// The changes.
    pub operations: Vec<Operation>,
    /// What a failing change means for the others.
    pub atomicity: Atomicity,
}

/// One change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[allow(
    clippy::large_enum_variant,
    reason = "a batch is mostly additions; boxing each would cost more than it saves"
)]
pub enum Operation {
    /// Installs a rule.
    Add(SteeringRule),
    /// Removes a rule of an owner. A cookie that is not there is [`Change::Absent`], not an error; another owner's
    /// is `NotFound`.
    Remove {
        /// Whose rule.
        owner: Owner,
        /// Which.
        cookie: Cookie,
    },
}

/// What a failing change means for the rest of its batch (P4Runtime §12.2 has the same three).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Atomicity {
    /// The others are carried out all the same. Every backend has it.
    #[default]
    Continue,
    /// Those before it are undone, those behind it are not begun. Frames may meet the intermediate states.
    Rollback,
    /// All or none, and no frame meets an intermediate state.
    Atomic,
}

/// What became of a batch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct BatchOutcome {
    /// One per operation, in order.
    pub results: Vec<Result<Change, Error>>,
    /// Whether a failure was undone.
    pub undone: Undone,
}

/// Whether the effects of a batch were undone after a failure.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub enum Undone {
    /// There was no need, or nobody asked.
    #[default]
    No,
    /// All of them, or there were none: nothing changed.
    All,
    /// Undoing failed as well; `list` tells what is there.
    Failed(Box<Error>),
}

/// What became of one operation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Change {
    /// The rule was installed, and acts here.
    Added(Placement),
    /// The same rule was there already; it acts here and keeps its counters.
    Present(Placement),
    /// The rule was removed; its final counters, if it counted.
    Removed(Option<Counters>),
    /// No rule has this cookie.
    Absent,
    /// Not begun, or undone, because another operation of the batch failed.
    Skipped,
}

impl Batch {
    /// A batch that carries on when one change fails.
    pub fn new(operations: Vec<Operation>) -> Self {
        Self {
            operations,
            atomicity: Atomicity::Continue,
        }
    }

    /// With a stronger guarantee.
    pub fn with(mut self, atomicity: Atomicity) -> Self {
        self.atomicity = atomicity;
        self
    }
}

impl BatchOutcome {
    /// An outcome with nothing undone.
    pub fn new(results: Vec<Result<Change, Error>>) -> Self {
        Self {
            results,
            undone: Undone::No,
        }
    }

    /// Says whether it was undone.
    pub fn undone(mut self, undone: Undone) -> Self {
        self.undone = undone;
        self
    }

    /// The first failure, if any.
    ///
    /// # Errors
    /// That failure.
    pub fn into_result(self) -> Result<Vec<Change>, Error> {
        self.results.into_iter().collect()
    }
}
