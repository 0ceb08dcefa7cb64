//! The offload path of any card, so that cards can be compared: validate, insert, delete, batches, counters.
//!
//! Measured are the cards of `dpumesh-conform` named in `DPUMESH_CARDS` (by default the one in memory, a fake one with tc flower, a simulated
//! network processor; `dpumesh-conform --help` lists them all), and the library of the manifest that `DPUMESH_MANIFEST` names. A
//! card that is fake or simulated costs what the backend costs; what the hardware takes, only hardware tells.

use std::hint::black_box;
use std::net::IpAddr;
use std::sync::Arc;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use dpumesh_conform::fixtures::VARIANTS;
use dpumesh_core::steering::{
    Action, Batch, Cookie, Operation, Owner, Pattern, Priority, SteeringRule, Verdict,
};
use dpumesh_core::{Backend, BackendExt, FlowSteeringExt, PortRef};
use dpumesh_hw::conformance::Rig;
use dpumesh_hw::loader::{Library, Manifest};
use tokio::runtime::Runtime;

/// Rules of a batch, where the card's table holds so many.
const RULES: u32 = 256;

/// A card and what keeps it there.
struct Card {
    name: String,
    backend: Arc<dyn Backend>,
    _rig: Option<Box<dyn Rig>>,
}

fn cards(runtime: &Runtime) -> Vec<Card> {
    let names = std::env::var("DPUMESH_CARDS");
    let names = names.as_deref().unwrap_or("memory,mlx5-switchdev,yusur");
    let mut cards: Vec<Card> = names
        .split(',')
        .filter(|name| !name.is_empty())
        .map(|name| {
            let variant = VARIANTS.iter().find(|variant| variant.name == name);
            let variant =
                variant.unwrap_or_else(|| panic!("DPUMESH_CARDS: {name:?} is no card of dpumesh-conform"));
            let fixture = variant.fixture().unwrap_or_else(|none| panic!("{name}: {none}"));
            let rig = runtime
                .block_on(fixture.open())
                .unwrap_or_else(|error| panic!("{name}: {error}"));
            Card {
                name: name.to_owned(),
                backend: rig.soc(),
                _rig: Some(rig),
            }
        })
        .collect();
    if let Some(path) = std::env::var_os("DPUMESH_MANIFEST") {
        let manifest = Manifest::read(&path).unwrap_or_else(|error| panic!("DPUMESH_MANIFEST: {error}"));
        let backend = Library::open(&manifest).unwrap_or_else(|error| panic!("DPUMESH_MANIFEST: {error}"));
        cards.push(Card {
            name: backend.info().name.clone(),
            backend,
            _rig: None,
        });
    }
    cards
}

/// What becomes of what one VF sends to one address.
fn rule(i: u32, action: &Action, counts: bool) -> SteeringRule {
    let pattern = Pattern {
        port: Some(PortRef::vf(0)),
        ip_dst: Some(IpAddr::from([10, 1, (i >> 8) as u8, i as u8]).into()),
        ..Pattern::default()
    };
    let actions = if counts {
        vec![Action::Count, action.clone()]
    } else {
        vec![action.clone()]
    };
    SteeringRule::new(Cookie(i.into()), Owner::Agent, Priority(0), pattern, actions)
}

fn removal(i: u32) -> Operation {
    Operation::Remove {
        owner: Owner::Agent,
        cookie: Cookie(i.into()),
    }
}

fn offload_path(c: &mut Criterion) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    for card in cards(&runtime) {
        measure(c, &runtime, &card);
    }
}

fn measure(c: &mut Criterion, runtime: &Runtime, card: &Card) {
    let backend = &*card.backend;
    let steering = backend.require_steering().expect("the card steers");
    let limits = &backend.capabilities().steering;
    let most = limits.rules.min(limits.batch_max.into());
    let rules = RULES.min(u32::try_from(most).unwrap_or(RULES));
    let counters = rules.min(u32::try_from(limits.counters).unwrap_or(RULES));
    let apply = |batch: &Batch| {
        let outcome = runtime.block_on(steering.apply(backend.fence(), batch));
        black_box(outcome.expect("carried out").into_result().expect("each is done"));
    };
    let flush = || {
        let flushed = steering.flush(backend.fence(), Owner::Agent);
        runtime.block_on(flushed).expect("flushed");
    };
    // To the proxy, where the card can.
    let judge = |action: &Action| runtime.block_on(steering.validate(&[rule(0, action, false)]));
    let takes = |action: &Action| !matches!(judge(action).expect("judged")[..], [Verdict::No { .. }]);
    let action = [Action::Punt, Action::Drop].into_iter().find(takes);
    let action = &action.expect("the card hands up or drops");
    let all: Vec<SteeringRule> = (0..rules).map(|i| rule(i, action, false)).collect();
    let add = Batch::new(all.iter().cloned().map(Operation::Add).collect());
    let remove = Batch::new((0..rules).map(removal).collect());
    let mut group = c.benchmark_group("offload");
    let id = |what: &str| BenchmarkId::new(what, &card.name);

    group.throughput(Throughput::Elements(rules.into()));
    group.bench_function(id("validate a batch"), |b| {
        b.iter(|| {
            runtime
                .block_on(steering.validate(black_box(&all)))
                .expect("judged")
        });
    });
    group.bench_function(id("insert a batch"), |b| {
        b.iter_batched(flush, |()| apply(&add), BatchSize::PerIteration);
    });
    group.bench_function(id("delete a batch"), |b| {
        let filled = || {
            flush();
            apply(&add);
        };
        b.iter_batched(filled, |()| apply(&remove), BatchSize::PerIteration);
    });
    flush();
    group.throughput(Throughput::Elements(1));
    group.bench_function(id("insert and delete one"), |b| {
        let insert_and_delete = |rule| {
            let fence = backend.fence();
            runtime.block_on(async {
                steering.add(fence, rule).await.expect("added");
                let removed = steering.remove(fence, Owner::Agent, Cookie(1));
                removed.await.expect("removed");
            });
        };
        b.iter_batched(
            || rule(1, action, false),
            insert_and_delete,
            BatchSize::SmallInput,
        );
    });
    if counters > 0 {
        apply(&Batch::new(
            (0..counters)
                .map(|i| Operation::Add(rule(i, action, true)))
                .collect(),
        ));
        let cookies: Vec<Cookie> = (0..counters).map(|i| Cookie(i.into())).collect();
        group.throughput(Throughput::Elements(counters.into()));
        group.bench_function(id("read counters"), |b| {
            let read = || runtime.block_on(steering.counters(Owner::Agent, black_box(&cookies)));
            b.iter(|| read().expect("read"));
        });
        flush();
    }
    group.finish();
}

criterion_group!(benches, offload_path);
criterion_main!(benches);
