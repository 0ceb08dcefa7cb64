//! The nodes: namespaces, links and programs, each in its place.
//!
//! ```text
//!                     control: apiserver, istiod
//!                      │                  │
//!   istio-dpu-agent  host-1             host-2     the kubelet calls istio-dpu-cni here
//!   istio-dpu-adapter  │ mgmt             │ mgmt
//!   dpu-dataplane    soc-1 ── fabric ── soc-2
//!                    stack-1    │       stack-2    the proxy: stock Envoy or dpu-proxy
//!                            node-3                no DPU; see `ordinary`
//! ```
//! Where there is nothing to make a bridge with, the fabric is a cable between the SoCs, and there is no third machine.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use clap::ValueEnum;
use dpumesh_core::{DpuId, Role};
use dpumesh_examples::children::{Process, Run};
use dpumesh_examples::workload::http_client::{self, Options};
use dpumesh_hw::channel::{self, trust::Party};
use dpumesh_hw::netlink::{Address, LinkChange, LinkIndex, Netlink, Route, VethEnd};
use dpumesh_hw::netns::Namespace;
use dpumesh_tap::{Mode, TapBackend, TapOptions, VfKind};
use ipnet::IpNet;
use serde_json::{Value, json};

use super::Result;
use super::envoy::{self, Way};
use super::kubelet::{self, Kubelet, NAMESPACE, ORDINARY, PodSpec, RunningPod};
use super::ordinary::{self, Ordinary};
use super::peers::{self, ControlPlane};
use super::trust::{Authority, Credentials};

/// Name of the bridge that is the fabric.
const FABRIC: &str = "fabric0";
/// Name of a machine's uplink: a SoC's, or the ordinary node's.
pub(crate) const WIRE: &str = "wire0";
const MANAGEMENT: &str = "mgmt0";
const CONTROL: &str = "ctl0";
const CHANNEL_PORT: u16 = 7070;
const ADAPTER_PORT: u16 = 15010;
const ADAPTER_ADMIN: u16 = 15030;
const CONTROLLER_PORT: u16 = 15020;
const WEBHOOK_PORT: u16 = 9443;
const OUTBOUND: u16 = 15001;
const INBOUND: u16 = 15006;
const VFS: u16 = 24;
/// How long a program may take until it serves.
const PATIENCE: Duration = Duration::from_secs(30);

/// What runs as the nodes' proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Proxy {
    /// Stock Envoy 1.40.
    Envoy,
    /// Ours.
    DpuProxy,
}

/// Both nodes and the control plane.
#[derive(Debug)]
pub(crate) struct Nodes {
    // Ended in this order.
    /// The machine without a DPU, where it can be had.
    pub(crate) ordinary: Option<Ordinary>,
    pub(crate) all: Vec<Node>,
    _controller: Process,
    // The cables end with it.
    _fabric: Option<Namespace>,
    pub(crate) control: ControlPlane,
    pub(crate) run: Arc<Run>,
}

/// One node.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) index: usize,
    pub(crate) pods: Vec<RunningPod>,
    pub(crate) proxy: Option<Process>,
    pub(crate) adapter: Option<Process>,
    pub(crate) agent: Option<Process>,
    pub(crate) dataplane: Process,
    // What stock Envoy needs beside it.
    beside: Vec<Process>,
    kubelet: Kubelet,
    pub(crate) soc: Namespace,
    pub(crate) stack: Namespace,
    host: Namespace,
    fabric: Namespace,
    folder: PathBuf,
    kind: Proxy,
    adapter_credentials: Credentials,
    proxy_credentials: Credentials,
    run: Arc<Run>,
}

