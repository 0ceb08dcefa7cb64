//! The offload path of the Yusur backend: validate, insert, delete, batch, counters, and replay after a reset.
//!
//! By default it runs on the simulator over a card in memory, so it measures the backend. With `DPUMESH_YUSUR_LIBRARY` and
//! `DPUMESH_YUSUR_PCI` it runs on that card (without a floor), and figures of cards can be compared; a reset is left out.
//! On the simulator a replay of 10,000 rules that takes more than a second fails the bench, also with `-- --test`.

use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use dpumesh_core::steering::{Action, Batch, Cookie, Operation, Owner, Pattern, Priority, SteeringRule};
use dpumesh_core::{Backend, BackendExt, Event, FlowSteeringExt, Role};
use dpumesh_hw::memory::{MemoryConfig, capabilities};
use dpumesh_yusur::{Options, YusurBackend};
use dpumesh_yusur_simulator::fixture::{TestCard, YusurFixture};
use tokio::runtime::Runtime;

/// Rules on the card when it is reset, and how long they may take to be there again on the simulator.
const REPLAYED: u32 = 10_000;
const REPLAY: Duration = Duration::from_secs(1);

/// A card and what keeps it there.
struct Bench {
    card: Arc<YusurBackend>,
    runtime: Runtime,
    simulated: Option<TestCard>,
}

impl Bench {
    fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        if let Some(library) = std::env::var_os("DPUMESH_YUSUR_LIBRARY") {
            let pci = std::env::var("DPUMESH_YUSUR_PCI").expect("DPUMESH_YUSUR_PCI names the card");
            let mut options = Options::new("dpu0", None);
            options.role = Role::Soc;
            options.library = Some(library.into());
            options.pci = Some(pci.parse().expect("a PCI address"));
            let card = Arc::new(YusurBackend::open(options).expect("the card opens"));
            return Self {
                card,
                runtime,
                simulated: None,
            };
        }
        let mut floor = capabilities();
        floor.steering.rules = 20_000;
        let mut config = MemoryConfig::default();
        config.capabilities = floor;
        let profile = "entries=16384,batch_max=1024";
        let test = YusurFixture::new("bench", profile)
            .on_floor(config)
            .card()
            .expect("a card");
        let card = test.open().expect("it opens");
        Self {
            card,
            runtime,
            simulated: Some(test),
        }
    }

    fn flush(&self) {
        let steering = self.card.require_steering().expect("steering");
        self.runtime
            .block_on(steering.flush(self.card.fence(), Owner::Agent))
            .expect("flushed");
    }

    fn apply(&self, batch: &Batch) {
        let steering = self.card.require_steering().expect("steering");
        let outcome = self
            .runtime
            .block_on(steering.apply(self.card.fence(), batch))
            .expect("carried out");
        black_box(outcome.into_result().expect("each is done"));
    }

    fn fill(&self, rules: u32) {
        for from in (0..rules).step_by(1000) {
            self.apply(&additions(from..rules.min(from + 1000)));
        }
    }
}

fn rule(i: u32, counts: bool) -> SteeringRule {
    let address = IpAddr::V4(Ipv4Addr::from(0x0a00_0000 + i));
    let pattern = Pattern {
        ip_dst: Some(address.into()),
        ..Pattern::default()
    };
    let mut actions = vec![Action::Punt];
    if counts {
        actions.insert(0, Action::Count);
    }
    SteeringRule::new(Cookie(i.into()), Owner::Agent, Priority(0), pattern, actions)
}

fn additions(range: std::ops::Range<u32>) -> Batch {
    Batch::new(range.map(|i| Operation::Add(rule(i, false))).collect())
}

fn removals(range: std::ops::Range<u32>) -> Batch {
    let remove = |i: u32| Operation::Remove {
        owner: Owner::Agent,
        cookie: Cookie(i.into()),
    };
    Batch::new(range.map(remove).collect())
}

fn offload_path(c: &mut Criterion) {
    let bench = Bench::new();
    let steering = bench.card.require_steering().expect("steering");
    let mut group = c.benchmark_group("yusur");

    let rules: Vec<SteeringRule> = (0..1000).map(|i| rule(i, false)).collect();
    group.throughput(Throughput::Elements(1000));
    group.bench_function("validate 1,000", |b| {
        b.iter(|| {
            bench
                .runtime
                .block_on(steering.validate(black_box(&rules)))
                .expect("judged")
        });
    });
    // What is built for the call is built before it is measured.
    let (add, remove) = (additions(0..1000), removals(0..1000));
    group.bench_function("insert a batch of 1,000", |b| {
        b.iter_batched(|| bench.flush(), |()| bench.apply(&add), BatchSize::PerIteration);
    });
    group.bench_function("delete a batch of 1,000", |b| {
        let filled = || {
            bench.flush();
            bench.apply(&add);
        };
        b.iter_batched(filled, |()| bench.apply(&remove), BatchSize::PerIteration);
    });

    bench.flush();
    group.throughput(Throughput::Elements(1));
    group.bench_function("insert and delete one", |b| {
        let insert_and_delete = |rule| {
            let fence = bench.card.fence();
            bench.runtime.block_on(async {
                steering.add(fence, rule).await.expect("added");
                steering
                    .remove(fence, Owner::Agent, Cookie(1))
                    .await
                    .expect("removed");
            });
        };
        b.iter_batched(|| rule(1, false), insert_and_delete, BatchSize::SmallInput);
    });

    let counting = Batch::new((0..200).map(|i| Operation::Add(rule(i, true))).collect());
    bench.apply(&counting);
    let cookies: Vec<Cookie> = (0..200).map(Cookie).collect();
    group.throughput(Throughput::Elements(200));
    group.bench_function("read 200 counters", |b| {
        b.iter(|| {
            bench
                .runtime
                .block_on(steering.counters(Owner::Agent, black_box(&cookies)))
                .expect("read")
        });
    });
    bench.flush();

    if bench.simulated.is_some() {
        bench.fill(REPLAYED);
        let best = (0..3).map(|_| reset(&bench)).min().expect("three resets");
        println!(
            "replay of {REPLAYED} rules after a reset: {best:?}, the best of three; the bar is {REPLAY:?}"
        );
        assert!(best <= REPLAY, "{best:?} is more than {REPLAY:?}");
        group.throughput(Throughput::Elements(REPLAYED.into()));
        group.sample_size(10);
        group.bench_function("replay 10,000 after a reset", |b| {
            b.iter_custom(|times| (0..times).map(|_| reset(&bench)).sum());
        });
        bench.flush();
    }
    group.finish();
}

/// From the processor's return until the card is back with its rules.
fn reset(bench: &Bench) -> Duration {
    bench.runtime.block_on(async {
        let mut events = bench.card.events();
        bench.card.diagnose("lose").await.expect("told");
        let begun = Instant::now();
        bench.card.diagnose("restore").await.expect("told");
        while !matches!(events.next().await, Some(Event::Back { .. }) | None) {}
        begun.elapsed()
    })
}

criterion_group!(benches, offload_path);
criterion_main!(benches);
