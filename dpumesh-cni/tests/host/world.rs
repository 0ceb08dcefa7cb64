//! [`World`]: a node with host, SoC and stack namespaces, its programs as processes, and pods that can be made and measured.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use dpumesh_core::steering::Owner;
use dpumesh_core::{Backend, DpuId, Role};
use dpumesh_hw::channel::trust::{Authority, Credentials, Party};
use dpumesh_hw::channel::{Dataplane, DataplaneClient};
use dpumesh_hw::netlink::{Address, LinkChange, Netlink, VethEnd};
use dpumesh_hw::netns::Namespace;
use dpumesh_tap::{Mode, TapBackend, TapOptions, VfKind};
use ipnet::IpNet;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use socket2::{Domain, Protocol, Socket, Type};
use tempfile::TempDir;

use crate::runtime::{Runtime, Sandbox};

/// Longest wait for anything.
const DEADLINE: Duration = Duration::from_secs(30);
/// VFs of a card.
pub(crate) const VFS: usize = 8;
const WIRE: &str = "wire0";

/// A node.
pub(crate) struct World {
    /// Ends first, and with it the programs.
    pub(crate) agent: Option<Program>,
    pub(crate) dataplane: Option<Program>,
    _proxy: Option<Program>,
    pub(crate) host: Namespace,
    pub(crate) soc: Namespace,
    stack: Namespace,
    index: u8,
    pub(crate) folder: TempDir,
}

/// A pod: a namespace and what a runtime calls it.
pub(crate) struct Pod {
    pub(crate) namespace: Namespace,
    pub(crate) container: String,
}

impl Pod {
    pub(crate) fn new(container: &str) -> Self {
        Self {
            namespace: Namespace::create().expect("a namespace"),
            container: container.to_owned(),
        }
    }

    pub(crate) fn add(&self, runtime: &Runtime) -> Result<Value, Value> {
        runtime.add(self.sandbox(Some(&self.namespace.path())))
    }

    pub(crate) fn del(&self, runtime: &Runtime, previous: Option<&Value>) -> Result<Value, Value> {
        runtime.del(self.sandbox(Some(&self.namespace.path())), previous)
    }

    pub(crate) fn sandbox<'a>(&'a self, netns: Option<&'a Path>) -> Sandbox<'a> {
        Sandbox {
            container: &self.container,
            netns,
            ifname: "eth0",
        }
    }

    /// Names of its interfaces.
    pub(crate) fn links(&self) -> Vec<String> {
        let mut netlink = Netlink::open_in(&self.namespace).expect("netlink");
        let links = netlink.links().expect("listed");
        links.into_iter().map(|link| link.name).collect()
    }
}

/// The address in a result.
pub(crate) fn address(result: &Value) -> IpAddr {
    let text = result["ips"][0]["address"]
        .as_str()
        .unwrap_or_else(|| panic!("no address: {result}"));
    text.parse::<IpNet>().expect("an address with a prefix").addr()
}

impl World {
    /// A node with its dataplane, proxy and agent.
    pub(crate) fn new() -> Self {
        let mut world = Self::without_agent(1);
        world.start_agent(&[]);
        world
    }