impl Nodes {
    /// Makes the machines and starts everything on them, without pods.
    pub(crate) fn start(kind: Proxy, run: &Arc<Run>, progress: &impl Fn(&str)) -> Result<Self> {
        progress("namespaces and links");
        let control = Namespace::create()?;
        configure(&control, "lo", peers::ADDRESS.into(), 32)?;
        progress("etcd, kube-apiserver, kube-controller-manager, istiod");
        let control = ControlPlane::start(control, run)?;
        let mut objects: Vec<Value> = (0..2)
            .map(|index| kubelet::node_object(index, vtep(index)))
            .collect();
        let third = ordinary::missing().is_none();
        if third {
            objects.push(ordinary::node_object()?);
        }
        control.apply(&list(objects))?;
        progress("istio-dpu-controller and its webhook");
        let authority = Authority::new()?;
        let controller = start_controller(&control, &authority, run)?;
        let mut all = Vec::new();
        for index in 0..2 {
            progress(&format!(
                "node {}: card, dataplane, adapter, agent, proxy",
                index + 1
            ));
            all.push(Node::start(index, kind, &control, &authority, run)?);
        }
        let (ordinary, fabric) = if third {
            progress("node 3: no DPU");
            let fabric = Namespace::create()?;
            ordinary::tool(run, &fabric, "ip", &format!("link add {FABRIC} type bridge"))?;
            ordinary::tool(run, &fabric, "ip", &format!("link set {FABRIC} up"))?;
            for node in &all {
                plug_in(node.index, &fabric, &node.soc, run)?;
            }
            (Some(Ordinary::start(&control, &fabric, run)?), Some(fabric))
        } else {
            join(&all[0].soc, &all[1].soc)?;
            (None, None)
        };
        Ok(Self {
            ordinary,
            all,
            _controller: controller,
            _fabric: fabric,
            control,
            run: Arc::clone(run),
        })
    }

    /// Creates pods in the API and gives them their network: after that they are governed, or it fails.
    pub(crate) fn add_pods(&mut self, specs: &[PodSpec]) -> Result<()> {
        self.control
            .apply(&list(specs.iter().map(PodSpec::object).collect()))?;
        for spec in specs {
            let object = self.control.get(&["pod", &spec.name, "-n", NAMESPACE])?;
            let uid = object["metadata"]["uid"].as_str().unwrap_or_default().to_owned();
            if spec.node == ORDINARY {
                let ordinary = self.ordinary.as_mut().ok_or("there is no ordinary node")?;
                ordinary.add(spec, &uid, &self.control)?;
                continue;
            }
            let node = &mut self.all[spec.node];
            let added = node.kubelet.add(spec, &uid, &node.host);
            let pod = added.map_err(|error| format!("{error}\n{}", node.last_words()))?;
            node.pods.push(pod);
        }
        Ok(())
    }

    /// What a kubelet writes once a pod's processes run.
    pub(crate) fn publish(&self, name: &str) -> Result<()> {
        kubelet::publish(&self.control, self.pod(name)?)
    }

    /// Takes a pod away: its network, then its object.
    pub(crate) fn remove_pod(&mut self, name: &str) -> Result<()> {
        for node in &mut self.all {
            let Some(place) = node.pods.iter().position(|pod| pod.spec.name == name) else {
                continue;
            };
            let pod = node.pods.remove(place);
            node.kubelet.remove(&pod, &node.host)?;
            self.control.kubectl(&[
                "delete",
                "pod",
                name,
                "-n",
                NAMESPACE,
                "--force",
                "--grace-period=0",
            ])?;
        }
        Ok(())
    }

    /// The pod of this name.
    pub(crate) fn pod(&self, name: &str) -> Result<&RunningPod> {
        let ordinary = self.ordinary.iter().flat_map(|node| &node.pods);
        let found = self.pods().chain(ordinary).find(|pod| pod.spec.name == name);
        found.ok_or_else(|| format!("there is no pod {name}").into())
    }

    /// All pods on DPUs.
    pub(crate) fn pods(&self) -> impl Iterator<Item = &RunningPod> {
        self.all.iter().flat_map(|node| &node.pods)
    }
}

