//! The offload path of tc flower without a kernel behind it: what translating, judging and netlink octets cost per rule. The seam answers
//! at once, as a driver would that takes everything; `tests/qemu/flower thousand` prints the same with a real kernel.

use std::collections::{BTreeMap, HashMap};
use std::hint::black_box;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dpumesh_core::steering::{
    Action, Batch, Cookie, IpMatch, IpProtocol, Operation, Owner, Pattern, Priority, RewriteField,
    SteeringRule,
};
use dpumesh_core::{Epoch, Fence, FlowSteering, MacAddr, PortRef};
use dpumesh_sriov::flower::{Answer, Kernel, Life, Message, Options, Refusal, Request, Steering};

/// A kernel that keeps filters and does nothing with them.
#[derive(Debug, Default)]
struct Loopback(HashMap<[u8; 12], Vec<u8>>);

const LINKS: u32 = 8;

impl Kernel for Loopback {
    fn exchange(&mut self, requests: &[Request]) -> io::Result<Vec<Answer>> {
        Ok(requests.iter().map(|request| self.answer(request)).collect())
    }
}

impl Loopback {
    fn answer(&mut self, request: &Request) -> Answer {
        const DUMP: u16 = 0x300;
        let message = |body: Vec<u8>| Message { kind: 44, body };
        let gone = || Refusal {
            errno: 2,
            message: None,
        };
        match request.kind {
            18 => Ok((1..=LINKS).map(|link| message(link_body(link))).collect()),
            44 => {
                self.0.insert(place(&request.body), request.body.clone());
                Ok(vec![message(request.body.clone())])
            }
            45 => {
                let body = self.0.remove(&place(&request.body)).ok_or_else(gone)?;
                Ok(vec![message(body)])
            }
            46 if request.flags & DUMP == DUMP => Ok(self.0.values().cloned().map(message).collect()),
            46 => {
                let body = self.0.get(&place(&request.body)).cloned().ok_or_else(gone)?;
                Ok(vec![message(body)])
            }
            _ => Ok(Vec::new()),
        }
    }
}

/// Handle, priority and chain: the first attributes are `TCA_KIND` "flower" (12 octets) and `TCA_CHAIN`.
fn place(body: &[u8]) -> [u8; 12] {
    let mut key = [0; 12];
    key[..4].copy_from_slice(&body[8..12]);
    key[4..8].copy_from_slice(&body[16..20]);
    if let Some(chain) = body.get(36..40) {
        key[8..].copy_from_slice(chain);
    }
    key
}

fn link_body(link: u32) -> Vec<u8> {
    let mut body: Vec<u8> = [0, link, 0, 0]
        .iter()
        .flat_map(|word| word.to_ne_bytes())
        .collect();
    body.extend(9_u16.to_ne_bytes());
    body.extend(3_u16.to_ne_bytes());
    body.extend(format!("rep{link}\0").into_bytes());
    body.resize(body.len().next_multiple_of(4), 0);
    body
}

const FENCE: Fence = Fence(Epoch(1));

fn steering() -> Steering {
    let ports = (0..LINKS)
        .map(|i| (PortRef::vf(i as u16), i + 1))
        .collect::<BTreeMap<_, _>>();
    let options = Options::new("flower", 1, ports);
    Steering::open(Box::<Loopback>::default(), options, Arc::new(Life::new(Epoch(1)))).expect("opens")
}

/// The rule that sends a service's connection to an endpoint.
fn rule(i: u32) -> SteeringRule {
    let pattern = Pattern {
        port: Some(PortRef::vf((i % LINKS) as u16)),
        ip_dst: Some(IpMatch::from(std::net::IpAddr::from(
            (0x0a00_0000 | i).to_be_bytes(),
        ))),
        ip_proto: Some(IpProtocol::TCP),
        l4_dst: Some(443.into()),
        ..Pattern::default()
    };
    let actions = vec![
        Action::Count,
        Action::Rewrite(RewriteField::EthDst(MacAddr([2, 0, 0, 0, 0, 1]))),
        Action::Forward(PortRef::vf(1)),
    ];
    SteeringRule::new(Cookie(i.into()), Owner::Agent, Priority(7), pattern, actions)
}

fn add(i: u32) -> Operation {
    Operation::Add(rule(i))
}

fn remove(i: u32) -> Operation {
    Operation::Remove {
        owner: Owner::Agent,
        cookie: Cookie(i.into()),
    }
}

fn offload(criterion: &mut Criterion) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("a runtime");
    let apply = |steering: &Steering, operations: Vec<Operation>| {
        let outcome = runtime
            .block_on(steering.apply(FENCE, &Batch::new(operations)))
            .expect("applied");
        outcome.into_result().expect("carried out")
    };
    let mut group = criterion.benchmark_group("flower");
    group
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .sample_size(20);

    let bed = steering();
    let one = [rule(1)];
    group.bench_function("validate", |b| {
        b.iter(|| runtime.block_on(bed.validate(black_box(&one))))
    });
    group.bench_function("insert_delete", |b| {
        b.iter(|| {
            apply(&bed, vec![add(1)]);
            apply(&bed, vec![remove(1)])
        });
    });
    group.throughput(Throughput::Elements(2000));
    group.bench_function("batch_1000_insert_delete", |b| {
        b.iter(|| {
            apply(&bed, (0..1000).map(add).collect());
            apply(&bed, (0..1000).map(remove).collect())
        });
    });
    group.throughput(Throughput::Elements(1000));
    apply(&bed, (0..1000).map(add).collect());
    let cookies: Vec<Cookie> = (0..1000).map(Cookie).collect();
    group.bench_function("counters_1000", |b| {
        b.iter(|| runtime.block_on(bed.counters(Owner::Agent, &cookies)))
    });
    group.bench_function("list_1000", |b| {
        b.iter(|| runtime.block_on(bed.list(Owner::Agent)))
    });
    group.throughput(Throughput::Elements(1));
    group.bench_function("counters_1", |b| {
        b.iter(|| runtime.block_on(bed.counters(Owner::Agent, &cookies[..1])))
    });
    group.finish();
}

criterion_group!(benches, offload);
criterion_main!(benches);