    pub(crate) fn without_agent(index: u8) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let [host, soc, stack] = std::array::from_fn(|_| Namespace::create().expect("a namespace"));
        let mut netlink = Netlink::open_in(&host).expect("netlink");
        netlink
            .create_veth(&VethEnd::new("mgmt0"), &VethEnd::new("mgmt0").in_namespace(&soc))
            .expect("a management link");
        for (namespace, end) in [(&host, 1), (&soc, 2)] {
            configure(namespace, "mgmt0", &[&format!("169.254.{index}.{end}/30")]);
        }
        let dpu = DpuId(format!("dpu-{index}"));
        let authority = Authority::new(dpu).expect("an authority");
        for (party, name) in [(Party::Agent, "agent"), (Party::Dataplane, "dataplane")] {
            let credentials = authority.issue(party).expect("issued");
            credentials.write(&folder.path().join(name)).expect("written");
        }
        write_ipam(&folder.path().join("bin"));
        let mut world = Self {
            agent: None,
            dataplane: None,
            _proxy: None,
            host,
            soc,
            stack,
            index,
            folder,
        };
        // The tunnel endpoint is there without a wire as well.
        configure(&world.soc, "lo", &[&format!("192.0.2.{index}/32")]);
        // The host's side makes the card.
        drop(world.card());
        world.start_dataplane();
        world.start_proxy();
        world
    }

    /// Joins the SoCs of two nodes, so that their tunnel endpoints reach each other.
    pub(crate) fn join(&self, other: &Self) {
        let mut netlink = Netlink::open_in(&self.soc).expect("netlink");
        netlink
            .create_veth(&VethEnd::new(WIRE), &VethEnd::new(WIRE).in_namespace(&other.soc))
            .expect("a wire");
        for (near, far) in [(self, other), (other, self)] {
            configure(&near.soc, WIRE, &[&format!("192.0.3.{}/24", near.index)]);
            let mut netlink = Netlink::open_in(&near.soc).expect("netlink");
            let link = netlink.link(WIRE).expect("the wire").index;
            let to = format!("192.0.2.{}/32", far.index).parse().expect("a prefix");
            let via = format!("192.0.3.{}", far.index).parse().expect("an address");
            let route = dpumesh_hw::netlink::Route::new(to).via(via).on(link);
            netlink.add_route(&route).expect("a route");
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn dpu(&self) -> String {
        format!("dpu-{}", self.index)
    }

    pub(crate) fn vtep(&self) -> IpAddr {
        Ipv4Addr::new(192, 0, 2, self.index).into()
    }

    pub(crate) fn channel(&self) -> String {
        format!("169.254.{}.2:7070", self.index)
    }

    /// The card's host side, as the agent opens it.
    pub(crate) fn card(&self) -> TapBackend {
        let mode = Mode::Overlay { vtep: self.vtep() };
        let mut options = TapOptions::new(self.path("card"), self.dpu(), Role::Host, mode);
        options.vf_kind = VfKind::available();
        options.host_namespace = Some(self.host.path());
        options.fabric_namespace = Some(self.soc.path());
        TapBackend::open(options, None, None).expect("the card")
    }

    pub(crate) fn start_dataplane(&mut self) {
        let mut command = ourselves("dpu-dataplane");
        command.args(["--dpu", &self.dpu(), "--vtep", &self.vtep().to_string()]);
        command.args(["--listen", &self.channel(), "--congestion", "cubic"]);
        command.arg("--card").arg(self.path("card"));
        command.arg("--stack-netns").arg(self.stack.path());
        command.arg("--credentials").arg(self.path("dataplane"));
        self.dataplane = None;
        self.dataplane = Some(Program::start(&self.soc, command, &self.path("dataplane.log")));
    }

    fn start_proxy(&mut self) {
        let config = self.path("proxy.json");
        fs::write(&config, proxy_configuration().to_string()).expect("written");
        let mut command = ourselves("dpu-proxy");
        command
            .arg("--config-path")
            .arg(&config)
            .args(["--concurrency", "1"]);
        command.arg("--stack-netns").arg(self.stack.path());
        let log = self.path("proxy.log");
        self._proxy = Some(Program::spawn(&self.soc, command, &log));
        eventually("the proxy listens", || {
            let tried = self.soc.run(|| TcpStream::connect((Ipv4Addr::LOCALHOST, 15000)));
            tried.expect("entered").is_ok()
        });
    }

    /// Starts the agent, for the first time or again.
    pub(crate) fn start_agent(&mut self, more: &[&str]) {
        let mut command = ourselves("istio-dpu-agent");
        let vfs = VFS.to_string();
        command.args([
            "--dpu",
            &self.dpu(),
            "--vtep",
            &self.vtep().to_string(),
            "--vfs",
            &vfs,
        ]);
        command.args([
            "--dataplane",
            &self.channel(),
            "--sweep-every",
            "0.2",
            "--dataplane-within",
            "8",
        ]);
        command.arg("--card").arg(self.path("card"));
        command.arg("--credentials").arg(self.path("agent"));
        command.arg("--state").arg(self.path("state"));
        command.arg("--socket").arg(self.socket());
        command.arg("--fabric-netns").arg(self.soc.path());
        command.args(more);
        self.agent = None;
        let agent = Program::start(&self.host, command, &self.path("agent.log"));
        fs::write(self.path("agent.pid"), agent.id().to_string()).expect("written");
        self.agent = Some(agent);
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.path("run/agent.sock")
    }

    /// A runtime of this host, with our plugin and a test double for IPAM.
    pub(crate) fn runtime(&self, version: &str) -> Runtime {
        let conf = json!({
            "cniVersion": version,
            "name": "mesh",
            "type": "istio-dpu-cni",
            "agentSocket": self.socket(),
            "ipam": { "type": "test-ipam" },
        });
        Runtime {
            plugin: env!("CARGO_BIN_EXE_istio-dpu-cni").into(),
            path: self.path("bin"),
            conf,
            variables: vec![
                ("IPAM_DIR".to_owned(), self.path("ipam")),
                ("IPAM_NET".to_owned(), format!("10.244.{}", self.index).into()),
                ("NODE_DIR".to_owned(), self.folder.path().to_owned()),
            ],
        }
    }

    /// What the test double for IPAM runs at its next ADD, after it has given an address.
    pub(crate) fn hook(&self, script: &str) {
        fs::write(self.path("hook"), script).expect("written");
    }

    /// Addresses given and not given back.
    pub(crate) fn given_addresses(&self) -> usize {
        fs::read_dir(self.path("ipam")).map_or(0, Iterator::count)
    }

    /// VFs that are leased.
    pub(crate) fn leased(&self) -> usize {
        let card = self.card();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .expect("a runtime");
        let states = runtime.block_on(card.vf().expect("VFs").list()).expect("listed");
        states.iter().filter(|state| state.lease.is_some()).count()
    }

    /// What the agent has written down.
    pub(crate) fn journal(&self) -> Vec<Value> {
        let text = fs::read_to_string(self.path("state/attachments.json")).unwrap_or_default();
        let json: Value = serde_json::from_str(&text).unwrap_or_default();
        json["records"].as_array().cloned().unwrap_or_default()
    }

    /// Nothing is left of any pod, within a while.
    pub(crate) fn assert_empty(&self) {
        eventually("no VF is leased", || self.leased() == 0);
        eventually("the journal is empty", || self.journal().is_empty());
        assert_eq!(self.given_addresses(), 0, "addresses given back");
    }

    /// Rules of the agent that the dataplane has.
    pub(crate) fn rules(&self) -> usize {
        let runtime = self.host_runtime();
        let (address, dpu, credentials) = (self.channel(), DpuId(self.dpu()), self.credentials());
        let asked = runtime.spawn(async move {
            let client = DataplaneClient::connect(&address, &dpu, &credentials).await;
            client.expect("a channel").steering().list(Owner::Agent).await
        });
        runtime.block_on(asked).expect("asked").expect("listed").len()
    }

    /// A runtime whose connections leave from the host's namespace.
    pub(crate) fn host_runtime(&self) -> tokio::runtime::Runtime {
        let host = self.host.try_clone().expect("a handle");
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .on_thread_start(move || host.enter_thread().expect("entered"))
            .build()
            .expect("a runtime")
    }

    pub(crate) fn credentials(&self) -> Credentials {
        Credentials::read(&self.path("agent")).expect("credentials")
    }
}

/// A program that goes on beside the test; ended when dropped.
pub(crate) struct Program {
    child: Child,
    log: PathBuf,
}

impl Program {
    /// Starts a program that says `ready`, and waits for that.
    fn start(namespace: &Namespace, mut command: Command, log: &Path) -> Self {
        command.stdout(Stdio::piped());
        let mut program = Self::spawn(namespace, command, log);
        let mut said = [0; 5];
        let mut stdout = program.child.stdout.take().expect("piped");
        if stdout.read_exact(&mut said).is_err() || said != *b"ready" {
            panic!("not ready: {}", fs::read_to_string(log).unwrap_or_default());
        }
        program
    }

    fn spawn(namespace: &Namespace, mut command: Command, log: &Path) -> Self {
        let file = fs::File::options()
            .create(true)
            .append(true)
            .open(log)
            .expect("a log");
        command.stderr(file);
        let child = namespace.spawn(command).expect("started");
        Self {
            child,
            log: log.to_owned(),
        }
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.id() as i32), signal).expect("signalled");
    }

    /// Kills it as a crash would, and waits until it is gone.
    pub(crate) fn kill(mut self) {
        self.child.kill().expect("killed");
        self.child.wait().expect("ended");
    }

    /// Waits until it ends by itself; false when it says that it failed.
    pub(crate) fn wait(mut self) -> bool {
        self.child.wait().expect("ended").success()
    }

    /// Asks it to end and waits.
    pub(crate) fn end(mut self) -> bool {
        self.signal(Signal::SIGTERM);
        self.child.wait().expect("ended").success()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill(); // it may have ended
        let _ = self.child.wait();
        if thread::panicking() {
            eprintln!(
                "---- {} ----\n{}",
                self.log.display(),
                fs::read_to_string(&self.log).unwrap_or_default()
            );
        }
    }
}