impl Node {
    fn start(
        index: usize,
        kind: Proxy,
        control: &ControlPlane,
        trust: &Authority,
        run: &Arc<Run>,
    ) -> Result<Self> {
        let folder = run.folder().join(kubelet::node_name(index));
        fs::create_dir_all(&folder)?;
        let [host, soc, stack, fabric] = [(); 4].map(|()| Namespace::create());
        let (host, soc, stack, fabric) = (host?, soc?, stack?, fabric?);
        manage(index, &control.namespace, &host, &soc)?;
        let channel = channel::trust::Authority::new(dpu(index))?;
        for (party, name) in [(Party::Agent, "agent"), (Party::Dataplane, "dataplane")] {
            channel
                .issue(party)?
                .write(&folder.join(format!("{name}-credentials")))?;
        }
        let name = kubelet::node_name(index);
        let adapter = trust.issue(
            &folder.join("adapter-credentials"),
            &format!("adapter.{name}"),
            None,
        )?;
        let soc_side = trust.issue(&folder.join("proxy-credentials"), &format!("proxy.{name}"), None)?;
        // The tunnel endpoint is there without a wire as well.
        configure(&soc, "lo", vtep(index), 32)?;
        // The host's side makes the card.
        drop(card(index, &folder, &host, &fabric)?);
        let dataplane = start_dataplane(index, &folder, &soc, &stack, &fabric, run)?;
        let subnet = subnet(index)?;
        let mut node = Self {
            index,
            pods: Vec::new(),
            proxy: None,
            adapter: None,
            agent: None,
            dataplane,
            beside: Vec::new(),
            kubelet: Kubelet::new(&folder, &folder.join("agent.sock"), subnet)?,
            soc,
            stack,
            host,
            fabric,
            folder,
            kind,
            adapter_credentials: adapter,
            proxy_credentials: soc_side,
            run: Arc::clone(run),
        };
        fs::write(node.folder.join("peers.json"), r#"{"nodes":[]}"#)?;
        node.start_adapter(control)?;
        node.start_agent()?;
        if kind == Proxy::Envoy {
            node.start_beside_envoy()?;
        }
        node.start_proxy()?;
        Ok(node)
    }

    /// Starts (again) the adapter.
    pub(crate) fn start_adapter(&mut self, control: &ControlPlane) -> Result<()> {
        self.adapter = None;
        let own = &self.adapter_credentials;
        let mut command = program("istio-dpu-adapter")?;
        command
            .args(["--istiod", control.variable("ISTIOD_SECURE_GRPC")?])
            .args(["--istiod-root", control.variable("ISTIOD_ROOT")?])
            .args(["--kubeconfig", control.variable("KUBECONFIG")?])
            .args(["--node", &kubelet::node_name(self.index)])
            .args([
                "--controller",
                &SocketAddr::from((peers::ADDRESS, CONTROLLER_PORT)).to_string(),
            ])
            .args(["--listen", &self.adapter_address().to_string()])
            .args([
                "--admin",
                &SocketAddr::from((Ipv4Addr::LOCALHOST, ADAPTER_ADMIN)).to_string(),
            ])
            .arg("--agent-socket")
            .arg(self.folder.join("adapter-agent.sock"))
            .arg("--peers-file")
            .arg(self.folder.join("peers.json"))
            .arg("--state")
            .arg(self.folder.join("adapter"));
        command
            .arg("--tls-cert")
            .arg(&own.cert)
            .arg("--tls-key")
            .arg(&own.key)
            .arg("--tls-ca")
            .arg(&own.ca);
        let name = format!("istio-dpu-adapter-{}", self.index + 1);
        let mut adapter = Process::start(&self.run, &name, &self.host, command)?;
        adapter.wait_for_port(&self.host, self.adapter_address(), PATIENCE)?;
        self.adapter = Some(adapter);
        Ok(())
    }

    /// Starts (again) the agent.
    pub(crate) fn start_agent(&mut self) -> Result<()> {
        self.agent = None;
        let mut command = ourselves("istio-dpu-agent");
        command
            .args(["--dpu", &dpu(self.index).0])
            .args(["--vtep", &vtep(self.index).to_string(), "--vfs", &VFS.to_string()])
            .args([
                "--dataplane",
                &dataplane_address(self.index).to_string(),
                "--log-level",
                "warn",
            ])
            .arg("--card")
            .arg(self.folder.join("card"))
            .arg("--fabric-netns")
            .arg(self.fabric.path())
            .arg("--credentials")
            .arg(self.folder.join("agent-credentials"))
            .arg("--state")
            .arg(self.folder.join("agent"))
            .arg("--socket")
            .arg(self.folder.join("agent.sock"))
            .arg("--peers")
            .arg(self.folder.join("peers.json"))
            .arg("--adapter")
            .arg(self.folder.join("adapter-agent.sock"));
        let name = format!("istio-dpu-agent-{}", self.index + 1);
        let mut agent = Process::start(&self.run, &name, &self.host, command)?;
        agent.wait_for_line("ready", PATIENCE)?;
        self.agent = Some(agent);
        Ok(())
    }

    /// Starts (again) the proxy and waits until it serves.
    pub(crate) fn start_proxy(&mut self) -> Result<()> {
        let name = format!("proxy-{}", self.index + 1);
        let file = self.folder.join("proxy.json");
        let (relay, keys) = (self.folder.join("adapter.sock"), self.folder.join("keys.sock"));
        let is_envoy = self.kind == Proxy::Envoy;
        let sources = envoy::Sources {
            node: &name,
            // All sockets of stock Envoy are in the stack's namespace; dpu-proxy has its workers' there.
            adapter: if is_envoy {
                Way::Socket(&relay)
            } else {
                Way::Address(self.adapter_address())
            },
            adapter_name: &self.adapter_name(),
            credentials: &self.proxy_credentials,
            keys: is_envoy.then_some(keys.as_path()),
        };
        fs::write(&file, envoy::shared(&sources).to_string())?;
        let (mut command, place) = if is_envoy {
            let mut command = Command::new(envoy::program().ok_or("there is no Envoy")?);
            command.args(["--disable-hot-restart", "--log-level", "warning"]);
            // As Istio starts its sidecars: a connection of a chain that has changed gets one more answer, not ten minutes.
            command.args(["--drain-time-s", "45", "--drain-strategy", "immediate"]);
            (command, &self.stack)
        } else {
            let mut command = ourselves("dpu-proxy");
            command
                .args(["--log-level", "warn"])
                .arg("--stack-netns")
                .arg(self.stack.path());
            (command, &self.soc)
        };
        command
            .args(["--concurrency", "1"])
            .arg("--config-path")
            .arg(&file);
        let mut proxy = Process::start(&self.run, &name, place, command)?;
        let admin = SocketAddr::from((Ipv4Addr::LOCALHOST, envoy::ADMIN_PORT));
        proxy.wait_for_port(place, admin, PATIENCE)?;
        self.proxy = Some(proxy);
        Ok(())
    }

    fn start_beside_envoy(&mut self) -> Result<()> {
        let adapter = self.adapter_address().to_string();
        let mut relay = ourselves("relay");
        relay.arg(self.folder.join("adapter.sock")).arg(&adapter);
        let mut relay = Process::start(&self.run, &format!("relay-{}", self.index + 1), &self.soc, relay)?;
        relay.wait_for_line("ready", PATIENCE)?;
        let own = &self.proxy_credentials;
        let mut keys = program("dpu-keys")?;
        keys.args(["--adapter", &adapter, "--name", &self.adapter_name()]);
        keys.arg("--root")
            .arg(&own.ca)
            .arg("--cert")
            .arg(&own.cert)
            .arg("--key")
            .arg(&own.key);
        keys.arg("--sds").arg(self.folder.join("keys.sock"));
        let keys = Process::start(
            &self.run,
            &format!("dpu-keys-{}", self.index + 1),
            &self.soc,
            keys,
        )?;
        self.beside = vec![relay, keys];
        Ok(())
    }

    /// Connections that its proxy has refused because no pod's program takes them.
    pub(crate) fn denied(&self) -> Result<u64> {
        let place = match self.kind {
            Proxy::Envoy => &self.stack,
            Proxy::DpuProxy => &self.soc,
        };
        let mut options = Options::new((Ipv4Addr::LOCALHOST, envoy::ADMIN_PORT).into());
        options.path = r"/stats?filter=tcp\.deny\.downstream_cx_total".to_owned();
        let summary = place.run(|| http_client::get(&options))??;
        let body = summary.first.map(|answer| answer.body).unwrap_or_default();
        let count = body.trim().rsplit(' ').next().unwrap_or_default();
        Ok(count.parse().unwrap_or(0))
    }

    /// Why the proxy refuses a pod's newest configuration, if it does; asked of the adapter.
    pub(crate) fn quarantined(&self, pod: &str) -> Result<Option<String>> {
        let mut options = Options::new((Ipv4Addr::LOCALHOST, ADAPTER_ADMIN).into());
        options.path = "/status".to_owned();
        let summary = self.host.run(|| http_client::get(&options))??;
        let body = summary.first.map(|answer| answer.body).unwrap_or_default();
        let status: Value = serde_json::from_str(&body)?;
        let report = &status["pods"][format!("{pod}.{NAMESPACE}")];
        if report.is_null() {
            return Err(format!("the adapter does not know {pod}: {status}").into());
        }
        Ok(report["quarantined"].as_str().map(str::to_owned))
    }

    /// What the agent has written down of its pods.
    pub(crate) fn leases(&self) -> Result<Value> {
        let text = fs::read_to_string(self.folder.join("agent/attachments.json"))?;
        Ok(serde_json::from_str(&text)?)
    }

    /// What its programs have said last, for people.
    pub(crate) fn last_words(&self) -> String {
        let own = [&self.proxy, &self.adapter, &self.agent].into_iter().flatten();
        let all = own
            .chain(&self.beside)
            .map(|process| format!("---- {}\n{}", process.name(), process.stderr()));
        all.collect::<Vec<_>>().join("\n")
    }

    fn adapter_address(&self) -> SocketAddr {
        SocketAddr::new(management(self.index, 1), ADAPTER_PORT)
    }

    fn adapter_name(&self) -> String {
        format!("adapter.{}", kubelet::node_name(self.index))
    }
}

/// Objects as one `List`.
pub(crate) fn list(items: Vec<Value>) -> String {
    json!({"apiVersion": "v1", "kind": "List", "items": items}).to_string()
}

fn dpu(index: usize) -> DpuId {
    DpuId(format!("dpu-{}", index + 1))
}

/// What its pods have addresses from.
pub(crate) fn subnet(index: usize) -> Result<IpNet> {
    Ok(IpNet::new(Ipv4Addr::new(10, 244, index as u8 + 1, 0).into(), 24)?)
}

/// Its tunnel endpoint.
pub(crate) fn vtep(index: usize) -> IpAddr {
    Ipv4Addr::new(192, 0, 2, index as u8 + 1).into()
}

fn management(index: usize, end: u8) -> IpAddr {
    Ipv4Addr::new(169, 254, 100 + index as u8, end).into()
}

fn dataplane_address(index: usize) -> SocketAddr {
    SocketAddr::new(management(index, 2), CHANNEL_PORT)
}

/// One of our programs: this executable with its name as first argument.
fn ourselves(program: &str) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg(program);
    command
}

