//! What the C interface costs over a direct call of the same backend: one cheap call, one control call, and batches of
//! 1,000 rules, as `native`, `inline` (calls on the caller's thread) and `guarded` (by a thread of the library's own, with a
//! deadline). Ratios are printed before criterion's figures; nothing is pinned, so compare figures of one run only.

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use dpumesh_core::steering::{
    Action, Batch, Cookie, IpMatch, IpProtocol, Operation, Owner, Pattern, Priority, SteeringRule,
};
use dpumesh_core::{Backend, BackendExt, PortRef};
use dpumesh_hw::loader::{Calls, export};
use dpumesh_hw::memory::MemoryCard;
use tokio::runtime::{Builder, Runtime};

const RULES: u32 = 1000;

fn runtime() -> Runtime {
    Builder::new_current_thread()
        .enable_time()
        .build()
        .expect("a runtime")
}

fn backends() -> [(&'static str, Arc<dyn Backend>); 3] {
    let through = |calls| export::through(MemoryCard::default().both(), calls).expect("a backend");
    [
        ("native", MemoryCard::default().both()),
        ("inline", through(Calls::Inline)),
        ("guarded", through(Calls::Guarded)),
    ]
}

/// A rule as the node agent makes them: what one pod sends to one address is counted and goes to the proxy.
fn rule(i: u32) -> SteeringRule {
    let pattern = Pattern {
        port: Some(PortRef::vf((i % 4) as u16)),
        ip_proto: Some(IpProtocol::TCP),
        ip_dst: Some(IpMatch::from(std::net::IpAddr::from([
            10,
            1,
            (i >> 8) as u8,
            i as u8,
        ]))),
        ..Pattern::default()
    };
    let actions = vec![Action::Count, Action::Punt];
    SteeringRule::new(Cookie(i.into()), Owner::Agent, Priority(10), pattern, actions)
}

fn batches() -> (Batch, Batch) {
    let add = (0..RULES).map(|i| Operation::Add(rule(i))).collect();
    let remove = (0..RULES).map(|i| Operation::Remove {
        owner: Owner::Agent,
        cookie: Cookie(i.into()),
    });
    (Batch::new(add), Batch::new(remove.collect()))
}

/// Adds and removes all rules, so that each round begins with an empty table.
async fn round(backend: &dyn Backend, add: &Batch, remove: &Batch) {
    let steering = backend.require_steering().expect("it steers");
    for batch in [add, remove] {
        let outcome = steering.apply(backend.fence(), batch).await.expect("carried out");
        black_box(outcome.into_result().expect("each of them"));
    }
}

/// Each backend's best of some runs, which take turns: what disturbs a run only ever adds, and disturbs all alike.
fn best<const N: usize>(
    backends: &[(&'static str, Arc<dyn Backend>); N],
    mut run: impl FnMut(&dyn Backend),
) -> [Duration; N] {
    let mut best = [Duration::MAX; N];
    for _ in 0..100 {
        for (best, (_, backend)) in best.iter_mut().zip(backends) {
            let begun = Instant::now();
            run(&**backend);
            *best = begun.elapsed().min(*best);
        }
    }
    best
}

fn ratios() {
    const CALLS: u32 = 100_000;
    let runtime = runtime();
    let (add, remove) = batches();
    let backends = backends();
    let cheap = best(&backends, |backend| {
        (0..CALLS).for_each(|_| _ = black_box(backend.epoch()))
    });
    let cheap = cheap.map(|all| all / CALLS);
    let batch = best(&backends, |backend| {
        runtime.block_on(round(backend, &add, &remove))
    });
    let batch = batch.map(|all| all / (2 * RULES));
    for (i, (name, _)) in backends.iter().enumerate() {
        println!(
            "{name:8} epoch {:4} ns (+{} ns)   rule of a batch {:6} ns ({:.2} x native)",
            cheap[i].as_nanos(),
            cheap[i].saturating_sub(cheap[0]).as_nanos(),
            batch[i].as_nanos(),
            batch[i].as_secs_f64() / batch[0].as_secs_f64(),
        );
    }
}

fn calls(criterion: &mut Criterion) {
    ratios();
    let runtime = runtime();
    let (add, remove) = batches();
    let one = [rule(1)];
    for (name, backend) in backends() {
        let mut group = criterion.benchmark_group("loader");
        group.bench_function(BenchmarkId::new("epoch", name), |bench| {
            bench.iter(|| black_box(&backend).epoch());
        });
        group.bench_function(BenchmarkId::new("validate_one", name), |bench| {
            let steering = backend.require_steering().expect("it steers");
            bench.iter(|| runtime.block_on(steering.validate(&one)));
        });
        group.throughput(Throughput::Elements(u64::from(2 * RULES)));
        group.bench_function(BenchmarkId::new("batch_1000", name), |bench| {
            bench.iter(|| runtime.block_on(round(&*backend, &add, &remove)));
        });
        group.finish();
    }
}

criterion_group!(benches, calls);
criterion_main!(benches);