/// One of the node's programs: this executable with its name as first argument.
fn ourselves(program: &str) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg(program);
    command
}

pub(crate) fn configure(namespace: &Namespace, name: &str, nets: &[&str]) {
    let mut netlink = Netlink::open_in(namespace).expect("netlink");
    let link = netlink.link(name).expect("the interface is there").index;
    netlink
        .change_link(link, &LinkChange::new().up())
        .expect("switched on");
    for net in nets {
        let net: IpNet = net.parse().expect("a prefix");
        netlink
            .add_address(&Address { link, net })
            .expect("address added");
    }
}

/// Waits until `condition` holds.
pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < DEADLINE, "never came true: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// One ICMP echo; true when its reply came.
pub(crate) fn ping(from: &Pod, to: IpAddr) -> bool {
    let made = from
        .namespace
        .run(|| Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4)));
    let socket = made.expect("entered").expect("a raw socket");
    socket
        .set_read_timeout(Some(Duration::from_millis(200)))
        .expect("set");
    let mut echo = [8, 0, 0, 0, 0x12, 0x34, 0, 1, b'd', b'p', b'u', b'm'];
    let words = echo
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    let sum: u32 = words.sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    echo[2..4].copy_from_slice(&sum.to_be_bytes());
    if socket.send_to(&echo, &SocketAddr::new(to, 0).into()).is_err() {
        return false;
    }
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(500) {
        let mut octets = [0; 128];
        let Ok(length) = (&socket).read(&mut octets) else {
            continue;
        };
        // A raw socket hands the IP header up as well.
        if length > 26 && octets[20] == 0 && octets[24..26] == [0x12, 0x34] {
            return true;
        }
    }
    false
}