/// Programs of ours that are built beside this one.
const PROGRAMS: [&str; 3] = ["istio-dpu-adapter", "istio-dpu-controller", "dpu-keys"];

/// Has cargo build [`PROGRAMS`] where cargo runs this, so that they are as new as it is.
pub(crate) fn build() -> Result<()> {
    let Some(cargo) = std::env::var_os("CARGO") else {
        return Ok(());
    };
    let mut command = Command::new(cargo);
    command
        .args(["build", "--quiet", "-p", "dpumesh-xds", "--bins"])
        .current_dir(env!("CARGO_MANIFEST_DIR"));
    if !cfg!(debug_assertions) {
        command.arg("--release");
    }
    let status = command.status()?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("cargo build -p dpumesh-xds --bins: {status}").into())
    }
}

/// What is not built of [`PROGRAMS`], and how to build it.
pub(crate) fn missing() -> Option<String> {
    let absent = PROGRAMS.into_iter().find(|name| program(name).is_err())?;
    let release = if cfg!(debug_assertions) { "" } else { "--release " };
    Some(format!(
        "{absent} is not built: cargo build {release}-p dpumesh-xds --bins"
    ))
}

/// One of [`PROGRAMS`].
pub(crate) fn program(name: &str) -> Result<Command> {
    let here = std::env::current_exe()?;
    let built = here
        .parent()
        .and_then(Path::parent)
        .map(|folder| folder.join(name));
    let built = built.filter(|path| path.is_file());
    built
        .map(Command::new)
        .ok_or_else(|| format!("{name} is not built").into())
}

