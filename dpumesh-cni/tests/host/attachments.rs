//! ADD, DEL, CHECK, STATUS and GC of pods on a host where everything runs.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::thread;

use dpumesh_cni::talk::{self, Answer, Ask};
use dpumesh_hw::netns::Namespace;
use dpumesh_hw::netns::testing::skip;
use serde_json::{Value, json};

use crate::runtime::{Runtime, Sandbox};
use crate::world::{Pod, VFS, World, address, eventually, ping, talk as send};

pub(crate) fn add_gives_a_pod_everything_and_del_leaves_nothing() {
    let world = World::new();
    let (old, new) = (world.runtime("1.0.0"), world.runtime("1.1.0"));
    new.status().expect("ready");
    let rules = world.rules();
    let (a, b) = (Pod::new("a"), Pod::new("b"));
    let added = [a.add(&old).expect("added"), b.add(&new).expect("added")];
    for (pod, result) in [(&a, &added[0]), (&b, &added[1])] {
        assert_eq!(result["interfaces"][0]["name"], "eth0");
        assert_eq!(result["interfaces"][0]["sandbox"], json!(pod.namespace.path()));
        assert_eq!(result["interfaces"][0]["mac"].as_str().map(str::len), Some(17));
        assert_eq!(result["ips"][0]["interface"], 0);
        assert_eq!(
            result["routes"][0],
            json!({ "dst": "0.0.0.0/0", "gw": "10.244.1.1" })
        );
        assert_eq!(result["dns"]["nameservers"][0], "10.96.0.10");
        assert_eq!(pod.links(), ["lo", "eth0"]);
    }
    assert_eq!(added[0]["cniVersion"], "1.0.0");
    assert_eq!(
        added[1]["interfaces"][0]["mtu"], 1450,
        "the encapsulation takes its share"
    );
    assert!(ping(&a, address(&added[1])) && ping(&b, address(&added[0])));
    send(&a, &b, address(&added[1]));
    for (pod, runtime, result) in [(&a, &old, &added[0]), (&b, &new, &added[1])] {
        runtime
            .check(pod.sandbox(Some(&pod.namespace.path())), result)
            .expect("as it was made");
    }
    // Another namespace is not what was attached.
    let elsewhere = Pod::new("a");
    let error = old.check(elsewhere.sandbox(Some(&elsewhere.namespace.path())), &added[0]);
    assert_eq!(error.expect_err("not there")["code"], 101);
    a.del(&old, Some(&added[0])).expect("deleted");
    assert_eq!(a.links(), ["lo"]);
    assert!(!ping(&b, address(&added[0])));
    // As runtimes do: again, without namespace and without result; and one that never was.
    old.del(a.sandbox(None), None).expect("deleted again");
    old.del(Pod::new("never").sandbox(None), None)
        .expect("nothing to delete");
    assert!(world.rules() > rules);
    b.del(&new, None).expect("deleted");
    world.assert_empty();
    assert_eq!(
        world.rules(),
        rules,
        "the rules of the tunnel's exit are there, and no pod's"
    );
}

