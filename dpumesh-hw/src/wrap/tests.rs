use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use dpumesh_core::backend::EventStream;
use dpumesh_core::offload::{Connection, ConnectionKind, ConnectionLeg, NpOffload, Slot, TableId};
use dpumesh_core::steering::{
    Action, Atomicity, Batch, BatchOutcome, Change, Cookie, Counters, InstalledRule, IpProtocol, MissPolicy,
    Occupancy, Operation, Owner, Pattern, Placement, Priority, SteeringRule, Undone, Verdict,
};
use dpumesh_core::transport::{
    ChannelConfig, ChannelName, PeerState, SharedWriter, ShmChannel, ShmListener, ShmTransport,
};
use dpumesh_core::vf::{Attachment, ResetLevel, VfConfig, VfRequest};
use dpumesh_core::{
    Backend, BackendExt, BackendInfo, Capabilities, Effect, Epoch, ErrorKind, Event, Fence, FlowSteering,
    FlowSteeringExt, Frame, PfIndex, PortRef, Ports, Result, VfAllocator,
};

use super::*;
use crate::memory::{MemoryCard, MemoryConfig, program};

const VF0: PortRef = PortRef::vf(0);

fn rule(cookie: u128) -> SteeringRule {
    let pattern = Pattern {
        ip_proto: Some(IpProtocol::TCP),
        l4_dst: Some((cookie as u16).into()),
        ..Pattern::default()
    };
    let actions = vec![Action::Count, Action::Punt];
    SteeringRule::new(Cookie(cookie), Owner::Agent, Priority(1), pattern, actions)
}

fn adds(cookies: impl IntoIterator<Item = u128>) -> Batch {
    Batch::new(
        cookies
            .into_iter()
            .map(|cookie| Operation::Add(rule(cookie)))
            .collect(),
    )
}

fn card() -> MemoryCard {
    MemoryCard::new(MemoryConfig {
        namespaces: vec!["/ns/a".into()],
        transport: Some(Arc::new(Loopback::default())),
        ..MemoryConfig::default()
    })
}

/// Calls of every part, good and bad; returns what came of each.
async fn script(backend: &dyn Backend) -> Vec<String> {
    let mut told = vec![
        format!("{:?}", backend.info()),
        format!("{:?} {:?}", backend.capabilities(), backend.epoch()),
    ];
    let mut events = backend.events();
    lease_script(backend, &mut told).await;
    steering_script(backend, &mut told).await;
    offload_script(backend, &mut told).await;
    ports_script(backend, &mut told).await;
    transport_script(backend, &mut told).await;
    told.push(format!("{:?}", events.next().await));
    told
}

async fn lease_script(backend: &dyn Backend, told: &mut Vec<String>) {
    let (vf, fence) = (backend.require_vf().expect("has leases"), backend.fence());
    let old = Fence(Epoch(0));
    told.push(format!("{:?}", vf.plan_vf_count(PfIndex(0), 3).await));
    told.push(format!("{:?}", vf.set_vf_count(fence, PfIndex(0), 3).await));
    told.push(format!("{:?}", vf.lease(old, &VfRequest::new("pod")).await));
    told.push(format!("{:?}", vf.lease(fence, &VfRequest::new("")).await));
    let lease = vf.lease(fence, &VfRequest::new("pod")).await.expect("free");
    told.push(format!("{lease:?}"));
    told.push(format!("{:?}", vf.admit(fence, &lease).await));
    let config = VfConfig {
        mac: Some(dpumesh_core::MacAddr([2, 0, 0, 0, 0, 1])),
        ..VfConfig::default()
    };
    told.push(format!("{:?}", vf.configure(fence, &lease, &config).await));
    let place = Attachment::Netns {
        path: "/ns/a".into(),
        ifname: "net1".to_owned(),
    };
    told.push(format!("{:?}", vf.attach(fence, &lease, &place).await));
    told.push(format!("{:?}", vf.list().await));
    told.push(format!("{:?}", vf.detach(fence, &lease).await));
    let second = vf.lease(fence, &VfRequest::new("second")).await.expect("free");
    told.push(format!(
        "{:?}",
        vf.release(fence, &second, ResetLevel::Config).await
    ));
    told.push(format!(
        "{:?}",
        vf.release(fence, &second, ResetLevel::Config).await
    ));
    told.push(format!(
        "{:?}",
        vf.reclaim(fence, second.port, &[], ResetLevel::Device).await
    ));
    told.push(format!("{:?}", vf.revoke(fence, &second).await));
}