/// Starts the controller beside the apiserver, and has the apiserver ask it about new pods.
fn start_controller(control: &ControlPlane, authority: &Authority, run: &Run) -> Result<Process> {
    let address = IpAddr::from(peers::ADDRESS);
    let own = authority.issue(
        &run.folder().join("controller"),
        "istio-dpu-controller",
        Some(address),
    )?;
    let webhook = SocketAddr::new(address, WEBHOOK_PORT);
    let mut command = program("istio-dpu-controller")?;
    command
        .args(["--kubeconfig", control.variable("KUBECONFIG")?])
        .args(["--listen", &SocketAddr::new(address, CONTROLLER_PORT).to_string()])
        .args(["--webhook", &webhook.to_string()]);
    command
        .arg("--tls-cert")
        .arg(&own.cert)
        .arg("--tls-key")
        .arg(&own.key)
        .arg("--tls-client-ca")
        .arg(&own.ca);
    let mut controller = Process::start(run, "istio-dpu-controller", &control.namespace, command)?;
    controller.wait_for_line("ready", PATIENCE)?;
    let mut print = program("istio-dpu-controller")?;
    print.arg("--print-webhook").arg("--webhook-ca").arg(&own.ca);
    print.args(["--webhook-url", &format!("https://{webhook}")]);
    let registration = Process::output(run, "istio-dpu-controller", &control.namespace, print, PATIENCE)?;
    control.apply(&registration)?;
    Ok(controller)
}

