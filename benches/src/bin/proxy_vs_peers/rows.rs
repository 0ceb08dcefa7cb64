//! [`ROWS`]: what is measured, of whom, and the bars.

use std::net::SocketAddr;
use std::sync::Arc;

use rustls::ClientConfig;

use crate::load::{self, Client};
use crate::machine::{Process, SERVING, find, free_address, pin_here, pinned, quantile};
use crate::subject::{Endpoint, Layer, Program, Security, Shape, Subject};
use crate::table::{Bar, Line, Table};
use crate::{Bench, Result, files};

pub(crate) struct Row {
    pub(crate) name: &'static str,
    /// Measured with the load on another processor and on the same.
    pub(crate) both_pinnings: bool,
    pub(crate) measure: fn(&Bench) -> Result<Table>,
}

const fn row(name: &'static str, both_pinnings: bool, measure: fn(&Bench) -> Result<Table>) -> Row {
    Row {
        name,
        both_pinnings,
        measure,
    }
}

pub(crate) const ROWS: &[Row] = &[
    row("HTTP/1.1, route + RBAC + metrics", true, http1),
    row("L4 passthrough", true, tcp),
    row("TLS front, HTTP/1.1", true, tls),
    row("HTTP/2 front, HTTP/1.1 back", true, http2),
    row("mTLS on both legs", true, mutual),
    row("full mTLS handshakes, a request each", false, handshakes),
    row("bulk, one stream", false, bulk),
    row("110 pods beside one", false, pods),
    row("memory by pods", false, memory),
    row("idle TLS connections", false, idle),
    row(
        "latency added at 1,000 requests/s on one processor, L4",
        false,
        latency_l4,
    ),
    row(
        "latency added at 1,000 requests/s on one processor, L7 + mTLS",
        false,
        latency_l7,
    ),
];

const OURS: Program = Program::DpuProxy;
const WEB: &[Program] = &[OURS, Program::Envoy, Program::Haproxy, Program::Nginx];
const MESH: &[Program] = &[OURS, Program::Envoy, Program::Haproxy];
const PLAIN: Security = Security::Plain;
const MUTUAL: Security = Security::Mutual;
/// CPU per unit of work.
const MICROS: &str = "µs CPU each";

fn http1(bench: &Bench) -> Result<Table> {
    let table = requests(bench, WEB, Shape::new(Layer::Http1, PLAIN, PLAIN), wrk("http"))?;
    Ok(table
        .beside(&["envoy"], 1.0 / 3.0)
        .beside(&["haproxy", "nginx"], 1.3))
}

fn tcp(bench: &Bench) -> Result<Table> {
    let table = requests(bench, MESH, Shape::new(Layer::Tcp, PLAIN, PLAIN), wrk("http"))?;
    Ok(table.beside(&["haproxy"], 1.2))
}

fn tls(bench: &Bench) -> Result<Table> {
    let shape = Shape::new(Layer::Http1, Security::Tls, PLAIN);
    let table = requests(bench, WEB, shape, wrk("https"))?;
    Ok(table.beside(&["haproxy"], 1.3))
}

fn http2(bench: &Bench) -> Result<Table> {
    let load = |bench: &Bench, subject: &Subject| {
        load::h2load(subject.address(), bench.seconds(), bench.pinning.load())
    };
    let table = requests(bench, MESH, Shape::new(Layer::Http2, PLAIN, PLAIN), load)?;
    Ok(table.beside(&["haproxy"], 1.5).beside(&["envoy"], 0.5))
}

/// wrk has no certificate to show: an HAProxy before the proxy under test has, and is not counted.
fn mutual(bench: &Bench) -> Result<Table> {
    if Program::Haproxy.file().is_none() {
        return Err("haproxy must be there, to show wrk's certificate".into());
    }
    let load = |bench: &Bench, subject: &Subject| {
        let before = Before::start(bench, subject)?;
        load::wrk("http", before.address, bench.seconds(), bench.pinning.load())
    };
    let table = requests(bench, MESH, Shape::new(Layer::Http1, MUTUAL, MUTUAL), load)?;
    let ours = table.of(OURS.name()).unwrap_or(f64::NAN);
    Ok(table
        .judge("µs of dpu-proxy", ours, Bar::AtMost(25.0))
        .beside(&["envoy"], 1.0 / 3.0))
}