/// Sends some octets by TCP through the proxy and reads their echo.
pub(crate) fn talk(from: &Pod, to: &Pod, address: IpAddr) {
    const LENGTH: usize = 200_000;
    let bound = to.namespace.run(|| TcpListener::bind((address, 0)));
    let listener = bound.expect("entered").expect("listening");
    let server = listener.local_addr().expect("bound");
    let echo = thread::spawn(move || {
        let (mut stream, peer) = listener.accept().expect("accepted");
        let mut octets = vec![0; LENGTH];
        stream.read_exact(&mut octets).expect("read");
        stream.write_all(&octets).expect("written");
        peer.ip()
    });
    let connected = from
        .namespace
        .run(|| TcpStream::connect_timeout(&server, DEADLINE));
    let mut stream = connected.expect("entered").expect("connected");
    stream.set_read_timeout(Some(DEADLINE)).expect("set");
    let own = stream.local_addr().expect("bound").ip();
    let octets: Vec<u8> = (0..LENGTH).map(|index| (index * 7 % 251) as u8).collect();
    stream.write_all(&octets).expect("written");
    let mut back = vec![0; LENGTH];
    stream.read_exact(&mut back).expect("read");
    assert!(back == octets, "the octets came back changed");
    assert_eq!(
        echo.join().expect("echoed"),
        own,
        "the proxy keeps the pod's address"
    );
}