fn configure(namespace: &Namespace, name: &str, address: IpAddr, length: u8) -> Result<LinkIndex> {
    let mut netlink = Netlink::open_in(namespace)?;
    let link = netlink.link(name)?.index;
    netlink.change_link(link, &LinkChange::new().up())?;
    let net = IpNet::new(address, length)?;
    netlink.add_address(&Address { link, net })?;
    Ok(link)
}

/// The links of a host: to the control plane, and to its SoC.
fn manage(index: usize, control: &Namespace, host: &Namespace, soc: &Namespace) -> Result<()> {
    link_to_control(index, control, host)?;
    Netlink::open_in(host)?.create_veth(
        &VethEnd::new(MANAGEMENT).in_namespace(host),
        &VethEnd::new(MANAGEMENT).in_namespace(soc),
    )?;
    configure(host, MANAGEMENT, management(index, 1), 30)?;
    configure(soc, MANAGEMENT, management(index, 2), 30)?;
    Ok(())
}

/// The link of a machine to the control plane.
pub(crate) fn link_to_control(index: usize, control: &Namespace, host: &Namespace) -> Result<()> {
    let node = index as u8 + 1;
    let far = format!("host-{node}");
    Netlink::open_in(host)?.create_veth(
        &VethEnd::new(CONTROL).in_namespace(host),
        &VethEnd::new(&far).in_namespace(control),
    )?;
    configure(control, &far, Ipv4Addr::new(10, 90, node, 1).into(), 30)?;
    let link = configure(host, CONTROL, Ipv4Addr::new(10, 90, node, 2).into(), 30)?;
    let route = Route::new(IpNet::from(IpAddr::from(peers::ADDRESS)));
    let route = route.via(Ipv4Addr::new(10, 90, node, 1).into()).on(link);
    Netlink::open_in(host)?.add_route(&route)?;
    Ok(())
}