/// Plain in, mutual TLS out.
struct Before {
    address: SocketAddr,
    _process: Process,
}

impl Before {
    fn start(bench: &Bench, subject: &Subject) -> Result<Self> {
        let haproxy = find("haproxy").ok_or("haproxy is not there")?;
        let address = free_address()?;
        let shape = Shape::new(Layer::Http1, PLAIN, MUTUAL);
        let file = bench.folder.path().join(format!("before-{}.cfg", address.port()));
        std::fs::write(
            &file,
            files::haproxy(shape, &[address], subject.address(), &bench.trust),
        )?;
        let mut command = pinned(bench.pinning.load(), &haproxy);
        command.arg("-db").arg("-f").arg(&file);
        Ok(Self {
            address,
            _process: Process::start("haproxy", command, &[address])?,
        })
    }
}

fn handshakes(bench: &Bench) -> Result<Table> {
    let client = bench.trust.client_config()?;
    pin_here(bench.pinning.load())?;
    let load = |bench: &Bench, subject: &Subject| load::handshakes(subject.address(), &client, bench.lasting);
    let table = requests(bench, MESH, Shape::new(Layer::Http1, MUTUAL, PLAIN), load)?;
    let ours = table.of(OURS.name()).unwrap_or(f64::NAN);
    Ok(table.judge(
        "handshakes of dpu-proxy per CPU second",
        1e6 / ours,
        Bar::AtLeast(3500.0),
    ))
}

fn wrk(scheme: &'static str) -> impl Fn(&Bench, &Subject) -> Result<u64> {
    move |bench, subject| load::wrk(scheme, subject.address(), bench.seconds(), bench.pinning.load())
}

fn there(programs: &[Program]) -> impl Iterator<Item = Program> {
    programs
        .iter()
        .copied()
        .filter(|program| program.file().is_some())
}

fn start(bench: &Bench, program: Program, shape: Shape, endpoint: &Endpoint) -> Result<Subject> {
    Subject::start(
        program,
        shape,
        endpoint.address,
        bench.folder.path(),
        &bench.trust,
    )
}

fn endpoint(bench: &Bench, security: Security) -> Result<Endpoint> {
    Endpoint::start(security, bench.folder.path(), &bench.trust)
}

/// CPU of each proxy for what the load says it has done.
fn requests(
    bench: &Bench,
    programs: &[Program],
    shape: Shape,
    load: impl Fn(&Bench, &Subject) -> Result<u64>,
) -> Result<Table> {
    let endpoint = endpoint(bench, shape.back)?;
    let subjects: Vec<Subject> = there(programs)
        .map(|program| start(bench, program, shape, &endpoint))
        .collect::<Result<_>>()?;
    let mut lines: Vec<Line> = subjects.iter().map(|subject| Line::new(subject.name)).collect();
    for round in 0..=bench.rounds {
        for (subject, line) in subjects.iter().zip(&mut lines) {
            let before = subject.process.cpu_micros()?;
            let count = subject.blamed(load(bench, subject))?.max(1) as f64;
            let taken = subject.process.cpu_micros()? - before;
            if round > 0 {
                line.values.push(taken / count);
                line.rates.push(count / bench.lasting.as_secs_f64());
            }
            line.resident_kib = Some(subject.process.resident_kib()?);
        }
    }
    Ok(Table::new(MICROS, lines))
}

