//! Plugin, agent, dataplane and proxy of a host, each a process of its own, on the emulated card. Every case is a process
//! in namespaces of its own; what a container runtime does is done by [`runtime::Runtime`], and once by a real one.

mod adapter;
mod attachments;
mod governed;
mod podman;
mod restarts;
mod runtime;
mod world;

use std::process::ExitCode;

use clap::Parser;
use dpumesh_hw::netns::process::die_with_parent;
use dpumesh_hw::netns::testing::{self, Case, RunAs};

macro_rules! cases {
    ($($module:ident :: $name:ident,)*) => {
        &[$(Case { name: stringify!($name), run_as: RunAs::Caller, run: $module::$name },)*]
    };
}

fn main() -> ExitCode {
    if let Some(name) = std::env::args()
        .nth(1)
        .filter(|name| PROGRAMS.contains(&name.as_str()))
    {
        return run_program(&name);
    }
    testing::main(cases![
        attachments::add_gives_a_pod_everything_and_del_leaves_nothing,
        attachments::what_fails_is_undone,
        attachments::adds_and_dels_at_once,
        attachments::an_interface_of_that_name_is_refused,
        attachments::what_no_runtime_takes_away_is_collected,
        attachments::pods_of_two_nodes_meet,
        attachments::strangers_and_nonsense_are_refused,
        attachments::a_reference_plugin_satisfies_the_player,
        attachments::the_programs_tell_what_is_wrong,
        restarts::a_dataplane_that_restarts_is_told_everything_again,
        restarts::an_agent_that_is_killed_keeps_its_pods,
        restarts::an_agent_killed_in_the_middle_of_an_add_leaks_nothing,
        restarts::a_plugin_killed_in_the_middle_of_an_add_leaks_nothing,
        restarts::whenever_an_agent_is_killed_nothing_leaks,
        restarts::a_card_that_is_reset_loses_its_pods_and_serves_new_ones,
        restarts::pods_end_while_agent_and_dataplane_are_away,
        governed::a_pod_is_closed_until_it_is_governed,
        governed::a_plugin_killed_while_it_waits_is_not_waited_for,
        adapter::the_adapter_says_when_a_pod_is_governed,
        podman::podman_runs_containers_on_the_mesh,
    ])
}

const PROGRAMS: [&str; 3] = ["dpu-dataplane", "dpu-proxy", "istio-dpu-agent"];

/// This executable is also the programs that go on beside a test: they die with it.
fn run_program(name: &str) -> ExitCode {
    if die_with_parent().is_err() {
        return ExitCode::FAILURE;
    }
    let line = || std::env::args().skip(1);
    tracing_subscriber::fmt()
        .with_env_filter(std::env::var("LOG").unwrap_or_else(|_| "info".to_owned()))
        .with_ansi(false)
        .with_writer(std::io::stderr)
        .init();
    let result = match name {
        "dpu-proxy" => dpumesh_proxy::program::run(&dpumesh_proxy::program::Args::parse_from(line()))
            .map_err(|error| error.to_string()),
        "dpu-dataplane" => dpumesh_proxy::dataplane::run(&dpumesh_proxy::dataplane::Args::parse_from(line()))
            .map_err(|error| error.to_string()),
        _ => dpumesh_cni::agent::Args::read(line().map(Into::into))
            .and_then(|args| dpumesh_cni::agent::run(&args))
            .map_err(|error| error.to_string()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{name}: {error}");
            ExitCode::FAILURE
        }
    }
}
