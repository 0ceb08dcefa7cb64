//! [`FlowSteering`]: rules that decide what the eswitch does with a frame.
//!
//! The model is `rte_flow`'s, cut to what a mesh needs: a rule lives in a group, has a priority, a pattern and a list of
//! actions. A frame starts in group 0. Within a group the matching rule with the **lowest priority number** wins; a
//! rule may `jump` to a group of a higher number. A frame that no rule matches meets the [`MissPolicy`].
//!
//! No backend supports everything: [`crate::SteeringCapabilities`] gives coarse limits and [`FlowSteering::validate`] judges a
//! concrete rule. What hardware cannot hold may run in software, and [`InstalledRule::placement`] says so.
//!
//! # Identity, owners, order
//! * The caller names each rule by a [`Cookie`]. Adding a cookie again with an equal rule succeeds without effect;
//!   with a different rule it is `Exists`.
//! * Each rule has an [`Owner`]. An owner sees, replaces and removes only its own; another's cookie is `NotFound`.
//! * Within a group, two rules of equal priority that some frame could both match must have equal actions; else adding the
//!   second is `Conflict`, whoever owns the first.
//!
//! # Why not submit and poll
//! Engines of this kind have enqueue, push and pull verbs. Here a call's future is the submission and its readiness
//! the completion: many may be in flight, a backend polls its queue once for all of them, and cancelling is
//! dropping. Batches keep the cost per rule low. The C ABI has the explicit verbs.

mod action;
mod batch;
mod pattern;
mod rule;

use std::fmt;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::backend::Fence;
use crate::error::Result;
use crate::port::PortRef;

pub use action::{Action, Conntrack, CtZone, Encapsulation, MeterId, RewriteField, TunnelKind};
pub use batch::{Atomicity, Batch, BatchOutcome, Change, Operation, Undone};
pub use pattern::{
    CtStates, DscpMatch, EtherType, Field, FragmentMatch, IpMatch, IpProtocol, Masked, Pattern, PortRange,
    TcpFlags, VlanMatch,
};
pub use rule::{Cookie, Group, Owner, PlacementRequest, Priority, RuleError, SteeringRule};

/// The rules of one card's eswitch.
///
/// All methods are safe to call concurrently. Calls of one caller that touch the same cookie take effect in the order in
/// which they were made, provided the earlier future was polled first.
#[async_trait]
pub trait FlowSteering: Send + Sync + fmt::Debug {
    /// Judges rules without installing them; one verdict per rule, in order.
    ///
    /// Judges each rule by itself, against the card's abilities, not against what is installed: a rule judged `Hardware` may
    /// still meet a full table. Read-only; cancelling leaves nothing behind.
    ///
    /// # Errors
    /// `DeviceLost`, `Timeout`, `Io`. A rule that cannot be done is a [`Verdict::No`], not an error.
    async fn validate(&self, rules: &[SteeringRule]) -> Result<Vec<Verdict>>;

    /// Carries out a batch of changes.
    ///
    /// Operations take effect in order. [`Batch::atomicity`] decides what a failing one means for the others; a backend
    /// must offer [`Atomicity::Continue`] and refuses a stronger one that it did not declare with `Unsupported`. When the
    /// future is ready, each change that is reported done acts on the next frame, and removed rules' counters are final.
    ///
    /// Blocking: never the calling thread. Deadline: the caller's, by dropping the future. **Cancelling** may leave any
    /// prefix of the batch carried out; `list` tells which. Adding a cookie that is there, and removing one that is not,
    /// make repeating the whole batch safe.
    ///
    /// Where backends differ: one that gets only "so many done" from its device reports the first failure, marks the rest
    /// [`crate::Effect::Unknown`], and reads the table again before the next batch.
    ///
    /// # Errors
    /// As a whole: `Stale` (epoch), `Unsupported` (atomicity), `CapacityExceeded` (longer than `batch_max`),
    /// `DeviceLost`, `Timeout`; then nothing took effect unless [`crate::Error::effect`] says otherwise. Per operation: in the
    /// outcome.
    async fn apply(&self, fence: Fence, batch: &Batch) -> Result<BatchOutcome>;