async fn steering_script(backend: &dyn Backend, told: &mut Vec<String>) {
    let (steering, fence) = (backend.require_steering().expect("has rules"), backend.fence());
    let mut senseless = rule(9);
    senseless.actions.clear();
    told.push(format!(
        "{:?}",
        steering.validate(&[rule(1), senseless.clone()]).await
    ));
    let mut batch = adds([1, 2]);
    batch.operations.push(Operation::Add(senseless));
    for atomicity in [Atomicity::Rollback, Atomicity::Atomic, Atomicity::Continue] {
        let batch = batch.clone().with(atomicity);
        told.push(format!("{:?}", steering.apply(fence, &batch).await));
    }
    told.push(format!("{:?}", steering.apply(Fence(Epoch(9)), &batch).await));
    told.push(format!("{:?}", steering.list(Owner::Agent).await));
    told.push(format!(
        "{:?}",
        steering.counters(Owner::Agent, &[Cookie(1), Cookie(7)]).await
    ));
    told.push(format!(
        "{:?}",
        steering.set_miss_policy(fence, VF0, MissPolicy::Software).await
    ));
    told.push(format!("{:?}", steering.occupancy().await));
    told.push(format!("{:?}", steering.flush(fence, Owner::Agent).await));
}

async fn offload_script(backend: &dyn Backend, told: &mut Vec<String>) {
    let (np, fence) = (
        backend.require_offload().expect("has a processor"),
        backend.fence(),
    );
    let image = program("one", &[]);
    told.push(format!("{:?}", np.activate(fence, Slot(0)).await));
    told.push(format!("{:?}", np.load(fence, Slot(0), &image).await));
    told.push(format!("{:?}", np.load(fence, Slot(1), &image).await));
    told.push(format!("{:?}", np.activate(fence, Slot(0)).await));
    told.push(format!("{:?}", np.unload(fence, Slot(1)).await));
    told.push(format!("{:?}", np.programs().await));
    told.push(format!("{:?}", np.tables().await));
    told.push(format!("{:?}", np.write(fence, TableId(0), &[]).await));
    told.push(format!("{:?}", np.read(TableId(0)).await));
    let token = np.offload_connection(fence, &connection(1)).await;
    told.push(format!("{token:?}"));
    told.push(format!("{:?}", np.stats().await));
    told.push(format!("{:?}", np.resume(fence, token.expect("room")).await));
}

async fn ports_script(backend: &dyn Backend, told: &mut Vec<String>) {
    let (ports, fence) = (backend.require_ports().expect("has ports"), backend.fence());
    told.push(format!("{:?}", ports.list().await));
    told.push(format!(
        "{:?}",
        ports.open(fence, PortRef::vf(77)).await.map(drop)
    ));
    let mut port = ports.open(fence, VF0).await.expect("admitted");
    told.push(format!("{:?} {:?}", port.port(), port.limits()));
    told.push(format!("{:?}", port.receive(&mut [Frame::new()])));
    let mut frames = [Frame::copy_of(&[0; 60]), Frame::copy_of(&[0; 4000])];
    told.push(format!("{:?}", port.transmit(&mut frames)));
    told.push(format!("{} {}", port.refused(), port.poll_fd().is_some()));
}

async fn transport_script(backend: &dyn Backend, told: &mut Vec<String>) {
    let transport = backend.require_transport().expect("was given one");
    let name = ChannelName::try_from("proxy".to_owned()).expect("a name");
    let config = ChannelConfig::default();
    told.push(format!("{:?}", transport.connect(&name, &config).await.map(drop)));
    let mut listener = transport.listen(&name).await.expect("free");
    let mut near = transport.connect(&name, &config).await.expect("listening");
    let mut far = listener.accept().await.expect("connected");
    told.push(format!("{:?} {:?}", near.config(), near.peer()));
    told.push(format!("{:?}", near.send(&[b"one", b"two"])));
    let filled = near.send_with(4, &mut |writer| {
        writer.write(b"four");
    });
    told.push(format!("{filled:?}"));
    let mut buffer = [0; 8];
    for _ in 0..4 {
        let received = far.receive(&mut buffer);
        told.push(format!("{received:?} {buffer:?}"));
    }
    told.push(format!("{:?}", far.arm()));
    let _pollable = far.poll_fd();
}

fn connection(n: u16) -> Connection {
    let leg = |last| ConnectionLeg {
        port: VF0,
        local: ([10, 0, 0, last], n).into(),
        remote: ([10, 0, 1, last], n).into(),
        send_next: 0,
        receive_next: 0,
    };
    Connection {
        downstream: leg(1),
        upstream: leg(2),
        kind: ConnectionKind::Splice,
    }
}