pub(crate) fn what_fails_is_undone() {
    let world = World::new();
    let runtime = world.runtime("1.0.0");
    let pod = Pod::new("a");
    world.hook(r#"echo '{"code":11,"msg":"no address today"}'; exit 1"#);
    let error = pod.add(&runtime).expect_err("IPAM refuses");
    assert_eq!(error["code"], 11);
    assert!(
        error["msg"]
            .as_str()
            .expect("a text")
            .contains("no address today"),
        "{error}"
    );
    assert_eq!(pod.links(), ["lo"]);
    world.assert_empty();
    // An address that another pod has.
    let first = Pod::new("first");
    let taken = address(&first.add(&runtime).expect("added"));
    world.hook(&format!(
        r#"echo '{{"ips":[{{"address":"{taken}/24"}}]}}'; exit 0"#
    ));
    let error = pod.add(&runtime).expect_err("refused");
    assert!(
        error["msg"]
            .as_str()
            .expect("a text")
            .contains(&taken.to_string()),
        "{error}"
    );
    assert_eq!(pod.links(), ["lo"]);
    assert!(first.del(&runtime, None).is_ok());
    // An address that the agent refuses, and one that the kernel refuses.
    world.hook(r#"echo '{"ips":[{"address":"255.255.255.255/24"}]}'; exit 0"#);
    assert_eq!(pod.add(&runtime).expect_err("refused")["code"], 7);
    world.hook(r#"echo '{"ips":[{"address":"ff02::5/64"}]}'; exit 0"#);
    assert_eq!(pod.add(&runtime).expect_err("refused")["code"], 102);
    world.assert_empty();
    // And then it works, and a second time without DEL it does not.
    pod.add(&runtime).expect("added");
    let error = runtime.add(Sandbox {
        container: "a",
        netns: Some(&pod.namespace.path()),
        ifname: "eth0",
    });
    assert!(
        error.expect_err("twice")["msg"]
            .as_str()
            .expect("a text")
            .contains("attached already")
    );
    pod.del(&runtime, None).expect("deleted");
    world.assert_empty();
}

pub(crate) fn adds_and_dels_at_once() {
    let world = World::new();
    let runtime = world.runtime("1.1.0");
    let pods: Vec<Pod> = (0..VFS).map(|number| Pod::new(&format!("c{number}"))).collect();
    let results: Vec<Value> = thread::scope(|scope| {
        let adds: Vec<_> = pods.iter().map(|pod| scope.spawn(|| pod.add(&runtime))).collect();
        adds.into_iter()
            .map(|add| add.join().expect("ended").expect("added"))
            .collect()
    });
    for (number, pod) in pods.iter().enumerate() {
        let next = address(&results[(number + 1) % VFS]);
        assert!(ping(pod, next), "{} to {next}", pod.container);
    }
    send(&pods[0], &pods[1], address(&results[1]));
    let error = runtime.status().expect_err("no VF is left");
    assert_eq!(error["code"], 50);
    let one_more = Pod::new("one-more");
    assert_eq!(one_more.add(&runtime).expect_err("no VF is left")["code"], 11);
    assert_eq!(world.given_addresses(), VFS);
    thread::scope(|scope| {
        let dels: Vec<_> = pods
            .iter()
            .map(|pod| scope.spawn(|| pod.del(&runtime, None)))
            .collect();
        dels.into_iter().for_each(|del| {
            del.join().expect("ended").expect("deleted");
        });
    });
    world.assert_empty();
    runtime.status().expect("ready again");
}

pub(crate) fn an_interface_of_that_name_is_refused() {
    let world = World::new();
    let runtime = world.runtime("1.0.0");
    let pod = Pod::new("a");
    let error = runtime.add(Sandbox {
        container: "a",
        netns: Some(&pod.namespace.path()),
        ifname: "lo",
    });
    let error = error.expect_err("taken");
    assert!(
        error["msg"].as_str().expect("a text").contains("taken"),
        "{error}"
    );
    world.assert_empty();
}

pub(crate) fn what_no_runtime_takes_away_is_collected() {
    let world = World::new();
    let runtime = world.runtime("1.1.0");
    let (kept, forgotten) = (Pod::new("kept"), Pod::new("forgotten"));
    kept.add(&runtime).expect("added");
    forgotten.add(&runtime).expect("added");
    runtime.collect(&[("kept", "eth0")]).expect("collected");
    assert_eq!((world.leased(), forgotten.links()), (1, vec!["lo".to_owned()]));
    // A pod whose namespace is gone, and nobody asks.
    drop(kept);
    eventually("nothing is left of a pod that is gone", || {
        world.leased() == 0 && world.journal().is_empty()
    });
}

pub(crate) fn pods_of_two_nodes_meet() {
    let mut nodes = [World::without_agent(1), World::without_agent(2)];
    nodes[0].join(&nodes[1]);
    for node in &mut nodes {
        let peers = node.path("peers.json");
        fs::write(&peers, r#"{"nodes":[]}"#).expect("written");
        node.start_agent(&["--peers", peers.to_str().expect("text")]);
    }
    let pods = [Pod::new("a"), Pod::new("b")];
    let runtimes = [nodes[0].runtime("1.0.0"), nodes[1].runtime("1.0.0")];
    let addresses = [0, 1].map(|node| address(&pods[node].add(&runtimes[node]).expect("added")));
    assert!(!ping(&pods[0], addresses[1]), "the nodes do not know each other");
    for (node, other) in [(0, 1), (1, 0)] {
        let peers = json!({ "nodes": [{
            "name": format!("node-{other}"),
            "vtep": nodes[other].vtep(),
            "pods": [{ "name": "shop/other", "addresses": [addresses[other]] }],
        }] });
        fs::write(nodes[node].path("peers.json"), peers.to_string()).expect("written");
    }
    eventually("the agents have read their peers", || {
        ping(&pods[0], addresses[1])
    });
    send(&pods[0], &pods[1], addresses[1]);
    send(&pods[1], &pods[0], addresses[0]);
    // A wrong file changes nothing.
    fs::write(nodes[0].path("peers.json"), "{").expect("written");
    let agent = nodes[0].agent.as_ref().expect("runs");
    agent.signal(nix::sys::signal::Signal::SIGHUP);
    eventually("the agent has told", || {
        fs::read_to_string(nodes[0].path("agent.log"))
            .expect("a log")
            .contains("peers stay as they were")
    });
    assert!(ping(&pods[0], addresses[1]));
    for (pod, runtime) in pods.iter().zip(&runtimes) {
        pod.del(runtime, None).expect("deleted");
    }
    nodes.iter().for_each(World::assert_empty);
}

pub(crate) fn strangers_and_nonsense_are_refused() {
    let world = World::new();
    let runtime = world.runtime("1.1.0");
    Pod::new("a").add(&runtime).expect("added");
    let mode = |path: &Path| fs::metadata(path).expect("there").permissions().mode() & 0o777;
    let socket = world.socket();
    assert_eq!((mode(&socket), mode(&world.path("run"))), (0o600, 0o700));
    assert_eq!(mode(&world.path("state/attachments.json")), 0o600);
    let frame = |body: &[u8]| [&(body.len() as u32).to_be_bytes(), body].concat();
    let nonsense = [
        frame(b"{}"),
        frame(br#"{"version":9,"body":"status"}"#),
        frame(br#"{"version":1,"body":"moon"}"#),
        vec![0xff; 64],
    ];
    for octets in nonsense {
        let mut stream = UnixStream::connect(&socket).expect("connected");
        stream.write_all(&octets).expect("written");
        let answer: Answer = talk::read(&mut stream).expect("answered").expect("answered");
        assert!(
            matches!(&answer, Answer::Refused(error) if error.code == 6),
            "{answer:?}"
        );
        assert!(
            !matches!(talk::read::<Answer>(&mut stream), Ok(Some(_))),
            "it is over"
        );
    }
    // Cut off in the middle, and spoken out of turn.
    let status = talk::encode(&Ask::Status).expect("short");
    for octets in [&status[..7], &[&status[..], &status[..]].concat()] {
        let mut stream = UnixStream::connect(&socket).expect("connected");
        stream.write_all(octets).expect("written");
    }
    runtime.status().expect("the agent still serves");
    // Even where the file lets a stranger in, the agent does not listen.
    for (path, mode) in [
        (world.folder.path(), 0o755),
        (&world.path("run"), 0o755),
        (&socket, 0o666),
    ] {
        fs::set_permissions(path, PermissionsExt::from_mode(mode)).expect("opened");
    }
    let error = runtime.status_as(65534).expect_err("a stranger");
    assert_eq!(error["code"], 50, "{error}");
    eventually("the agent tells", || {
        fs::read_to_string(world.path("agent.log"))
            .expect("a log")
            .contains("a stranger called")
    });
}

const NEEDED: [&str; 8] = [
    "--dpu",
    "d",
    "--card",
    "/nowhere",
    "--credentials",
    "/nowhere",
    "--dataplane",
    "127.0.0.1:1",
];

pub(crate) fn the_programs_tell_what_is_wrong() {
    let run = |program: &str, arguments: &[&str]| {
        let output = Command::new(program)
            .args(arguments)
            .env_clear()
            .output()
            .expect("started");
        let text = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8(text).expect("UTF-8"))
    };
    let agent = env!("CARGO_BIN_EXE_istio-dpu-agent");
    let (code, help) = run(agent, &["--help"]);
    assert!(code == Some(0) && help.contains("Examples:") && help.contains("--govern-within"));
    let (code, told) = run(agent, &["--vfs", "many"]);
    assert!(code == Some(2) && told.contains("--vfs"), "{told}");
    let (code, told) = run(agent, &["--config", "/nowhere.toml"]);
    assert!(
        code == Some(1) && told.contains("--config /nowhere.toml"),
        "{told}"
    );
    let (code, told) = run(agent, &NEEDED);
    assert!(code == Some(1) && told.contains("--vtep"), "{told}");
    let arguments: Vec<&str> = NEEDED.into_iter().chain(["--vtep", "192.0.2.1"]).collect();
    let (code, told) = run(agent, &arguments);
    assert!(
        code == Some(1) && told.contains("--credentials") && told.contains("authority.pem"),
        "{told}"
    );
    let (code, completions) = run(agent, &["--completions", "bash"]);
    assert!(code == Some(0) && completions.contains("istio-dpu-agent"));
    let plugin = env!("CARGO_BIN_EXE_istio-dpu-cni");
    let (code, help) = run(plugin, &["--help"]);
    assert!(code == Some(0) && help.contains("host-local"));
    let (code, told) = run(plugin, &[]);
    let json: Value = serde_json::from_str(&told).expect("JSON, also without a runtime");
    assert!(code == Some(1) && json["code"] == 4, "{told}");
}

/// The runtime's player beside a plugin that is known to be right: it must not ask for more than the specification does.
pub(crate) fn a_reference_plugin_satisfies_the_player() {
    let path = Path::new("/usr/lib/cni");
    if !path.join("ptp").exists() || !path.join("host-local").exists() {
        let reason = "/usr/lib/cni/ptp is missing: apt-get install containernetworking-plugins";
        return skip("a_reference_plugin_satisfies_the_player", reason);
    }
    let folder = tempfile::tempdir().expect("a folder");
    let runtime = Runtime {
        plugin: path.join("ptp"),
        path: path.to_owned(),
        conf: json!({
            "cniVersion": "1.0.0",
            "name": "mesh",
            "type": "ptp",
            "ipam": { "type": "host-local", "subnet": "10.244.9.0/24", "dataDir": folder.path() },
        }),
        variables: Vec::new(),
    };
    // Its host's end belongs into a namespace that goes with the case.
    let host = Namespace::create().expect("a namespace");
    host.run(|| {
        let pod = Pod::new("reference");
        let result = pod.add(&runtime).expect("added");
        assert_eq!(address(&result).to_string(), "10.244.9.2");
        let sandbox = pod.namespace.path();
        runtime
            .check(pod.sandbox(Some(&sandbox)), &result)
            .expect("as it was made");
        assert!(runtime.status().is_err(), "a verb of 1.1.0");
        for netns in [Some(sandbox.as_path()), None] {
            runtime.del(pod.sandbox(netns), None).expect("deleted");
        }
        assert_eq!(pod.links(), ["lo"]);
    })
    .expect("entered");
}