    /// Lists installed rules of an owner in (group, priority, cookie) order.
    ///
    /// From the device or from what the backend knows to be on it; never what somebody once asked for. Read-only.
    ///
    /// # Errors
    /// `DeviceLost`, `Timeout`, `Io`.
    async fn list(&self, owner: Owner) -> Result<Vec<InstalledRule>>;

    /// Reads counters, one answer per cookie, in order; `None` for a cookie that the owner does not have or that
    /// does not count.
    ///
    /// A value is at most [`crate::SteeringCapabilities::counter_age_ms`] old and never runs backwards within an epoch.
    ///
    /// # Errors
    /// `DeviceLost`, `Timeout`, `Io`.
    async fn counters(&self, owner: Owner, cookies: &[Cookie]) -> Result<Vec<Option<Counters>>>;

    /// Removes every rule of an owner and returns how many.
    ///
    /// Cancelling may leave some; calling again removes the rest. Other owners' rules are untouched.
    ///
    /// # Errors
    /// `Stale`, `DeviceLost`, `Timeout`, `Io` with [`crate::Effect::Partial`] when some were removed.
    async fn flush(&self, fence: Fence, owner: Owner) -> Result<u64>;

    /// Sets what happens to frames of a port that no rule of group 0 matches.
    ///
    /// A port starts with [`MissPolicy::Drop`]: closed is the default. A frame that a rule sent to a later group, where
    /// none matches it, is dropped whatever the policy.
    ///
    /// # Errors
    /// `Unsupported`, `NotFound` (port), `Stale`, `DeviceLost`.
    async fn set_miss_policy(&self, fence: Fence, port: PortRef, policy: MissPolicy) -> Result<()>;

    /// How full the card's finite resources are. Read-only.
    ///
    /// # Errors
    /// `DeviceLost`, `Timeout`, `Io`.
    async fn occupancy(&self) -> Result<Vec<Occupancy>>;
}

/// What a backend would do with a rule.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verdict {
    /// The card does it alone.
    Hardware,
    /// The card does part of it and hands frames over for the rest, for this reason.
    Partial(String),
    /// It runs on the SoC's processors, for this reason.
    Software(String),
    /// It cannot be done.
    No {
        /// Path of the field that stands in the way, as `actions[1]` or `pattern.l4_dst`.
        field: String,
        /// Why, in one sentence.
        reason: String,
    },
}

impl Verdict {
    /// True unless it cannot be done.
    pub const fn is_possible(&self) -> bool {
        !matches!(self, Self::No { .. })
    }
}

/// Where an installed rule acts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Placement {
    /// In the card.
    Hardware,
    /// Half in the card; the reason says what is missing.
    Partial(String),
    /// On the SoC's processors; the reason says why.
    Software(String),
}

/// A rule as it is installed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct InstalledRule {
    /// The rule as it was given.
    pub rule: SteeringRule,
    /// Where it acts.
    pub placement: Placement,
}

impl InstalledRule {
    /// A rule and where it acts.
    pub fn new(rule: SteeringRule, placement: Placement) -> Self {
        Self { rule, placement }
    }
}

/// What happens to a frame that matches no rule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum MissPolicy {
    /// It is dropped and counted.
    #[default]
    Drop,
    /// It goes to the dataplane's software on the representor.
    Software,
}

/// Counts of one rule since `since`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Frames; a super-frame counts as the frames it stands for.
    pub packets: u64,
    /// Octets in the backend's declared [`crate::CounterUnit`].
    pub octets: u64,
    /// Life of the card in which the counting began; a new epoch starts at zero.
    pub epoch: crate::Epoch,
    /// How long the rule has not been hit, in milliseconds; `None` when the backend does not tell or it never was.
    pub idle_ms: Option<u64>,
}

/// Use of one finite resource.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Occupancy {
    /// Name, as in errors: `steering.rules`, `steering.counters`, `vf`.
    pub resource: String,
    /// In use.
    pub used: u64,
    /// How many there are.
    pub limit: u64,
}