type Wrapper = fn(Arc<dyn Backend>) -> Arc<dyn Backend>;

fn orders(wrappers: &[Wrapper]) -> Vec<Vec<Wrapper>> {
    let [] = wrappers else {
        return (0..wrappers.len())
            .flat_map(|first| {
                let mut rest = wrappers.to_vec();
                let head = rest.remove(first);
                orders(&rest).into_iter().map(move |mut order| {
                    order.push(head);
                    order
                })
            })
            .collect();
    };
    vec![Vec::new()]
}

fn stack(card: &MemoryCard, order: &[Wrapper]) -> Arc<dyn Backend> {
    order
        .iter()
        .fold(card.both() as Arc<dyn Backend>, |inner, wrap| wrap(inner))
}

#[tokio::test]
async fn wrappers_in_any_order_answer_as_the_backend_alone() {
    let alone = script(&*card().both()).await;
    let wrappers: [Wrapper; 4] = [
        |inner| Arc::new(Trace::new(inner)),
        |inner| Arc::new(Validate::new(inner)),
        |inner| Arc::new(Fault::new(inner, 1)),
        |inner| Arc::new(Limit::new(inner, Limits::default())),
    ];
    let orders = orders(&wrappers);
    assert_eq!(orders.len(), 24);
    for (number, order) in orders.iter().enumerate() {
        let wrapped = script(&*stack(&card(), order)).await;
        for (line, (wrapped, alone)) in wrapped.iter().zip(&alone).enumerate() {
            assert_eq!(wrapped, alone, "order {number}, answer {line}");
        }
        assert_eq!(wrapped.len(), alone.len());
    }
}

#[tokio::test]
async fn limits_and_faults_are_the_same_in_any_order() {
    let wrappers: [Wrapper; 4] = [
        |inner| Arc::new(Trace::new(inner)),
        |inner| Arc::new(Validate::new(inner)),
        |inner| {
            let fault = Fault::new(inner, 7);
            fault
                .add(
                    FaultRule::on("steering.flush")
                        .nth(1)
                        .fails(ErrorKind::Busy, Effect::None),
                )
                .expect("a method");
            Arc::new(fault)
        },
        |inner| {
            let limits = Limits {
                rules: Some(3),
                batch_max: Some(4),
                ..Limits::default()
            };
            Arc::new(Limit::new(inner, limits))
        },
    ];
    let mut first: Option<Vec<String>> = None;
    for order in orders(&wrappers) {
        let backend = stack(&card(), &order);
        let (steering, fence) = (backend.require_steering().expect("has rules"), backend.fence());
        let mut told = vec![format!("{:?}", backend.capabilities())];
        told.push(format!("{:?}", steering.apply(fence, &adds(1..=5)).await));
        told.push(format!("{:?}", steering.apply(fence, &adds(1..=4)).await));
        told.push(format!("{:?}", steering.flush(fence, Owner::Agent).await));
        told.push(format!("{:?}", steering.flush(fence, Owner::Agent).await));
        assert!(
            told[3].contains("Busy") && told[4].starts_with("Ok(3)"),
            "{told:?}"
        );
        assert_eq!(&told, first.get_or_insert_with(|| told.clone()));
    }
}

#[tokio::test]
async fn parts_that_a_half_lacks_stay_lacking() {
    let card = card();
    let wrappers: [Wrapper; 4] = [
        |inner| Arc::new(Trace::new(inner)),
        |inner| Arc::new(Validate::new(inner)),
        |inner| Arc::new(Fault::new(inner, 1)),
        |inner| Arc::new(Limit::new(inner, Limits::default())),
    ];
    for wrap in wrappers {
        let host = wrap(card.host());
        assert!(host.vf().is_some() && host.transport().is_some());
        assert!(host.steering().is_none() && host.offload().is_none() && host.ports().is_none());
    }
}

