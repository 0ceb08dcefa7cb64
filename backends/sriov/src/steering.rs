//! [`FlowSteering`] of a card in switchdev mode: [`crate::flower`] on its representors and uplinks.
//!
//! Each call looks at the card first, which costs some hundred microseconds: rules stand on network devices that go and come with VFs,
//! and on a mode that somebody may change. What is found decides whether the rules' thread of the present life serves, with
//! other ports if need be, or another begins, which takes up what is in the kernel. A rule on a VF that went stays until it is removed,
//! and does not take the VF that comes with the same number for the old one.
//!
//! Outside of switchdev mode a filter would see a VF's frames only where they are for the host: there is no steering, and
//! [`Card::steering_absence`] tells why.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use dpumesh_core::steering::{
    Batch, BatchOutcome, Cookie, Counters, InstalledRule, MissPolicy, Occupancy, Owner, SteeringRule, Verdict,
};
use dpumesh_core::{
    Epoch, ErrorKind, Fence, FlowSteering, PciAddress, PortRef, Result, SteeringCapabilities,
};

use crate::card::{Change, Inner, error};
use crate::flower::{Life, Options, Steering};
use crate::{Card, NAME, eswitch};

const LEGACY: &str =
    "the card is not in switchdev mode: a filter would see a VF's frames only where they are for the host";

/// Rules of a card.
#[derive(Clone, Debug)]
pub(crate) struct CardSteering {
    card: Arc<Inner>,
    opened: Arc<Mutex<Option<Opened>>>,
    /// Held from the look at the card to the end of a change, by who comes first: changes take effect in the order of their calls.
    turn: Arc<tokio::sync::Mutex<()>>,
}

/// Network device of each port.
type Ports = BTreeMap<PortRef, u32>;

#[derive(Clone, Debug)]
struct Opened {
    epoch: Epoch,
    ports: Ports,
    rules: Arc<Steering>,
}

impl Card {
    /// Why the card offers no steering now; `None` when it does.
    pub fn steering_absence(&self) -> Option<String> {
        self.steering_part().refusal()
    }
}

impl CardSteering {
    pub(crate) fn new(card: Arc<Inner>) -> Self {
        Self {
            card,
            opened: Arc::default(),
            turn: Arc::default(),
        }
    }

    /// Offered in the present mode: the card is in switchdev mode, and the kernel takes filters on its ports.
    pub(crate) fn is_offered(&self) -> bool {
        self.refusal().is_none()
    }

    /// Limits, none where nothing is offered.
    pub(crate) fn capabilities(&self) -> SteeringCapabilities {
        let rules = self.of_this_life();
        rules.map(|rules| rules.capabilities()).unwrap_or_default()
    }

    fn refusal(&self) -> Option<String> {
        Some(self.of_this_life().err()?.message.to_string())
    }

    /// The rules of the life that was seen last. Looks at the card only when that life has none yet.
    fn of_this_life(&self) -> Result<Arc<Steering>> {
        const LOOK: &str = "steering.open";
        let (epoch, switchdev) = self.card.mode();
        let there = self.opened().clone().filter(|opened| opened.epoch == epoch);
        match there {
            Some(opened) if switchdev => Ok(opened.rules),
            _ if switchdev => Ok(self.current(LOOK)?.0),
            _ => Err(error(ErrorKind::Unsupported, LOOK, LEGACY)),
        }
    }

