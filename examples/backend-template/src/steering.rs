//! [`FlowSteering`] for a card with a small exact-match table.
//!
//! [`RuleStore`] knows the contract's rules about cookies, owners, conflicts, batches and limits, and says what changes:
//! [`Plan::changes`](dpumesh_hw::steering::Plan) is what to write to the card. Here nothing has to be written: the table
//! is in memory. A card that may refuse an entry takes the plan back by [`RuleStore::undo`].

use std::sync::OnceLock;
use std::time::Instant;

use async_trait::async_trait;
use dpumesh_core::steering::{
    Atomicity, Batch, BatchOutcome, Cookie, Counters, Field, InstalledRule, MissPolicy, Occupancy, Owner,
    SteeringRule, Verdict,
};
use dpumesh_core::{
    ActionKinds, Capabilities, Epoch, ErrorKind, Fence, FlowSteering, MatchKinds, PortRef, Result,
    SteeringCapabilities,
};
use dpumesh_hw::steering::RuleStore;

use crate::card::{MyCard, NAME, error};

/// What the card promises. The kit takes each claim at its word.
pub(crate) fn claim(capabilities: &mut Capabilities) {
    let steering = &mut capabilities.steering;
    steering.hardware_rules = 64;
    steering.rules = 64;
    steering.groups = 1;
    steering.priorities = 2;
    steering.masks = 4;
    steering.actions = ActionKinds::DROP | ActionKinds::FORWARD;
    steering.hardware_actions = steering.actions;
    steering.fields = [
        (Field::Port, MatchKinds::EXACT),
        (Field::EthDst, MatchKinds::EXACT),
    ]
    .into();
    steering.hardware_fields = steering.fields.clone();
    steering.atomicity = [Atomicity::Continue, Atomicity::Rollback].into();
    steering.batch_max = 64;
    steering.per_operation_status = true;
}

/// The table at the beginning of a life.
pub(crate) fn empty(epoch: Epoch) -> RuleStore {
    RuleStore::new(NAME, limits(), epoch)
}

fn limits() -> SteeringCapabilities {
    let mut capabilities = Capabilities::default();
    claim(&mut capabilities);
    capabilities.steering
}

#[async_trait]
impl FlowSteering for MyCard {
    async fn validate(&self, rules: &[SteeringRule]) -> Result<Vec<Verdict>> {
        let life = self.present("steering.validate")?;
        Ok(rules.iter().map(|rule| life.rules.judge(rule)).collect())
    }

    async fn apply(&self, fence: Fence, batch: &Batch) -> Result<BatchOutcome> {
        let mut life = self.fenced("steering.apply", fence)?;
        let plan = life.rules.apply(batch, now_ms())?;
        // A card of silicon: write plan.changes, in order; on an error undo(plan) and report it.
        Ok(plan.outcome)
    }

    async fn list(&self, owner: Owner) -> Result<Vec<InstalledRule>> {
        Ok(self.present("steering.list")?.rules.list(owner))
    }

    async fn counters(&self, owner: Owner, cookies: &[Cookie]) -> Result<Vec<Option<Counters>>> {
        let life = self.present("steering.counters")?;
        Ok(life.rules.counters(owner, cookies, now_ms()))
    }

    async fn flush(&self, fence: Fence, owner: Owner) -> Result<u64> {
        let mut life = self.fenced("steering.flush", fence)?;
        Ok(life.rules.flush(owner, now_ms()).len() as u64)
    }

    async fn set_miss_policy(&self, fence: Fence, port: PortRef, policy: MissPolicy) -> Result<()> {
        const SET: &str = "steering.set_miss_policy";
        let mut life = self.fenced(SET, fence)?;
        if !life.vfs.has(port) {
            return Err(error(ErrorKind::NotFound, SET, "there is no such port").object(port));
        }
        life.rules.set_miss_policy(port, policy);
        Ok(())
    }

    async fn occupancy(&self) -> Result<Vec<Occupancy>> {
        Ok(self.present("steering.occupancy")?.rules.occupancy())
    }
}

/// Milliseconds since the first call.
fn now_ms() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    let start = START.get_or_init(Instant::now);
    start.elapsed().as_millis().try_into().unwrap_or(u64::MAX)
}
