//! A real runtime: Debian's podman with its CNI networks and host-local, containers from a folder, no image, no registry.
//!
//! Packages: podman runc containernetworking-plugins busybox-static. Everything it mounts stays in a mount namespace of the case.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use dpumesh_hw::netns::testing::skip;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use serde_json::json;

use crate::world::{World, eventually};

const NEEDED: [&str; 4] = [
    "/usr/bin/podman",
    "/usr/sbin/runc",
    "/usr/lib/cni/host-local",
    "/bin/busybox",
];
const SERVER: &str = "10.244.1.77";
const MAC: &str = "02:00:00:00:00:77";

pub(crate) fn podman_runs_containers_on_the_mesh() {
    let missing: Vec<_> = NEEDED
        .into_iter()
        .filter(|path| !Path::new(path).exists())
        .collect();
    if !missing.is_empty() {
        let reason = format!(
            "{} missing: apt-get install podman runc containernetworking-plugins busybox-static",
            missing.join(", ")
        );
        return skip("podman_runs_containers_on_the_mesh", &reason);
    }
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    if map.split_whitespace().nth(2) != Some("4294967295") {
        return skip(
            "podman_runs_containers_on_the_mesh",
            "containers need root outside a user namespace",
        );
    }
    private_run();
    let world = World::new();
    let podman = Podman::new(&world);
    podman.run(
        &["-d", "--name", "server", "--ip", SERVER, "--mac-address", MAC],
        "nc -ll -p 8080 -e /bin/busybox cat",
    );
    let seen = podman.run(
        &["--rm", "--name", "looks", "--network", "container:server"],
        "ip address show dev eth0",
    );
    assert!(seen.contains(MAC) && seen.contains(SERVER), "{seen}");
    let route = podman.run(&["--rm", "--network", "container:server"], "ip route");
    assert!(route.contains("default via 10.244.1.1 dev eth0"), "{route}");
    let pinged = podman.run(&["--rm", "--name", "pings"], &format!("ping -c 1 -W 5 {SERVER}"));
    assert!(pinged.contains("1 packets received"), "{pinged}");
    let echo = podman.run(
        &["--rm", "--name", "talks"],
        &format!("sh 'echo through the proxy | nc -w 5 {SERVER} 8080'"),
    );
    assert_eq!(echo.trim(), "through the proxy");
    eventually("containers that ended are detached", || world.leased() == 1);
    podman.call(&["rm", "--force", "--time", "0", "server"]);
    eventually("host-local has its addresses back", || {
        podman.reserved().is_empty()
    });
    world.assert_empty();
}

/// This thread, and what it starts, has a `/run` of its own: runtimes mount their namespaces there.
fn private_run() {
    unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace");
    let nothing: Option<&str> = None;
    mount(
        nothing,
        "/",
        nothing,
        MsFlags::MS_REC | MsFlags::MS_PRIVATE,
        nothing,
    )
    .expect("private mounts");
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), nothing).expect("a folder for the case");
}

/// Podman with storage and configuration in the world's folder.
struct Podman<'a> {
    world: &'a World,
    rootfs: PathBuf,
}

impl<'a> Podman<'a> {
    fn new(world: &'a World) -> Self {
        let rootfs = world.path("rootfs");
        for folder in ["bin", "dev", "etc", "proc", "run", "sys", "tmp"] {
            fs::create_dir_all(rootfs.join(folder)).expect("a folder");
        }
        fs::copy("/bin/busybox", rootfs.join("bin/busybox")).expect("copied");
        for name in ["sh", "nc"] {
            symlink("busybox", rootfs.join("bin").join(name)).expect("a link");
        }
        let list = json!({
            "cniVersion": "1.0.0",
            "name": "mesh",
            "plugins": [{
                "type": "istio-dpu-cni",
                "agentSocket": world.socket(),
                "ipam": {
                    "type": "host-local",
                    "dataDir": world.path("reserved"),
                    "ranges": [[{ "subnet": "10.244.1.0/24" }]],
                    "routes": [{ "dst": "0.0.0.0/0" }],
                },
            }],
        });
        fs::create_dir(world.path("net.d")).expect("a folder");
        fs::write(world.path("net.d/10-mesh.conflist"), list.to_string()).expect("written");
        let plugin = Path::new(env!("CARGO_BIN_EXE_istio-dpu-cni"));
        let conf = format!(
            r#"[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
[network]
network_backend = "cni"
cni_plugin_dirs = [{:?}, "/usr/lib/cni"]
network_config_dir = {:?}
[engine]
cgroup_manager = "cgroupfs"
events_logger = "none"
runtime = "runc"
lock_type = "file"
tmp_dir = {:?}
"#,
            plugin.parent().expect("a folder"),
            world.path("net.d"),
            world.path("podman-tmp"),
        );
        fs::write(world.path("containers.conf"), conf).expect("written");
        Self { world, rootfs }
    }

    /// Runs a program of busybox in a container; its output.
    fn run(&self, options: &[&str], program: &str) -> String {
        let rootfs = self.rootfs.to_string_lossy().into_owned();
        let mut line = vec!["run", "--security-opt", "seccomp=unconfined"];
        if !options.contains(&"--network") {
            line.extend(["--network", "mesh"]);
        }
        line.extend(options);
        line.extend(["--rootfs", &rootfs, "/bin/busybox"]);
        match program.split_once(" '") {
            Some((words, script)) => {
                line.extend(words.split(' '));
                line.extend(["-c", script.trim_end_matches('\'')]);
            }
            None => line.extend(program.split(' ')),
        }
        self.call(&line)
    }

    fn call(&self, line: &[&str]) -> String {
        let mut command = Command::new(NEEDED[0]);
        command.env("CONTAINERS_CONF", self.world.path("containers.conf"));
        command.arg("--root").arg(self.world.path("podman"));
        command.args(["--runroot", "/run/podman-test", "--storage-driver", "vfs"]);
        command
            .args(line)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let child = self.world.host.spawn(command).expect("podman starts");
        let Output {
            status,
            stdout,
            stderr,
        } = child.wait_with_output().expect("podman ends");
        let said = String::from_utf8_lossy(&stderr);
        assert!(status.success(), "podman {line:?}: {status}: {said}");
        String::from_utf8_lossy(&stdout).into_owned()
    }

    /// Addresses that host-local holds.
    fn reserved(&self) -> Vec<String> {
        let entries = fs::read_dir(self.world.path("reserved/mesh"))
            .into_iter()
            .flatten()
            .flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        names.filter(|name| name.starts_with("10.")).collect()
    }
}