    fn opened(&self) -> std::sync::MutexGuard<'_, Option<Opened>> {
        self.opened.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The rules of the card as it is now, and its ports when they are others than the rules know. Blocks.
    fn current(&self, operation: &'static str) -> Result<(Arc<Steering>, Option<Ports>)> {
        let change = self.card.look(operation)?;
        check_mode(&change)?;
        let (epoch, ports) = (change.record.epoch, ports(&change)?);
        drop(change);
        let mut opened = self.opened();
        if let Some(opened) = opened.as_ref().filter(|opened| opened.epoch == epoch) {
            let others = (opened.ports != ports).then_some(ports);
            return Ok((Arc::clone(&opened.rules), others));
        }
        let kernel = self.card.kernel.traffic_control().ok_or_else(|| {
            let message = "the kernel gives no access to traffic control";
            error(ErrorKind::Unsupported, operation, message)
        })?;
        let options = Options::new(NAME, block(self.card.options.device), ports.clone());
        let rules = Arc::new(Steering::open(kernel, options, Arc::new(Life::new(epoch)))?);
        *opened = Some(Opened {
            epoch,
            ports,
            rules: Arc::clone(&rules),
        });
        Ok((rules, None))
    }

    async fn rules(&self, operation: &'static str) -> Result<Arc<Steering>> {
        let steering = self.clone();
        let done = tokio::task::spawn_blocking(move || steering.current(operation)).await;
        let (rules, others) = done.unwrap_or_else(|failed| {
            Err(error(ErrorKind::Fault, operation, "the call broke off").source(failed))
        })?;
        if let Some(ports) = others {
            rules.set_ports(ports.clone()).await?;
            let mut opened = self.opened();
            if let Some(opened) = opened
                .as_mut()
                .filter(|opened| Arc::ptr_eq(&opened.rules, &rules))
            {
                opened.ports = ports;
            }
        }
        Ok(rules)
    }
}

fn check_mode(change: &Change<'_>) -> Result<()> {
    if !change.inner.options.role.is_soc() {
        let message = "this side is the host: rules are the SoC's part";
        return Err(change.refuse(ErrorKind::Unsupported, message));
    }
    if !change.record.abilities.switchdev {
        return Err(change
            .refuse(ErrorKind::Unsupported, LEGACY)
            .object(change.inner.options.device));
    }
    Ok(())
}

fn ports(change: &Change<'_>) -> Result<Ports> {
    let all = eswitch::representors(change)?;
    Ok(all
        .into_iter()
        .map(|representor| (representor.port, representor.link.0))
        .collect())
}

/// Number of the tc block that a card's devices share: by its place on the bus, so that cards do not meet. Never 0, which is no block.
fn block(device: PciAddress) -> u32 {
    let function = u32::from(device.device()) << 3; // of all functions of the card
    0x8000_0000 | u32::from(device.domain() & 0x7fff) << 16 | u32::from(device.bus()) << 8 | function
}

#[async_trait]
impl FlowSteering for CardSteering {
    async fn validate(&self, rules: &[SteeringRule]) -> Result<Vec<Verdict>> {
        self.rules("steering.validate").await?.validate(rules).await
    }

    async fn apply(&self, fence: Fence, batch: &Batch) -> Result<BatchOutcome> {
        let _turn = self.turn.lock().await;
        self.rules("steering.apply").await?.apply(fence, batch).await
    }

    async fn list(&self, owner: Owner) -> Result<Vec<InstalledRule>> {
        self.rules("steering.list").await?.list(owner).await
    }

    async fn counters(&self, owner: Owner, cookies: &[Cookie]) -> Result<Vec<Option<Counters>>> {
        self.rules("steering.counters")
            .await?
            .counters(owner, cookies)
            .await
    }

    async fn flush(&self, fence: Fence, owner: Owner) -> Result<u64> {
        let _turn = self.turn.lock().await;
        self.rules("steering.flush").await?.flush(fence, owner).await
    }

    async fn set_miss_policy(&self, fence: Fence, port: PortRef, policy: MissPolicy) -> Result<()> {
        let _turn = self.turn.lock().await;
        let rules = self.rules("steering.set_miss_policy").await?;
        rules.set_miss_policy(fence, port, policy).await
    }

    async fn occupancy(&self) -> Result<Vec<Occupancy>> {
        self.rules("steering.occupancy").await?.occupancy().await
    }
}

