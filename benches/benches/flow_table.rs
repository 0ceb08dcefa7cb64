//! The flow engine's tables against the project's bars, each ratio measured in one run.
//!
//! One thread, pin it from outside (`taskset -c 1`) for steady figures. Criterion samples every part; at the end a
//! summary measures flow table and `std::collections::HashMap` in turns over the same flows and the same queries, so
//! that a noisy neighbour hits both, and prints medians next to their bars.
//!
//! `cargo bench -p dpumesh-benches --bench flow_table -- --quick` takes about a minute. Huge pages for the tables:
//! `GLIBC_TUNABLES=glibc.malloc.hugetlb=1` (where transparent huge pages are on or by request).

#![forbid(unsafe_code)]
#![allow(missing_docs)] // criterion's macros make public items

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use dpumesh_hw::flow::*;
use std::collections::HashMap;
use std::hint::black_box;
use std::time::Instant;

const FLOWS: usize = 1_000_000;
const BATCH: usize = 32;
/// Queries drawn at a time, fresh ones for every measurement: about as many as there are flows, so that the caches are
/// in their steady state. They are read in order, which costs a few nanoseconds each on both sides.
const QUERIES: usize = 1 << 20;
const ROUNDS: usize = 7;

/// What the engine keeps per flow, 24 octets: rule and last tick, packets, octets.
type Value = [u64; 3];

/// A xorshift generator: the same flows and queries in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.next()) * n as u128) >> 64) as usize
    }
}

fn flow(n: u64) -> FlowKey {
    let address = |net: u8, host: u64| mapped([10, net, (host >> 8) as u8, host as u8].into());
    FlowKey::new(&FlowFields {
        src: address(1, n >> 8),
        dst: address(2, n % 251),
        src_port: 1024 + (n % 60_000) as u16,
        dst_port: 80 + (n >> 16) as u16,
        zone: Zone(1),
        proto: 6,
        flags: FlowFlags::empty(),
    })
}

struct Exact {
    keys: Vec<FlowKey>,
    table: FlowTable<Value>,
    map: HashMap<FlowKey, Value>,
}

fn exact() -> Exact {
    let keys: Vec<_> = (0..FLOWS as u64).map(flow).collect();
    let mut table = FlowTable::new(FLOWS as u32, HashSeed::new(42)).expect("memory for a million flows");
    let mut map = HashMap::with_capacity(FLOWS);
    for (n, key) in keys.iter().enumerate() {
        let value = [n as u64, 0, 0];
        table.insert(*key, value).expect("room for every flow");
        map.insert(*key, value);
    }
    assert_eq!(map.len(), FLOWS, "flows are distinct");
    Exact { keys, table, map }
}

fn draw(random: &mut Random) -> Vec<FlowKey> {
    (0..QUERIES).map(|_| flow(random.below(FLOWS) as u64)).collect()
}

/// Looks every query up in batches and reads the values; returns a checksum of them.
fn ask_table(table: &FlowTable<Value>, queries: &[FlowKey]) -> u64 {
    let mut found = [None; BATCH];
    let mut sum = 0;
    for batch in queries.chunks(BATCH) {
        table.lookup_batch(batch, &mut found);
        let values = found[..batch.len()]
            .iter()
            .flatten()
            .filter_map(|slot| table.at(*slot));
        sum += values.map(|(_, value)| value[0]).sum::<u64>();
    }
    sum
}

fn ask_one_by_one(table: &FlowTable<Value>, queries: &[FlowKey]) -> u64 {
    queries
        .iter()
        .filter_map(|key| table.get(key))
        .map(|value| value[0])
        .sum()
}

fn ask_map(map: &HashMap<FlowKey, Value>, queries: &[FlowKey]) -> u64 {
    queries
        .iter()
        .filter_map(|key| map.get(key))
        .map(|value| value[0])
        .sum()
}

