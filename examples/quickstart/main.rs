//! Two emulated nodes on one machine carry real traffic through the shared proxy.
//!
//! ```text
//! cargo run --release --example quickstart
//! ```
//! Each node is a host and a DPU SoC: two namespaces joined only by a management link. Pods get emulated virtual
//! functions; programs in them, which know nothing of a mesh, talk HTTP, TCP and UDP. The example starts everything as
//! processes of its own, plays scenarios, measures, and removes everything again. It needs no program but itself.
//!
//! | file | story |
//! |---|---|
//! | `node` | namespaces, links, cards, processes, pods; the rules that follow are [`dpumesh_cni::rules`] |
//! | `mesh` | what the proxies are told |
//! | `scenarios` | what has to be shown |
//! | `faults`, `reload` | what has to be survived |
//! | `figures` | what is measured |

mod faults;
mod figures;
mod mesh;
mod node;
mod reload;
mod scenarios;
mod security;
mod trust;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use dpumesh_examples::children::{Interrupt, Run};
use dpumesh_examples::measure::Environment;
use dpumesh_examples::report::{Progress, Report};
use dpumesh_examples::workload;
use dpumesh_hw::netns::{ensure_privilege, process};
use dpumesh_proxy::dataplane::VfDevice;
use dpumesh_proxy::entry;
use dpumesh_tap::Profile;

use node::{Nodes, Plan, Result};
use scenarios::World;

/// Two emulated nodes on one machine carry real traffic through the shared proxy
#[derive(Debug, Parser)]
#[command(
    name = "quickstart",
    version,
    after_help = "\
Exit status: 0 when every scenario passed, 1 when one failed or the nodes did not start.
A run that was killed leaves nothing that the next run does not remove."
)]
struct Args {
    /// How packets cross from node to node: in VXLAN, or as they are
    #[arg(long, value_enum, default_value_t = NetworkMode::Overlay)]
    mode: NetworkMode,
    /// Pods on each node
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(2..=32))]
    pods: u16,
    /// What the emulated cards can do: unlimited, k2-like or minimal
    #[arg(long, value_name = "PROFILE", default_value = "k2-like")]
    profile: Profile,
    /// What stands for a VF; tap needs /dev/net/tun
    #[arg(long, value_enum, default_value_t = VfDevice::Auto)]
    vf_device: VfDevice,
    /// Write the results as JSON as well
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Play faults (killed programs, broken files, resets, MTUs that do not match, a thousand connections) instead, without figures
    #[arg(long)]
    faults: bool,
    /// Play only scenarios whose name contains this text
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Do not measure latency and CPU
    #[arg(long)]
    no_figures: bool,
    /// Leave everything running after the scenarios, until Ctrl-C
    #[arg(long)]
    keep: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum NetworkMode {
    Overlay,
    Underlay,
}

fn main() -> ExitCode {
    if let Err(error) = process::die_with_parent() {
        eprintln!("quickstart: {error}");
        return ExitCode::FAILURE;
    }
    if let Some(role) = workload::requested() {
        return role.run();
    }
    if let Some(program) = std::env::args().nth(1).filter(|name| name.starts_with("dpu-")) {
        return run_program(&program);
    }
    match play(&Args::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("quickstart: {error}");
            ExitCode::FAILURE
        }
    }
}

/// This executable is also the programs that run on the SoCs, so that one build is enough.
fn run_program(name: &str) -> ExitCode {
    let arguments = || std::iter::once(name.to_owned()).chain(std::env::args().skip(2));
    match name {
        "dpu-proxy" => {
            let args = dpumesh_proxy::program::Args::parse_from(arguments());
            entry::enter(name, &args.log_level, || dpumesh_proxy::program::run(&args))
        }
        "dpu-dataplane" => {
            let args = dpumesh_proxy::dataplane::Args::parse_from(arguments());
            entry::enter(name, &args.log_level, || dpumesh_proxy::dataplane::run(&args))
        }
        _ => {
            eprintln!("quickstart: there is no program {name}");
            ExitCode::FAILURE
        }
    }
}

fn play(args: &Args) -> Result<ExitCode> {
    ensure_privilege()?;
    let interrupt = Interrupt::catch()?;
    let (run, leftovers) = Run::begin("quickstart")?;
    let run = Arc::new(run);
    let progress = Progress::new();
    if !leftovers.is_empty() {
        progress.line(&leftovers.to_string());
    }
    let plan = Plan {
        overlay: args.mode == NetworkMode::Overlay,
        pods_per_node: args.pods,
        profile: args.profile,
        vf_kind: args.vf_device.kind(),
    };
    let nodes = Nodes::start(plan, Arc::clone(&run), |step| progress.step(step))?;
    progress.step("servers in the pods");
    let mut world = World::new(nodes, Arc::clone(&run))?;
    let mut report = Report::default();
    let chosen = |name: &str| args.only.as_ref().is_none_or(|text| name.contains(text.as_str()));
    let all = if args.faults { faults::ALL } else { scenarios::ALL };
    for (name, scenario) in all.iter().filter(|(name, _)| chosen(name)) {
        interrupt.check()?;
        report.scenario(&progress, name, || scenario(&mut world));
    }
    if !args.no_figures && !args.faults {
        interrupt.check()?;
        progress.line(&Environment::read().to_string());
        figures::measure(&world, &mut report, &progress)?;
    }
    progress.finish();
    println!("{report}");
    if let Some(file) = &args.json {
        report.write_json(file)?;
    }
    if args.keep {
        explain(&world.nodes);
        while !interrupt.wait(Duration::from_secs(3600)) {}
    }
    Ok(report.exit_code())
}

/// How to enter what is running.
fn explain(nodes: &Nodes) {
    println!("\nEverything is left running until Ctrl-C. To enter a pod or a SoC:");
    let user = if nix::unistd::geteuid().is_root() && dpumesh_hw::netns::user::has_capabilities() {
        String::new()
    } else {
        format!(
            "--user=/proc/{}/ns/user --preserve-credentials ",
            std::process::id()
        )
    };
    for node in &nodes.all {
        for running in &node.pods {
            let addresses: Vec<String> = running.pod.addresses.iter().map(ToString::to_string).collect();
            let path = running.namespace.path();
            println!("  {:10} {}", running.pod.name, addresses.join(" "));
            println!(
                "             nsenter {user}--net={} curl -H 'host: remote' http://10.96.0.1/",
                path.display()
            );
        }
        println!(
            "  soc-{}      nsenter {user}--net={} curl 127.0.0.1:15000/clusters",
            node.index + 1,
            node.own.soc.path().display()
        );
    }
}
