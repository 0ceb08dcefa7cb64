//! A proxy that is given broken files while it serves: the last good configuration stays, and it says what was wrong.
//!
//! The file is the one with the routes of the HTTP service over IPv4; it is replaced as a whole, as those do who write
//! such files.

use std::path::Path;
use std::time::{Duration, Instant};

use dpumesh_examples::workload::http_client::Summary;
use serde_json::{Value, json};

use super::faults;
use super::mesh;
use super::node::Result;
use super::scenarios::{PATIENCE, World, all_from, ensure};

/// Host of the route that the last, good file adds.
const ADDED: &str = "added";

/// The broken files: what is wrong, the content, and what the proxy has to say of it.
fn broken() -> [(&'static str, String, [&'static str; 2]); 3] {
    let change = |path: &str, value: Value| {
        let mut routes = mesh::routes();
        *routes.pointer_mut(path).expect("the files have routes") = value;
        routes.to_string()
    };
    let route = "/resources/0/virtual_hosts/1/routes/0/route";
    let mut cut = mesh::routes().to_string();
    cut.truncate(cut.len() / 2);
    [
        ("a syntax error", cut, ["routes.json", "EOF"]),
        (
            "an unknown field",
            change(route, json!({ "cluster": "remote-v4", "time_out": "1s" })),
            ["resources[0].virtual_hosts[1].routes[0].route", "time_out"],
        ),
        (
            "a cluster that is not there",
            change(route, json!({ "cluster": "gone-v4" })),
            ["resources[0].virtual_hosts[1].routes[0].route.cluster", "gone-v4"],
        ),
    ]
}

pub(crate) fn broken_files(world: &mut World) -> Result<String> {
    let file = world.nodes.all[0].routes();
    let good = mesh::routes();
    let load = faults::load(world)?;
    let mut told = Vec::new();
    for (what, content, words) in broken() {
        replace(&file, &content)?;
        let said = await_refusal(world, |said| words.iter().all(|word| said.contains(word)))
            .map_err(|error| format!("{what}: {error}"))?;
        ensure(said.contains(&file.display().to_string()), || {
            format!("{what}: the file is not named: {said}")
        })?;
        let meanwhile = world.get("remote", 50, &[])?;
        all_from(&meanwhile, 50, world.nodes.pod(1, 1), world.client())?;
        told.push(what);
    }
    let mut more = good.clone();
    let hosts = more
        .pointer_mut("/resources/0/virtual_hosts")
        .and_then(Value::as_array_mut);
    let route = json!({ "match": { "prefix": "/" }, "route": { "cluster": "local-v4" } });
    hosts
        .ok_or("the files have routes")?
        .push(json!({ "name": ADDED, "domains": [ADDED], "routes": [route] }));
    replace(&file, &more.to_string())?;
    await_refusal(world, str::is_empty)?;
    let added = world.get(ADDED, 50, &[])?;
    all_from(&added, 50, world.nodes.pod(0, 1), world.client())?;
    let summary: Summary = load.result()??;
    let answered = summary.statuses.values().sum();
    all_from(&summary, answered, world.nodes.pod(1, 1), world.client())?;
    ensure(summary.errors.is_empty(), || {
        format!("errors {:?}", summary.errors)
    })?;
    let log = world.nodes.all[0]
        .proxy
        .as_ref()
        .ok_or("the proxy is not running")?
        .stderr();
    ensure(log.contains("gone-v4"), || {
        format!("the log does not say it: {log}")
    })?;
    replace(&file, &good.to_string())?;
    Ok(format!(
        "{}: named on the admin server by file, field and reason; all {answered} requests answered meanwhile; a good file was taken",
        told.join(", ")
    ))
}

fn replace(file: &Path, content: &str) -> Result<()> {
    let fresh = file.with_extension("fresh");
    std::fs::write(&fresh, content)?;
    Ok(std::fs::rename(&fresh, file)?)
}

/// Waits until what the proxy says of refused updates (nothing: an empty text) is as `wanted`.
fn await_refusal(world: &World, wanted: impl Fn(&str) -> bool) -> Result<String> {
    let begun = Instant::now();
    loop {
        let said = refusal(world)?;
        if wanted(&said) {
            return Ok(said);
        }
        ensure(begun.elapsed() < PATIENCE, || format!("the proxy says {said:?}"))?;
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn refusal(world: &World) -> Result<String> {
    let dump: Value = serde_json::from_str(&world.nodes.all[0].ask_proxy("/config_dump")?)?;
    let details = dump["configs"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|c| c["details"].as_str());
    Ok(details.collect::<Vec<_>>().join("\n"))
}