fn lookups(c: &mut Criterion) {
    let Exact { keys, mut table, map } = exact();
    let mut group = c.benchmark_group("exact_1m_flows");
    group
        .sample_size(10)
        .throughput(Throughput::Elements(QUERIES as u64));
    let mut random = Random(0x5eed);
    let size = BatchSize::PerIteration;
    group.bench_function("flow_table_batch_32", |b| {
        b.iter_batched(|| draw(&mut random), |queries| ask_table(&table, &queries), size)
    });
    group.bench_function("flow_table_one_by_one", |b| {
        b.iter_batched(
            || draw(&mut random),
            |queries| ask_one_by_one(&table, &queries),
            size,
        )
    });
    group.bench_function("std_hash_map", |b| {
        b.iter_batched(|| draw(&mut random), |queries| ask_map(&map, &queries), size)
    });
    group.bench_function("flow_table_miss_batch_32", |b| {
        let strangers: Vec<_> = (0..QUERIES as u64).map(|n| flow(n + (1 << 24))).collect();
        b.iter(|| ask_table(&table, black_box(&strangers)))
    });
    group.throughput(Throughput::Elements(2 * 65_536));
    group.bench_function("delete_and_insert", |b| {
        let mut random = Random(7);
        b.iter_batched(
            || (0..65_536).map(|_| keys[random.below(FLOWS)]).collect::<Vec<_>>(),
            |chosen| churn(&mut table, &chosen),
            BatchSize::LargeInput,
        )
    });
    group.finish();
}

/// Removes every chosen flow, then adds them all again; returns the operations done.
fn churn(table: &mut FlowTable<Value>, chosen: &[FlowKey]) -> usize {
    let removed = chosen.iter().filter(|key| table.remove(key).is_some()).count();
    for key in chosen {
        table
            .insert(*key, Value::default())
            .expect("room for what was removed");
    }
    removed + chosen.len()
}

/// 64 masks: 8 destination prefix lengths × 4 source prefix lengths × (port or none), 160 rules each.
fn rule_set() -> Vec<Rule> {
    let mut rules = Vec::new();
    for tuple in 0..64u32 {
        let dst_length = 17 + (tuple % 8) as u8 * 2;
        let src_length = 8 + (tuple / 8 % 4) as u8 * 4;
        for n in 0..160u32 {
            let dst = std::net::Ipv4Addr::from((10 << 24) | (n << 15) | (tuple << 9));
            let src = std::net::Ipv4Addr::from(n << 24);
            let net = |address, length| ipnet::Ipv4Net::new(address, length).map(ipnet::IpNet::V4);
            let mut matching = Match::any()
                .src(net(src, src_length).expect("at most 32"))
                .and_then(|m| m.dst(net(dst, dst_length).expect("at most 32")))
                .expect("one family")
                .proto(6);
            if tuple >= 32 {
                matching = matching.dst_port(PortMask::exact(n as u16));
            }
            rules.push(Rule {
                matching,
                priority: tuple,
                index: RuleIndex(tuple * 160 + n),
            });
        }
    }
    rules
}

fn build(rules: &[Rule]) -> Classifier {
    let mut classifier = Classifier::new(ClassifierLimits::default(), HashSeed::new(5));
    for rule in rules {
        classifier.insert(*rule).expect("within 64 masks");
    }
    classifier
}

/// Packets that no rule matches: every mask is asked.
fn strangers(n: usize) -> Vec<WideKey> {
    let mut random = Random(99);
    (0..n)
        .map(|_| {
            let mut fields = flow(random.next() >> 40).fields();
            fields.dst = mapped([172, 16, random.next() as u8, random.next() as u8].into());
            WideKey::new(&WideFields {
                flow: FlowKey::new(&fields),
                eth_src: [2, 0, 0, 0, 0, 1],
                eth_dst: [2, 0, 0, 0, 0, 2],
                ethertype: 0x0800,
                vlan: None,
                mark: 0,
                tcp_flags: 0x10,
                dscp: 0,
            })
        })
        .collect()
}

fn masked_rules(c: &mut Criterion) {
    let rules = rule_set();
    let mut classifier = build(&rules);
    let packets = strangers(4096);
    let mut group = c.benchmark_group("masked_10k_rules_64_masks");
    group
        .sample_size(10)
        .throughput(Throughput::Elements(packets.len() as u64));
    group.bench_function("miss", |b| {
        b.iter(|| {
            packets
                .iter()
                .filter(|p| classifier.lookup(p).rule.is_some())
                .count()
        })
    });
    group.throughput(Throughput::Elements(1));
    group.bench_function("remove_and_insert_one", |b| {
        let mut turn = rules.iter().cycle();
        b.iter(|| {
            let rule = turn.next().expect("endless");
            assert!(classifier.remove(rule));
            classifier.insert(*rule).expect("room for what was removed");
        })
    });
    let level: Vec<_> = rules.iter().map(|rule| Rule { priority: 1, ..*rule }).collect();
    for (name, rules) in [
        ("overlap_check", &rules),
        ("overlap_check_all_of_one_priority", &level),
    ] {
        let classifier = build(rules);
        let mut turn = rules.iter().cycle();
        group.bench_function(name, |b| {
            b.iter(|| {
                let Rule {
                    matching, priority, ..
                } = turn.next().expect("endless");
                classifier
                    .overlapping(&matching.mask, &matching.key, *priority)
                    .count()
            })
        });
    }
    group.throughput(Throughput::Elements(rules.len() as u64));
    group.bench_function("build_aside", |b| b.iter(|| build(&rules)));
    group.finish();
}