/// The cable between the SoCs, by which their tunnel endpoints reach each other.
fn join(one: &Namespace, two: &Namespace) -> Result<()> {
    Netlink::open_in(one)?.create_veth(
        &VethEnd::new(WIRE).in_namespace(one),
        &VethEnd::new(WIRE).in_namespace(two),
    )?;
    for (index, namespace) in [one, two].into_iter().enumerate() {
        address(index, namespace)?;
    }
    Ok(())
}

/// A port of the fabric for a machine's uplink.
pub(crate) fn plug_in(index: usize, fabric: &Namespace, machine: &Namespace, run: &Run) -> Result<()> {
    let port = format!("node-{}", index + 1);
    Netlink::open_in(fabric)?.create_veth(
        &VethEnd::new(&port).in_namespace(fabric),
        &VethEnd::new(WIRE).in_namespace(machine),
    )?;
    ordinary::tool(run, fabric, "ip", &format!("link set {port} master {FABRIC} up"))?;
    if index == ORDINARY {
        configure(machine, "lo", vtep(index), 32)?;
    }
    address(index, machine)
}

/// An uplink's address, and the ways to the others' tunnel endpoints.
fn address(index: usize, machine: &Namespace) -> Result<()> {
    let end = |index: usize| IpAddr::from(Ipv4Addr::new(192, 0, 3, index as u8 + 1));
    let link = configure(machine, WIRE, end(index), 24)?;
    let mut netlink = Netlink::open_in(machine)?;
    for other in (0..=ORDINARY).filter(|other| *other != index) {
        netlink.add_route(&Route::new(IpNet::from(vtep(other))).via(end(other)).on(link))?;
    }
    Ok(())
}

fn card(index: usize, folder: &Path, host: &Namespace, fabric: &Namespace) -> Result<TapBackend> {
    let mode = Mode::Overlay { vtep: vtep(index) };
    let mut options = TapOptions::new(folder.join("card"), dpu(index).0, Role::Host, mode);
    options.vf_kind = VfKind::available();
    options.host_namespace = Some(host.path());
    options.fabric_namespace = Some(fabric.path());
    Ok(TapBackend::open(options, None, None)?)
}

fn start_dataplane(
    index: usize,
    folder: &Path,
    soc: &Namespace,
    stack: &Namespace,
    fabric: &Namespace,
    run: &Run,
) -> Result<Process> {
    let mut command = ourselves("dpu-dataplane");
    command
        .args(["--dpu", &dpu(index).0, "--vtep", &vtep(index).to_string()])
        .args([
            "--listen",
            &dataplane_address(index).to_string(),
            "--congestion",
            "cubic",
        ])
        .args([
            "--proxy-port",
            &OUTBOUND.to_string(),
            "--inbound-port",
            &INBOUND.to_string(),
        ])
        .args(["--log-level", "warn"])
        .arg("--card")
        .arg(folder.join("card"))
        .arg("--fabric-netns")
        .arg(fabric.path())
        .arg("--stack-netns")
        .arg(stack.path())
        .arg("--credentials")
        .arg(folder.join("dataplane-credentials"));
    let mut dataplane = Process::start(run, &format!("dpu-dataplane-{}", index + 1), soc, command)?;
    dataplane.wait_for_line("ready", PATIENCE)?;
    Ok(dataplane)
}