/// The whole way of one large answer: straight, through the proxy as octets, and with the client's leg in mutual TLS.
fn bulk(bench: &Bench) -> Result<Table> {
    let client = bench.trust.client_config()?;
    pin_here(bench.pinning.load())?;
    let endpoint = endpoint(bench, PLAIN)?;
    let shapes = [PLAIN, MUTUAL].map(|front| Shape::new(Layer::Tcp, front, PLAIN));
    type Way<'a> = (String, SocketAddr, Option<&'a Arc<ClientConfig>>, Option<Subject>);
    let mut ways: Vec<Way<'_>> = vec![("straight".into(), endpoint.address, None, None)];
    for program in there(MESH) {
        for shape in shapes {
            let subject = start(bench, program, shape, &endpoint)?;
            let (tls, with) = match shape.front {
                MUTUAL => (Some(&client), " mTLS"),
                _ => (None, ""),
            };
            let who = format!("{}{with}", subject.name);
            ways.push((who, subject.address(), tls, Some(subject)));
        }
    }
    let mut lines: Vec<Line> = ways.iter().map(|way| Line::new(way.0.as_str())).collect();
    for _ in 0..bench.rounds {
        for ((who, address, tls, _), line) in ways.iter().zip(&mut lines) {
            line.values
                .push(load::bulk(*address, *tls).map_err(|error| format!("{who}: {error}"))?);
        }
    }
    let table = Table::new("Gb/s", lines);
    let of = |who| table.of(who).unwrap_or(f64::NAN);
    let (straight, plain, mutual) = (of("straight"), of("dpu-proxy"), of("dpu-proxy mTLS"));
    Ok(table
        .judge("dpu-proxy / straight", plain / straight, Bar::AtLeast(0.5))
        .judge("dpu-proxy mTLS / plain", mutual / plain, Bar::AtLeast(0.42)))
}

const PODS: usize = 110;

/// 110 connections to one pod's listener, beside one connection to each of 110.
fn pods(bench: &Bench) -> Result<Table> {
    pin_here(bench.pinning.load())?;
    let endpoint = endpoint(bench, PLAIN)?;
    let mut ways = Vec::new();
    for program in there(MESH) {
        let mut shape = Shape::new(Layer::Http1, PLAIN, PLAIN);
        let one = start(bench, program, shape, &endpoint)?;
        shape.pods = PODS;
        let many = start(bench, program, shape, &endpoint)?;
        let to_one = vec![one.address(); PODS];
        let to_each = many.addresses.clone();
        ways.push((Line::new(format!("{}, 1 pod", one.name)), one, to_one));
        ways.push((Line::new(format!("{}, {PODS}", many.name)), many, to_each));
    }
    for round in 0..=bench.rounds {
        for (line, subject, addresses) in &mut ways {
            let before = subject.process.cpu_micros()?;
            let count = subject.blamed(load::in_turns(addresses, bench.lasting))?.max(1) as f64;
            if round > 0 {
                line.values.push((subject.process.cpu_micros()? - before) / count);
                line.rates.push(count / bench.lasting.as_secs_f64());
            }
            line.resident_kib = Some(subject.process.resident_kib()?);
        }
    }
    let table = Table::new(MICROS, ways.into_iter().map(|way| way.0).collect());
    let of = |who| table.of(who).unwrap_or(f64::NAN);
    let ratio = of("dpu-proxy, 110") / of("dpu-proxy, 1 pod");
    Ok(table.judge("110 pods / 1 pod", ratio, Bar::AtMost(1.1)))
}

/// After a request to each pod, so that each has been at work.
fn memory(bench: &Bench) -> Result<Table> {
    let endpoint = endpoint(bench, PLAIN)?;
    let mut lines = Vec::new();
    for (program, pods, who) in [
        (OURS, 1, "dpu-proxy, 1 pod"),
        (OURS, PODS, "dpu-proxy, 110"),
        (Program::Envoy, 1, "envoy, 1 pod"),
        (Program::Envoy, PODS, "envoy, 110"),
    ] {
        if program.file().is_none() {
            continue;
        }
        let mut shape = Shape::new(Layer::Http1, PLAIN, PLAIN);
        shape.pods = pods;
        let subject = start(bench, program, shape, &endpoint)?;
        subject.blamed(load::in_turns(&subject.addresses, bench.lasting))?;
        let mut line = Line::new(who);
        line.values.push(subject.process.resident_kib()? / 1024.0);
        lines.push(line);
    }
    let table = Table::new("MiB", lines);
    let (one, all) = (table.of("dpu-proxy, 1 pod"), table.of("dpu-proxy, 110"));
    let bar = |pods: usize| Bar::AtMost(40.0 + 0.3 * pods as f64);
    Ok(table
        .judge("MiB of dpu-proxy with 1 pod", one.unwrap_or(f64::NAN), bar(1))
        .judge(
            "MiB of dpu-proxy with 110 pods",
            all.unwrap_or(f64::NAN),
            bar(PODS),
        ))
}