#[tokio::test(start_paused = true)]
async fn after_a_cancelled_batch_a_look_and_a_repetition_give_the_wanted_state() {
    for seed in 0..32 {
        let card = card();
        let backend = Fault::new(Arc::new(Validate::new(card.both())), seed);
        let steering = backend.require_steering().expect("has rules");
        let fence = backend.fence();
        steering.apply(fence, &adds(100..108)).await.expect("in order");
        backend
            .add(FaultRule::on("steering.apply").nth(1).stalls())
            .expect("a method");
        let wanted: Vec<SteeringRule> = (104..120).map(rule).collect();
        let replace = || steering.replace(fence, Owner::Agent, wanted.clone(), Atomicity::Continue);
        let cancelled = tokio::time::timeout(Duration::from_secs(1), replace()).await;
        assert!(cancelled.is_err(), "the deadline passed");
        assert_eq!(backend.injected(), 1);
        let left = steering.list(Owner::Agent).await.expect("present").len();
        assert!(
            (8..=20).contains(&left),
            "some prefix was carried out: {left} rules"
        );
        let outcome = replace().await.expect("no fault any more");
        assert!(
            outcome.results.iter().all(Result::is_ok),
            "repeating is safe: {outcome:?}"
        );
        let listed: Vec<SteeringRule> = steering
            .list(Owner::Agent)
            .await
            .expect("present")
            .into_iter()
            .map(|r| r.rule)
            .collect();
        assert_eq!(listed, wanted);
    }
}

#[tokio::test]
async fn a_rule_is_not_changed_under_its_cookie_by_a_batch_that_continues() {
    let card = card();
    let backend = Validate::new(card.both());
    let steering = backend.require_steering().expect("has rules");
    let fence = backend.fence();
    steering.apply(fence, &adds(1..3)).await.expect("in order");
    let before = steering.list(Owner::Agent).await.expect("present");
    let mut wanted: Vec<SteeringRule> = (1..4).map(rule).collect();
    wanted[1].actions = vec![Action::Drop];
    assert_ne!(wanted[1], rule(2));
    let refused = steering
        .replace(fence, Owner::Agent, wanted.clone(), Atomicity::Continue)
        .await
        .expect_err("it could leave the cookie without a rule");
    let place = refused.object.as_ref().expect("named");
    assert_eq!(
        (refused.kind, place.index, place.field.as_ref()),
        (ErrorKind::Invalid, Some(1), "cookie")
    );
    assert_eq!(
        steering.list(Owner::Agent).await.expect("present"),
        before,
        "untouched"
    );
    let outcome = steering
        .replace(fence, Owner::Agent, wanted, Atomicity::Rollback)
        .await;
    assert!(outcome.expect("offered").results.iter().all(Result::is_ok));
}

#[tokio::test]
async fn a_fault_says_what_took_effect() {
    for (effect, possible) in [
        (Effect::None, [0].as_slice()),
        (Effect::Applied, &[4]),
        (Effect::Partial, &[0, 1, 2, 3, 4]),
        (Effect::Unknown, &[0, 4]),
    ] {
        let mut seen = Vec::new();
        for seed in 0..64 {
            let backend = Fault::new(card().both(), seed);
            backend
                .add(FaultRule::on("steering.apply").fails(ErrorKind::Timeout, effect))
                .expect("a method");
            let steering = backend.require_steering().expect("has rules");
            let error = steering
                .apply(backend.fence(), &adds(1..=4))
                .await
                .expect_err("injected");
            assert_eq!((error.kind, error.effect), (ErrorKind::Timeout, effect));
            seen.push(steering.list(Owner::Agent).await.expect("present").len());
        }
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen, possible, "{effect:?}");
    }
}

#[tokio::test]
async fn an_all_or_nothing_batch_stays_so_under_a_partial_fault() {
    for seed in 0..16 {
        let backend = Fault::new(card().both(), seed);
        backend
            .add(FaultRule::on("steering.apply").fails(ErrorKind::Io, Effect::Partial))
            .expect("a method");
        let steering = backend.require_steering().expect("has rules");
        let batch = adds(1..=4).with(Atomicity::Atomic);
        let error = steering
            .apply(backend.fence(), &batch)
            .await
            .expect_err("injected");
        assert_eq!(error.effect, Effect::Unknown);
        let count = steering.list(Owner::Agent).await.expect("present").len();
        assert!(count == 0 || count == 4, "{count} rules of an atomic batch");
    }
}

#[tokio::test]
async fn the_same_seed_strikes_the_same_calls() {
    async fn pattern(seed: u64) -> Vec<bool> {
        let backend = Fault::new(card().both(), seed);
        backend
            .add(
                FaultRule::on("*")
                    .per_mille(300)
                    .fails(ErrorKind::Io, Effect::None),
            )
            .expect("a method");
        let vf = backend.require_vf().expect("has leases");
        let mut failed = Vec::new();
        for _ in 0..200 {
            failed.push(vf.list().await.is_err());
        }
        failed
    }
    let (one, again, other) = (pattern(5).await, pattern(5).await, pattern(6).await);
    assert_eq!(one, again);
    assert_ne!(one, other);
    let count = one.iter().filter(|failed| **failed).count();
    assert!((30..=90).contains(&count), "{count} of 200 at 300 per mille");
}

