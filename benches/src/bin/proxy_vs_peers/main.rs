//! The shared proxy beside its peers: dpu-proxy, stock Envoy, HAProxy and nginx on the same endpoint, in one run.
//!
//! The endpoint is nginx (1 KiB, or a file of 256 MiB). Each proxy has one worker. Rounds are interleaved, so that what disturbs the
//! machine disturbs all; the figure is the proxy's own CPU (`utime + stime` of `/proc/PID/stat`) divided by the requests that
//! were answered, median over the rounds with the median absolute deviation. dpu-proxy and Envoy read the same bootstrap but for
//! their ports. Proxy and endpoint are bound to processor 1, the load to processor 0 or, with `--pinning same`, to 1 as well.
//!
//! A peer that is not installed is a skip with its name: `ENVOY_BIN` (or `envoy` on `PATH`), `haproxy`; nothing is measured without
//! `nginx`, `wrk` and `h2load`. `DPU_PROXY_BIN` names our own program, by default the `dpu-proxy` beside this one.

mod files;
mod load;
mod machine;
mod rows;
mod subject;
mod table;
mod trust;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use machine::Pinning;
use subject::Program;
use tempfile::TempDir;
use trust::Trust;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// The shared proxy beside Envoy, HAProxy and nginx: CPU, memory, latency and throughput, judged by the project's bars
#[derive(Parser)]
#[command(
    after_help = "A bar that is not met is said and fails nothing: a figure of a busy machine is worth only its ratio."
)]
struct Args {
    /// Two short rounds
    #[arg(long)]
    smoke: bool,
    /// Rounds of each row
    #[arg(long, default_value_t = 7)]
    rounds: u32,
    /// Only rows whose name contains this text
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Where the load runs; both when not given, one after the other
    #[arg(long, value_enum)]
    pinning: Option<Pinning>,
    /// Write the figures as JSON as well
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What the rows share.
struct Bench {
    folder: TempDir,
    trust: Trust,
    rounds: u32,
    /// Of one round.
    lasting: Duration,
    pinning: Pinning,
}

impl Bench {
    fn seconds(&self) -> u32 {
        self.lasting.as_secs() as u32
    }
}

fn main() -> ExitCode {
    match run(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("proxy_vs_peers: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> Result<()> {
    for needed in ["nginx", "wrk", "h2load"] {
        if machine::find(needed).is_none() {
            return Err(format!("{needed} is not installed, and nothing can be measured without it").into());
        }
    }
    if Program::DpuProxy.file().is_none() {
        return Err("build dpu-proxy first: cargo build --release -p dpumesh-proxy".into());
    }
    for peer in [Program::Envoy, Program::Haproxy] {
        if peer.file().is_none() {
            println!("SKIP {}: not installed, nothing is compared with it", peer.name());
        }
    }
    let pinnings = match (args.pinning, args.smoke) {
        (Some(one), _) => vec![one],
        (None, true) => vec![Pinning::Across],
        (None, false) => vec![Pinning::Across, Pinning::Same],
    };
    let folder = tempfile::tempdir()?;
    let mut bench = Bench {
        trust: Trust::new(folder.path())?,
        folder,
        rounds: if args.smoke { 2 } else { args.rounds },
        lasting: Duration::from_secs(if args.smoke { 1 } else { 2 }),
        pinning: Pinning::Across,
    };
    println!("{}, {} rounds", machine::description(), bench.rounds);
    let mut tables = Vec::new();
    for row in rows::ROWS {
        if args
            .only
            .as_ref()
            .is_some_and(|text| !row.name.contains(text.as_str()))
        {
            continue;
        }
        let pinnings = if row.both_pinnings {
            &pinnings[..]
        } else {
            &pinnings[..1]
        };
        for pinning in pinnings {
            bench.pinning = *pinning;
            let mut table = measured(&bench, row).map_err(|error| format!("{}: {error}", row.name))?;
            table.name = match (row.both_pinnings, pinning) {
                (true, Pinning::Same) => format!("{}, all on one processor", row.name),
                _ => row.name.to_owned(),
            };
            print!("\n{table}");
            tables.push(table);
        }
    }
    if let Some(file) = args.json {
        let all = serde_json::json!({
            "machine": machine::description(), "rounds": bench.rounds, "connections": load::CONNECTIONS,
            "tables": tables.iter().map(table::Table::to_json).collect::<Vec<_>>(),
        });
        std::fs::write(&file, format!("{all:#}\n"))
            .map_err(|error| format!("{}: {error}", file.display()))?;
    }
    Ok(())
}

/// How often a row is measured that a peer spoils.
const TRIES: u32 = 3;

/// A row's table. A peer that answers wrongly or does not start says nothing about dpu-proxy: the row is measured again, and says so.
/// What dpu-proxy does wrong is an error at once.
fn measured(bench: &Bench, row: &rows::Row) -> Result<table::Table> {
    let mut tries = 1;
    loop {
        match (row.measure)(bench) {
            Err(error) if tries < TRIES && !error.to_string().contains(Program::DpuProxy.name()) => {
                println!("\nAGAIN {}: {error}", row.name);
                tries += 1;
            }
            other => return other,
        }
    }
}