fn ageing(c: &mut Criterion) {
    let mut group = c.benchmark_group("idle_wheel_1m_slots");
    group
        .sample_size(10)
        .throughput(Throughput::Elements(FLOWS as u64));
    group.bench_function("ask_every_slot_once", |b| {
        let mut wheel = IdleWheel::new(FLOWS as u32, Tick(0));
        let mut random = Random(3);
        let mut now = Tick(0);
        for n in 0..FLOWS as u32 {
            wheel.arm(Slot::from_index(n), Tick(1 + random.below(1000) as u32));
        }
        b.iter(|| {
            now = now.plus(1000);
            wheel.advance(now, u32::MAX, |_| {
                Idle::Until(now.plus(1 + random.below(1000) as u32))
            })
        })
    });
    group.finish();
}

/// Nanoseconds per operation, the median of the rounds.
fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples[samples.len() / 2]
}

fn timed(operations: usize, run: impl FnOnce()) -> f64 {
    let start = Instant::now();
    run();
    start.elapsed().as_nanos() as f64 / operations as f64
}

/// The bars, measured in turns.
fn summary(_: &mut Criterion) {
    let Exact { keys, mut table, map } = exact();
    let octets = table.memory_bytes() as f64 / table.len() as f64;
    let wheel = IdleWheel::new(FLOWS as u32, Tick(0)).memory_bytes() as f64 / FLOWS as f64;
    let (mut ours, mut theirs, mut changes) = (Vec::new(), Vec::new(), Vec::new());
    let mut random = Random(1);
    for _ in 0..ROUNDS {
        let queries = draw(&mut random);
        let mut sums = (0, 0);
        ours.push(timed(QUERIES, || sums.0 = ask_table(&table, &queries)));
        theirs.push(timed(QUERIES, || sums.1 = ask_map(&map, &queries)));
        assert_eq!(sums.0, sums.1, "both tables give the same answers");
    }
    for _ in 0..ROUNDS {
        let chosen: Vec<_> = (0..200_000).map(|_| keys[random.below(FLOWS)]).collect();
        changes.push(timed(2 * chosen.len(), || {
            black_box(churn(&mut table, &chosen));
        }));
    }
    drop((table, map, keys));

    let rules = rule_set();
    let mut classifier = build(&rules);
    let packets = strangers(1 << 16);
    let (mut misses, mut updates, mut builds) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        misses.push(timed(packets.len(), || {
            let hits = packets
                .iter()
                .filter(|p| classifier.lookup(p).rule.is_some())
                .count();
            assert_eq!(hits, 0);
        }));
        updates.push(timed(2 * rules.len(), || {
            for rule in &rules {
                assert!(classifier.remove(rule));
                classifier.insert(*rule).expect("room for what was removed");
            }
        }));
        builds.push(timed(1, || drop(black_box(build(&rules)))));
    }

    let (ours, theirs) = (median(ours), median(theirs));
    println!(
        "\nsummary: medians of {ROUNDS} rounds, CPU time of one core, {FLOWS} flows, batches of {BATCH}, in turns"
    );
    println!("{:<44}{:>12}{:>18}", "", "measured", "bar");
    row("flow table, random hits, M lookups/s", 1e3 / ours, ">= 30");
    row("std::collections::HashMap, M lookups/s", 1e3 / theirs, "");
    row("ratio to std::collections::HashMap", theirs / ours, ">= 5");
    row("insert + delete, M operations/s", 1e3 / median(changes), ">= 2");
    row("octets per flow, table", octets, "<= 96");
    row("octets per flow, table and idle wheel", octets + wheel, "<= 96");
    row("MB per million flows, table", octets, "");
    row("10 k rules in 64 masks, miss, ns", median(misses), "<= 150");
    row("rule updates, k/s", 1e6 / median(updates), ">= 60");
    row("10 k rules built aside, ms", median(builds) / 1e6, "<= 50");
}

fn row(what: &str, measured: f64, bar: &str) {
    println!("{what:<44}{measured:>12.1}{bar:>18}");
}

criterion_group!(benches, lookups, masked_rules, ageing, summary);
criterion_main!(benches);