#[tokio::test(start_paused = true)]
async fn calls_are_delayed_the_card_is_reset_and_ports_fail() {
    let card = card();
    let resettable = card.clone();
    let backend = Fault::with_reset(card.both(), 1, move || resettable.reset());
    backend
        .add(FaultRule::on("vf.list").nth(2).delays(Duration::from_secs(5)))
        .expect("a method");
    let vf = backend.require_vf().expect("has leases");
    let begin = tokio::time::Instant::now();
    vf.list().await.expect("present");
    assert!(begin.elapsed() < Duration::from_secs(5));
    vf.list().await.expect("present");
    assert!(begin.elapsed() >= Duration::from_secs(5));
    let mut events = backend.events();
    let fence = backend.fence();
    let mut port = backend
        .require_ports()
        .expect("has ports")
        .open(fence, PortRef::Uplink(0))
        .await
        .expect("free");
    backend
        .add(
            FaultRule::on("ports.receive")
                .nth(1)
                .fails(ErrorKind::Io, Effect::None),
        )
        .expect("a method");
    assert_eq!(port.receive(&mut []).expect_err("injected").kind, ErrorKind::Io);
    assert_eq!(port.receive(&mut []), Ok(0));
    backend
        .add(FaultRule::on("steering.apply").nth(1).resets())
        .expect("a method");
    let steering = backend.require_steering().expect("has rules");
    let error = steering
        .apply(fence, &adds([1]))
        .await
        .expect_err("reset under its feet");
    assert_eq!(error.kind, ErrorKind::Stale);
    assert_eq!(events.next().await, Some(Event::Lost { epoch: fence.0 }));
    backend.clear();
    assert!(steering.apply(backend.fence(), &adds([1])).await.is_ok());
}

#[test]
fn faults_that_cannot_be_are_refused() {
    let backend = Fault::new(card().both(), 1);
    let wrong = [
        FaultRule::on("steering.aply").stalls(),
        FaultRule::on("vf.list").resets(),
        FaultRule::on("ports.receive").stalls(),
        FaultRule::on("transport.send").fails(ErrorKind::Io, Effect::Applied),
    ];
    for rule in wrong {
        assert!(backend.add(rule.clone()).is_err(), "{rule:?}");
    }
}

fn limited(limits: Limits) -> Limit {
    Limit::new(card().both(), limits)
}

#[tokio::test]
async fn tighter_limits_are_claimed_reported_and_enforced() {
    let backend = limited(Limits {
        rules: Some(3),
        batch_max: Some(5),
        atomicity: Some([Atomicity::Rollback].into()),
        connections: Some(1),
    });
    let claimed = backend.capabilities();
    assert_eq!((claimed.steering.rules, claimed.steering.hardware_rules), (3, 3));
    let offered = [Atomicity::Continue, Atomicity::Rollback];
    assert_eq!(claimed.steering.atomicity, offered.into());
    let (steering, fence) = (backend.require_steering().expect("has rules"), backend.fence());
    let long = steering.apply(fence, &adds(1..=6)).await.expect_err("5 at most");
    assert_eq!(long.kind, ErrorKind::CapacityExceeded);
    let atomic = steering.apply(fence, &adds([1]).with(Atomicity::Atomic)).await;
    assert_eq!(atomic.expect_err("withheld").kind, ErrorKind::Unsupported);
    let outcome = steering.apply(fence, &adds(1..=5)).await.expect("in order");
    let kinds: Vec<_> = outcome
        .results
        .iter()
        .map(|r| r.as_ref().err().map(|e| e.kind))
        .collect();
    let full = Some(ErrorKind::CapacityExceeded);
    assert_eq!(kinds, [None, None, None, full, full]);
    let error = outcome.results[4].as_ref().expect_err("full");
    assert_eq!(error.message, "steering.rules is full: 3 of 3");
    let again = steering.apply(fence, &adds(1..=4)).await.expect("in order");
    assert_eq!(
        again.results[0],
        Ok(Change::Present(Placement::Hardware)),
        "what is there needs no room"
    );
    let removal = Operation::Remove {
        owner: Owner::Agent,
        cookie: Cookie(1),
    };
    let swap = |operations: Vec<Operation>| Batch::new(operations).with(Atomicity::Rollback);
    let too_early = swap(vec![Operation::Add(rule(9)), removal.clone()]);
    let refused = steering.apply(fence, &too_early).await.expect("in order");
    assert_eq!(
        (&refused.undone, refused.results[0].is_err()),
        (&Undone::All, true)
    );
    let fits = swap(vec![removal, Operation::Add(rule(9))]);
    let done = steering.apply(fence, &fits).await.expect("in order");
    assert!(done.results.iter().all(Result::is_ok), "{done:?}");
    let stale = steering.apply(Fence(Epoch(0)), &adds([20])).await;
    assert_eq!(
        stale.expect_err("old").kind,
        ErrorKind::Stale,
        "although nothing fits"
    );
    let occupancy = steering.occupancy().await.expect("present");
    let rules = occupancy
        .iter()
        .find(|o| o.resource == "steering.rules")
        .expect("reported");
    assert_eq!((rules.used, rules.limit), (3, 3));
    let np = backend.require_offload().expect("has a processor");
    np.offload_connection(fence, &connection(1))
        .await
        .expect("room for one");
    let second = np
        .offload_connection(fence, &connection(2))
        .await
        .expect_err("one at most");
    assert_eq!(
        second.object.as_ref().map(|o| o.name.as_str()),
        Some("offload.connections")
    );
}