/// A thousand connections that did their handshake and one request.
fn idle(bench: &Bench) -> Result<Table> {
    const COUNT: usize = 1000;
    let client = bench.trust.client_config()?;
    let endpoint = endpoint(bench, PLAIN)?;
    let mut lines = Vec::new();
    for program in there(MESH) {
        let subject = start(bench, program, Shape::new(Layer::Http1, MUTUAL, PLAIN), &endpoint)?;
        let open = |count: usize| -> Result<Vec<Client>> {
            (0..count)
                .map(|_| {
                    let mut client = Client::connect(subject.address(), Some(&client))?;
                    client.send("/")?;
                    client.receive()?;
                    Ok(client)
                })
                .collect()
        };
        let _warm = subject.blamed(open(50))?;
        let before = subject.process.resident_kib()?;
        let _held = subject.blamed(open(COUNT))?;
        let mut line = Line::new(subject.name);
        line.values
            .push((subject.process.resident_kib()? - before) / COUNT as f64);
        lines.push(line);
    }
    let table = Table::new("KiB each", lines);
    let ours = table.of(OURS.name()).unwrap_or(f64::NAN);
    Ok(table.judge("KiB of dpu-proxy for each", ours, Bar::AtMost(30.0)))
}

fn latency_l4(bench: &Bench) -> Result<Table> {
    latency(bench, Shape::new(Layer::Tcp, PLAIN, PLAIN), [15.0, 40.0])
}

fn latency_l7(bench: &Bench) -> Result<Table> {
    latency(bench, Shape::new(Layer::Http1, MUTUAL, MUTUAL), [40.0, 120.0])
}

/// What a proxy adds to the same client's requests straight to the endpoint, which speaks what the proxy speaks to it.
fn latency(bench: &Bench, shape: Shape, bars: [f64; 2]) -> Result<Table> {
    pin_here(SERVING)?;
    let client = bench.trust.client_config()?;
    let tls = (shape.front == MUTUAL).then_some(&client);
    let endpoint = endpoint(bench, shape.back)?;
    let subjects: Vec<Subject> = there(MESH)
        .map(|program| start(bench, program, shape, &endpoint))
        .collect::<Result<_>>()?;
    let mut lines: Vec<Line> = subjects
        .iter()
        .flat_map(|subject| ["p50", "p99"].map(|share| Line::new(format!("{}, {share}", subject.name))))
        .collect();
    let requests = 1000 * bench.seconds();
    for _ in 0..bench.rounds {
        let straight = load::paced(endpoint.address, tls, requests)?;
        for (subject, lines) in subjects.iter().zip(lines.chunks_exact_mut(2)) {
            let through = subject.blamed(load::paced(subject.address(), tls, requests))?;
            for (line, share) in lines.iter_mut().zip([0.5, 0.99]) {
                line.values
                    .push(quantile(&through, share) - quantile(&straight, share));
            }
        }
    }
    let mut table = Table::new("µs more", lines);
    for (share, bar) in ["p50", "p99"].into_iter().zip(bars) {
        let ours = table.of(&format!("dpu-proxy, {share}")).unwrap_or(f64::NAN);
        table = table.judge(
            format!("µs that dpu-proxy adds at {share}"),
            ours,
            Bar::AtMost(bar),
        );
    }
    Ok(table)
}