#[cfg(test)]
mod tests {
    use dpumesh_core::steering::{Action, Change, Group, Pattern, Placement, PlacementRequest, Priority};
    use dpumesh_core::{Backend, BackendExt, FlowSteeringExt, PfIndex};
    use dpumesh_hw::netlink::EswitchMode;

    use super::*;
    use crate::fake::{FakeMachine, Model};
    use crate::{Options as CardOptions, Parts};

    fn card(machine: &FakeMachine) -> Arc<Card> {
        let mut options = CardOptions::new(machine.device(), "dpu0", machine.directory());
        options.vlans = Some((3000, 3999));
        Card::open_on(options, Arc::new(machine.clone()), Parts::default()).expect("opened")
    }

    fn drop_all_of(port: PortRef, cookie: u128) -> SteeringRule {
        SteeringRule {
            group: Group(0),
            priority: Priority(1),
            pattern: Pattern {
                port: Some(port),
                ..Pattern::default()
            },
            actions: vec![Action::Drop],
            placement: PlacementRequest::Any,
            idle_timeout_ms: None,
            owner: Owner::Agent,
            cookie: Cookie(cookie),
        }
    }

    #[tokio::test]
    async fn switchdev_mode_brings_rules_on_representors_and_legacy_mode_says_why_not() {
        let machine = FakeMachine::new(Model::mlx5()).expect("a machine");
        let card = card(&machine);
        assert!(card.steering().is_none());
        assert_eq!(card.capabilities().steering, SteeringCapabilities::default());
        assert!(card.steering_absence().expect("a reason").contains("switchdev"));
        let old = card.fence();
        card.set_eswitch_mode(old, EswitchMode::Switchdev)
            .expect("switched");
        let vf = card.require_vf().expect("VFs");
        vf.set_vf_count(card.fence(), PfIndex(0), 2).await.expect("made");
        assert_eq!(card.steering_absence(), None);
        let claims = card.capabilities().steering;
        assert!((1..=65_536).contains(&claims.hardware_rules), "{claims:?}");
        let steering = card.steering().expect("offered");
        let added = steering
            .add(card.fence(), drop_all_of(PortRef::vf(1), 1))
            .await
            .expect("added");
        assert_eq!(added, Change::Added(Placement::Hardware));
        let stale = steering.add(old, drop_all_of(PortRef::vf(0), 2)).await;
        assert_eq!(stale.expect_err("old life").kind, ErrorKind::Stale);
        let unknown = steering.add(card.fence(), drop_all_of(PortRef::vf(7), 3)).await;
        unknown.expect_err("there is no such VF");
        // More VFs: their representors are in the next call.
        vf.set_vf_count(card.fence(), PfIndex(0), 8).await.expect("made");
        steering
            .add(card.fence(), drop_all_of(PortRef::vf(7), 3))
            .await
            .expect("added");
        machine.lose();
        let lost = steering.list(Owner::Agent).await.expect_err("it is gone");
        assert_eq!(lost.kind, ErrorKind::DeviceLost);
    }

    #[tokio::test]
    async fn another_process_takes_up_the_rules_that_are_there() {
        let machine = FakeMachine::new(Model::mlx5()).expect("a machine");
        let first = card(&machine);
        first
            .set_eswitch_mode(first.fence(), EswitchMode::Switchdev)
            .expect("switched");
        let vf = first.require_vf().expect("VFs");
        vf.set_vf_count(first.fence(), PfIndex(0), 2).await.expect("made");
        let rule = drop_all_of(PortRef::vf(0), 5);
        let steering = first.steering().expect("offered");
        steering.add(first.fence(), rule.clone()).await.expect("added");
        drop(first);
        let second = card(&machine);
        let listed = second.steering().expect("offered").list(Owner::Agent).await;
        let listed: Vec<SteeringRule> = listed
            .expect("listed")
            .into_iter()
            .map(|there| there.rule)
            .collect();
        assert_eq!(listed, [rule]);
    }
}