/// A backend that breaks one sentence of the contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lie {
    FewResults,
    FewVerdicts,
    TakesStaleFence,
    TakesNonsense,
    JudgesNonsensePossible,
    UndoesNothing,
    WrongOrder,
    RefusalWithEffect,
    NamelessShortage,
    WrongPlacement,
}

#[derive(Debug)]
struct Liar {
    card: Arc<dyn Backend>,
    lie: Lie,
}

impl Backend for Liar {
    fn info(&self) -> BackendInfo {
        self.card.info()
    }
    fn capabilities(&self) -> Capabilities {
        self.card.capabilities()
    }
    fn epoch(&self) -> Epoch {
        self.card.epoch()
    }
    fn vf(&self) -> Option<&dyn VfAllocator> {
        self.card.vf()
    }
    fn steering(&self) -> Option<&dyn FlowSteering> {
        Some(self)
    }
    fn offload(&self) -> Option<&dyn NpOffload> {
        self.card.offload()
    }
    fn transport(&self) -> Option<&dyn ShmTransport> {
        self.card.transport()
    }
    fn ports(&self) -> Option<&dyn Ports> {
        self.card.ports()
    }
    fn events(&self) -> Box<dyn EventStream> {
        self.card.events()
    }
}

fn refusal(kind: ErrorKind, effect: Effect) -> dpumesh_core::Error {
    dpumesh_core::Error::new(kind, "steering.apply", "a lie").effect(effect)
}

#[async_trait]
impl FlowSteering for Liar {
    async fn validate(&self, rules: &[SteeringRule]) -> Result<Vec<Verdict>> {
        let mut verdicts = self.card.require_steering()?.validate(rules).await?;
        match self.lie {
            Lie::FewVerdicts => verdicts.clear(),
            Lie::JudgesNonsensePossible => verdicts.fill(Verdict::Hardware),
            _ => {}
        }
        Ok(verdicts)
    }

    async fn apply(&self, fence: Fence, batch: &Batch) -> Result<BatchOutcome> {
        let steering = self.card.require_steering()?;
        let mut outcome = match self.lie {
            Lie::TakesStaleFence => steering.apply(Fence(self.card.epoch()), batch).await?,
            Lie::RefusalWithEffect => return Err(refusal(ErrorKind::Stale, Effect::Partial)),
            _ => steering.apply(fence, batch).await?,
        };
        match self.lie {
            Lie::FewResults => outcome.results.truncate(1),
            Lie::TakesNonsense => outcome.results.fill(Ok(Change::Added(Placement::Hardware))),
            Lie::UndoesNothing => outcome.undone = Undone::No,
            Lie::NamelessShortage => {
                outcome.results[0] = Err(refusal(ErrorKind::CapacityExceeded, Effect::None))
            }
            Lie::WrongPlacement => {
                outcome
                    .results
                    .fill(Ok(Change::Added(Placement::Software("because".to_owned()))));
            }
            _ => {}
        }
        Ok(outcome)
    }

    async fn list(&self, owner: Owner) -> Result<Vec<InstalledRule>> {
        let mut rules = self.card.require_steering()?.list(owner).await?;
        if self.lie == Lie::WrongOrder {
            rules.reverse();
        }
        Ok(rules)
    }