/// The proxy passes on what it intercepts.
fn proxy_configuration() -> Value {
    let typed = |name: &str, kind: &str, mut config: Value| {
        config["@type"] = format!("type.googleapis.com/envoy.extensions.{kind}").into();
        json!({ "name": name, "typed_config": config })
    };
    let address =
        |address: &str, port: u16| json!({ "socket_address": { "address": address, "port_value": port } });
    json!({
        "admin": { "address": address("127.0.0.1", 15000) },
        "static_resources": {
            "listeners": [{
                "name": "intercept",
                "address": address("0.0.0.0", 15001),
                "transparent": true,
                "listener_filters": [
                    typed("envoy.filters.listener.original_dst", "filters.listener.original_dst.v3.OriginalDst", json!({})),
                    typed("envoy.filters.listener.original_src", "filters.listener.original_src.v3.OriginalSrc", json!({})),
                ],
                "default_filter_chain": { "name": "all", "filters": [typed(
                    "envoy.filters.network.tcp_proxy",
                    "filters.network.tcp_proxy.v3.TcpProxy",
                    json!({ "stat_prefix": "all", "cluster": "original" }),
                )] },
            }],
            "clusters": [{ "name": "original", "type": "ORIGINAL_DST", "lb_policy": "CLUSTER_PROVIDED", "connect_timeout": "2s" }],
        },
    })
}

/// A plugin that gives addresses of one network: a folder for each, whoever makes it first has it.
fn write_ipam(folder: &Path) {
    const SCRIPT: &str = r#"#!/bin/sh
cat >/dev/null
mkdir -p "$IPAM_DIR"
case $CNI_COMMAND in
ADD)
    for n in $(seq 2 250); do
        mkdir "$IPAM_DIR/$n" 2>/dev/null || continue
        : >"$IPAM_DIR/$n/$CNI_CONTAINERID"
        if mv "$NODE_DIR/hook" "$IPAM_DIR/$n/hook" 2>/dev/null; then . "$IPAM_DIR/$n/hook"; fi
        echo '{"ips":[{"address":"'$IPAM_NET.$n'/24","gateway":"'$IPAM_NET.1'"}],"dns":{"nameservers":["10.96.0.10"]}}'
        exit 0
    done
    echo '{"code":11,"msg":"no address is left"}'
    exit 1 ;;
DEL)
    for mine in "$IPAM_DIR"/*/"$CNI_CONTAINERID"; do
        [ -e "$mine" ] && rm -r "${mine%/*}"
    done
    exit 0 ;;
CHECK) ls "$IPAM_DIR"/*/"$CNI_CONTAINERID" >/dev/null 2>&1 || { echo '{"code":101,"msg":"address lost"}'; exit 1; } ;;
STATUS|GC) echo '{"code":4,"msg":"unknown CNI_COMMAND"}'; exit 1 ;;
esac
"#;
    fs::create_dir(folder).expect("a folder");
    let path = folder.join("test-ipam");
    fs::write(&path, SCRIPT).expect("written");
    fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).expect("executable");
}