    async fn counters(&self, owner: Owner, cookies: &[Cookie]) -> Result<Vec<Option<Counters>>> {
        self.card.require_steering()?.counters(owner, cookies).await
    }

    async fn flush(&self, fence: Fence, owner: Owner) -> Result<u64> {
        self.card.require_steering()?.flush(fence, owner).await
    }

    async fn set_miss_policy(&self, fence: Fence, port: PortRef, policy: MissPolicy) -> Result<()> {
        self.card
            .require_steering()?
            .set_miss_policy(fence, port, policy)
            .await
    }

    async fn occupancy(&self) -> Result<Vec<Occupancy>> {
        self.card.require_steering()?.occupancy().await
    }
}

/// Asks so that the lie is told; returns what the caller learns.
async fn ask(backend: &dyn Backend, lie: Lie) -> dpumesh_core::Error {
    let steering = backend.require_steering().expect("has rules");
    let fence = backend.fence();
    let mut nonsense = rule(1);
    nonsense.actions.clear();
    let nonsense = Batch::new(vec![Operation::Add(nonsense)]);
    let mut hard = rule(1);
    hard.placement = dpumesh_core::steering::PlacementRequest::Hardware;
    let hard = Batch::new(vec![Operation::Add(hard)]);
    let first = |outcome: BatchOutcome| outcome.into_result().expect_err("a lie");
    match lie {
        Lie::FewVerdicts => steering.validate(&[rule(1)]).await.expect_err("a lie"),
        Lie::JudgesNonsensePossible => {
            let Operation::Add(rule) = &nonsense.operations[0] else {
                unreachable!("an addition was put there");
            };
            let rules = std::slice::from_ref(rule);
            steering.validate(rules).await.expect_err("a lie")
        }
        Lie::WrongOrder => {
            steering.apply(fence, &adds(1..=3)).await.expect("in order");
            steering.list(Owner::Agent).await.expect_err("a lie")
        }
        Lie::FewResults | Lie::RefusalWithEffect => {
            steering.apply(fence, &adds(1..=3)).await.expect_err("a lie")
        }
        Lie::TakesStaleFence => steering
            .apply(Fence(Epoch(0)), &adds([1]))
            .await
            .expect_err("a lie"),
        Lie::UndoesNothing => {
            let batch = nonsense.with(Atomicity::Atomic);
            steering.apply(fence, &batch).await.expect_err("a lie")
        }
        Lie::TakesNonsense => first(steering.apply(fence, &nonsense).await.expect("as a whole")),
        Lie::NamelessShortage => first(steering.apply(fence, &adds([1])).await.expect("as a whole")),
        Lie::WrongPlacement => first(steering.apply(fence, &hard).await.expect("as a whole")),
    }
}

#[tokio::test]
async fn what_breaks_the_contract_becomes_a_fault() {
    for lie in [
        Lie::FewResults,
        Lie::FewVerdicts,
        Lie::TakesStaleFence,
        Lie::TakesNonsense,
        Lie::JudgesNonsensePossible,
        Lie::UndoesNothing,
        Lie::WrongOrder,
        Lie::RefusalWithEffect,
        Lie::NamelessShortage,
        Lie::WrongPlacement,
    ] {
        let liar = Liar {
            card: card().both(),
            lie,
        };
        let backend = Validate::new(Arc::new(liar));
        let error = ask(&backend, lie).await;
        assert_eq!(error.kind, ErrorKind::Fault, "{lie:?}: {error}");
    }
}

/// Keeps the messages and methods of events.
#[derive(Clone, Default)]
struct Journal(Arc<Mutex<Vec<String>>>);

struct Line(String);

impl tracing::field::Visit for Line {
    fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
        if matches!(field.name(), "message" | "method" | "kind" | "effect") {
            self.0.push_str(&format!("{value:?} "));
        }
    }
}

impl tracing::Subscriber for Journal {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        metadata.target().starts_with("dpumesh_hw::wrap")
    }
    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn event(&self, event: &tracing::Event<'_>) {
        let mut line = Line(String::new());
        event.record(&mut line);
        self.0.lock().expect("no panic").push(line.0);
    }
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}

#[tokio::test(start_paused = true)]
async fn a_trace_tells_each_outcome_and_each_dropped_call() {
    let journal = Journal::default();
    let _guard = tracing::subscriber::set_default(journal.clone());
    let fault = Fault::new(card().both(), 1);
    fault
        .add(
            FaultRule::on("vf.list")
                .nth(2)
                .fails(ErrorKind::Io, Effect::Unknown),
        )
        .expect("a method");
    fault
        .add(FaultRule::on("vf.list").nth(3).stalls())
        .expect("a method");
    let backend = Trace::new(Arc::new(fault));
    let vf = backend.require_vf().expect("has leases");
    vf.list().await.expect("present");
    vf.list().await.expect_err("injected");
    let deadline = tokio::time::timeout(Duration::from_secs(1), vf.list()).await;
    assert!(deadline.is_err());
    let lines = journal.0.lock().expect("no panic").clone();
    let text = |part: &str| lines.iter().filter(|line| line.contains(part)).count();
    assert_eq!(
        (text("done"), text("failed"), text("dropped before its end")),
        (1, 1, 1),
        "{lines:?}"
    );
    assert!(
        lines[1].contains("Io") && lines[1].contains("Unknown") && lines[1].contains("vf.list"),
        "{lines:?}"
    );
}

/// The least transport there is: queues in this process.
#[derive(Debug, Default)]
struct Loopback {
    waiting: Arc<Mutex<Option<VecDeque<End>>>>,
}

#[derive(Debug)]
struct End {
    inbox: Arc<Mutex<VecDeque<Vec<u8>>>>,
    outbox: Arc<Mutex<VecDeque<Vec<u8>>>>,
    bell: UnixStream,
}

#[derive(Debug)]
struct LoopbackListener(Arc<Mutex<Option<VecDeque<End>>>>);

#[async_trait]
impl ShmTransport for Loopback {
    async fn listen(&self, _: &ChannelName) -> Result<Box<dyn ShmListener>> {
        *self.waiting.lock().expect("no panic") = Some(VecDeque::new());
        Ok(Box::new(LoopbackListener(Arc::clone(&self.waiting))))
    }

    async fn connect(&self, _: &ChannelName, _: &ChannelConfig) -> Result<Box<dyn ShmChannel>> {
        let mut waiting = self.waiting.lock().expect("no panic");
        let Some(waiting) = waiting.as_mut() else {
            let message = "nobody listens";
            return Err(dpumesh_core::Error::new(
                ErrorKind::NotFound,
                "transport.connect",
                message,
            ));
        };
        let (there, here) = UnixStream::pair().expect("sockets");
        let (up, down) = (Arc::<Mutex<_>>::default(), Arc::<Mutex<_>>::default());
        waiting.push_back(End {
            inbox: Arc::clone(&up),
            outbox: Arc::clone(&down),
            bell: there,
        });
        Ok(Box::new(End {
            inbox: down,
            outbox: up,
            bell: here,
        }))
    }
}

#[async_trait]
impl ShmListener for LoopbackListener {
    async fn accept(&mut self) -> Result<Box<dyn ShmChannel>> {
        let end = self
            .0
            .lock()
            .expect("no panic")
            .as_mut()
            .and_then(VecDeque::pop_front);
        end.map(|end| Box::new(end) as _)
            .ok_or_else(|| dpumesh_core::Error::new(ErrorKind::Io, "transport.accept", "nobody connected"))
    }
}

struct Filler(Vec<u8>, usize);

impl SharedWriter for Filler {
    fn write(&mut self, octets: &[u8]) -> usize {
        let count = octets.len().min(self.remaining());
        self.0.extend(&octets[..count]);
        count
    }

    fn remaining(&self) -> usize {
        self.1 - self.0.len()
    }
}

impl ShmChannel for End {
    fn config(&self) -> ChannelConfig {
        ChannelConfig::default()
    }

    fn send(&mut self, slices: &[&[u8]]) -> Result<usize> {
        let messages = slices.iter().map(|slice| slice.to_vec());
        self.outbox.lock().expect("no panic").extend(messages);
        Ok(slices.len())
    }

    fn send_with(&mut self, len: usize, fill: &mut dyn FnMut(&mut dyn SharedWriter)) -> Result<bool> {
        let mut filler = Filler(Vec::new(), len);
        fill(&mut filler);
        self.outbox.lock().expect("no panic").push_back(filler.0);
        Ok(true)
    }

    fn receive(&mut self, buffer: &mut [u8]) -> Result<Option<usize>> {
        let message = self.inbox.lock().expect("no panic").pop_front();
        Ok(message.map(|message| {
            buffer[..message.len()].copy_from_slice(&message);
            message.len()
        }))
    }

    fn arm(&mut self) -> Result<bool> {
        Ok(self.inbox.lock().expect("no panic").is_empty())
    }

    fn poll_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    fn peer(&self) -> PeerState {
        PeerState {
            alive: true,
            in_flight: 0,
        }
    }
}
