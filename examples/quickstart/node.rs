//! Two emulated nodes: their namespaces, links, processes and pods.
//!
//! ```text
//!   host-1 ──mgmt── soc-1 ──── wire ──── soc-2 ──mgmt── host-2
//!             dpu-dataplane │ dpu-proxy      │
//!                        stack-1          stack-2
//!   pod ─VF─┘ (the VF's frames go to soc-1's dataplane, whatever namespace the pod is in)
//! ```
//! With veth VFs each node has one more namespace, for the card's ends of the pairs: the silicon between VFs and SoC.
//! All namespaces are anonymous: they live by descriptors of this process and go with it.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use dpumesh_cni::rules::{self, GATEWAY, Network, Pod};
use dpumesh_core::steering::{Atomicity, Owner, SteeringRule};
use dpumesh_core::vf::{Attachment as VfAttachment, VfConfig, VfLease, VfRequest};
use dpumesh_core::{BackendExt, DpuId, FlowSteeringExt, MacAddr, Mtu, PfIndex, Role, Vni};
use dpumesh_examples::children::{Process, Run};
use dpumesh_hw::channel::trust::{Authority, Credentials, Party};
use dpumesh_hw::channel::{Attachment, Dataplane, DataplaneClient};
use dpumesh_hw::netlink::{Address, LinkChange, LinkIndex, Netlink, Route, RouteMetrics, VethEnd};
use dpumesh_hw::netns::Namespace;
use dpumesh_tap::{Mode, Profile, TapBackend, TapOptions, VfKind};
use ipnet::IpNet;
use tokio::runtime::Runtime;

use super::mesh;
use super::trust::{self, SecretFiles};

/// Anything that keeps a node from working; said once, with what was tried.
pub(crate) type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// What the nodes shall be like.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) overlay: bool,
    pub(crate) pods_per_node: u16,
    pub(crate) profile: Profile,
    pub(crate) vf_kind: VfKind,
}

/// Name of the VF in a pod.
pub(crate) const POD_INTERFACE: &str = "mesh0";
/// Name of the network device on a SoC.
pub(crate) const WIRE: &str = "wire0";
const MANAGEMENT: &str = "mgmt0";
const CHANNEL_PORT: u16 = 7070;
/// VFs are made for more pods than there are, so that one can join.
const SPARE_VFS: u16 = 1;
/// How long a program may take until it serves.
const PATIENCE: Duration = Duration::from_secs(20);

/// Both nodes.
#[derive(Debug)]
pub(crate) struct Nodes {
    pub(crate) all: Vec<Node>,
    pub(crate) network: Network,
    pub(crate) plan: Plan,
    /// Signs the proxies' certificates.
    pub(crate) authority: trust::Authority,
    run: Arc<Run>,
}

/// One node.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) index: usize,
    pub(crate) own: Namespaces,
    pub(crate) pods: Vec<RunningPod>,
    pub(crate) dataplane: Process,
    pub(crate) proxy: Option<Process>,
    pub(crate) client: DataplaneClient,
    folder: PathBuf,
    dpu: DpuId,
    card: TapBackend,
    credentials: Credentials,
    /// Runs the agent's calls; its threads live in the host's namespace.
    runtime: Runtime,
}

/// The namespaces of a node, pods' aside.
#[derive(Debug)]
pub(crate) struct Namespaces {
    host: Namespace,
    pub(crate) soc: Namespace,
    pub(crate) stack: Namespace,
    /// For the card's ends of veth devices: it must be empty else, and outlive the dataplane.
    fabric: Namespace,
}

impl Namespaces {
    fn create() -> Result<Self> {
        Ok(Self {
            host: Namespace::create()?,
            soc: Namespace::create()?,
            stack: Namespace::create()?,
            fabric: Namespace::create()?,
        })
    }
}

/// A pod with its namespace and lease.
#[derive(Debug)]
pub(crate) struct RunningPod {
    pub(crate) pod: Pod,
    pub(crate) namespace: Namespace,
    pub(crate) lease: VfLease,
}

impl Nodes {
    /// Makes both nodes, their pods and rules, and starts their dataplanes and proxies.
    pub(crate) fn start(plan: Plan, run: Arc<Run>, progress: impl Fn(&str)) -> Result<Self> {
        progress("namespaces and links");
        let namespaces: Vec<Namespaces> = (0..2).map(|_| Namespaces::create()).collect::<Result<_>>()?;
        let macs = wire(&namespaces[0].soc, &namespaces[1].soc, plan.overlay)?;
        let network = if plan.overlay {
            Network::Overlay {
                vteps: (0..2).map(vtep).collect(),
                vni: Vni::try_from(42)?,
            }
        } else {
            Network::Underlay { macs }
        };
        let mut all = Vec::new();
        for (index, own) in namespaces.into_iter().enumerate() {
            progress(&format!("node {}: card, dataplane and channel", index + 1));
            all.push(Node::start(index, own, &plan, &run)?);
        }
        let mut nodes = Self {
            all,
            network,
            plan,
            authority: trust::Authority::new()?,
            run,
        };
        for index in 0..nodes.all.len() {
            for pod in 0..nodes.plan.pods_per_node {
                progress(&format!("node {}: pod {}", index + 1, pod + 1));
                nodes.all[index].add_pod(pod, &nodes.plan)?;
            }
        }
        progress("steering rules");
        nodes.apply_rules()?;
        for index in 0..nodes.all.len() {
            progress(&format!("node {}: proxy", index + 1));
            nodes.start_proxy(index)?;
        }
        Ok(nodes)
    }

    /// Every pod that there is.
    pub(crate) fn pods(&self) -> Vec<Pod> {
        self.all
            .iter()
            .flat_map(|node| node.pods.iter().map(|running| running.pod.clone()))
            .collect()
    }

    /// Pod `pod` of node `node`.
    pub(crate) fn pod(&self, node: usize, pod: usize) -> &RunningPod {
        &self.all[node].pods[pod]
    }

    /// Makes each node's rules what its pods ask for.
    pub(crate) fn apply_rules(&self) -> Result<()> {
        let pods = self.pods();
        for node in &self.all {
            node.apply(rules::rules(node.index, &pods, &self.network))?;
        }
        Ok(())
    }

    /// Starts (again) the proxy of a node and waits until it serves.
    pub(crate) fn start_proxy(&mut self, index: usize) -> Result<()> {
        let (local, remote) = (self.pod(index, 1).pod.clone(), self.pod(1 - index, 1).pod.clone());
        let node = &mut self.all[index];
        self.authority.issue(&trust::identity(index), &node.secrets())?;
        let file = node.folder.join("proxy.json");
        fs::write(node.routes(), mesh::routes().to_string())?;
        let bootstrap = mesh::bootstrap(index, &local, &remote, &node.routes(), &node.secrets());
        fs::write(&file, serde_json::to_string_pretty(&bootstrap)?)?;
        let mut command = ourselves("dpu-proxy");
        command
            .arg("--config-path")
            .arg(&file)
            .arg("--stack-netns")
            .arg(node.own.stack.path());
        command.args(["--concurrency", "1", "--log-level", "warn"]);
        let mut proxy = Process::start(
            &self.run,
            &format!("dpu-proxy-{}", index + 1),
            &node.own.soc,
            command,
        )?;
        proxy.wait_for_port(
            &node.own.soc,
            (Ipv4Addr::LOCALHOST, mesh::ADMIN_PORT).into(),
            PATIENCE,
        )?;
        node.proxy = Some(proxy);
        Ok(())
    }

    /// Starts a dataplane again that has ended, and replays leases and rules.
    pub(crate) fn restart_dataplane(&mut self, index: usize) -> Result<()> {
        let plan = self.plan.clone();
        let pods = self.pods();
        let node = &mut self.all[index];
        node.dataplane = start_dataplane(index, &node.own, &node.folder, &plan, &self.run)?;
        node.client = connect(&node.runtime, index, &node.dpu, &node.credentials)?;
        for running in &node.pods {
            node.attach(running)?;
        }
        node.apply(rules::rules(index, &pods, &self.network))
    }
}

impl Node {
    fn start(index: usize, own: Namespaces, plan: &Plan, run: &Run) -> Result<Self> {
        let folder = run.folder().join(format!("node-{}", index + 1));
        fs::create_dir_all(&folder)?;
        management(index, &own.host, &own.soc)?;
        let dpu = dpu_name(index);
        let authority = Authority::new(dpu.clone())?;
        authority
            .issue(Party::Dataplane)?
            .write(&folder.join("dataplane-credentials"))?;
        let credentials = authority.issue(Party::Agent)?;
        let card = open_card(index, &own, &folder, plan)?;
        let runtime = host_runtime(&own.host)?;
        let vfs = plan.pods_per_node + SPARE_VFS;
        runtime.block_on(card.require_vf()?.set_vf_count(card.fence(), PfIndex(0), vfs))?;
        let dataplane = start_dataplane(index, &own, &folder, plan, run)?;
        let client = connect(&runtime, index, &dpu, &credentials)?;
        Ok(Self {
            index,
            own,
            pods: Vec::new(),
            dataplane,
            proxy: None,
            client,
            folder,
            dpu,
            card,
            credentials,
            runtime,
        })
    }

    /// Gives a new pod a VF, addresses and routes: closed until there are rules for it.
    pub(crate) fn add_pod(&mut self, number: u16, plan: &Plan) -> Result<()> {
        let namespace = Namespace::create()?;
        let name = format!("pod-{}-{}", self.index + 1, number + 1);
        let addresses = pod_addresses(self.index, number);
        let mac = MacAddr([0x02, 0xd6, 0, 0, self.index as u8 + 1, number as u8 + 1]);
        let config = VfConfig {
            mac: Some(mac),
            mtu: Some(pod_mtu(plan)?),
            ..VfConfig::default()
        };
        let vf = self.card.require_vf()?;
        let request = VfRequest::new(name.clone()).with_config(config);
        let lease = self.runtime.block_on(vf.lease(self.card.fence(), &request))?;
        let place = VfAttachment::Netns {
            path: namespace.path(),
            ifname: POD_INTERFACE.to_owned(),
        };
        let attached = self
            .runtime
            .block_on(vf.attach(self.card.fence(), &lease, &place))?;
        let pod = Pod {
            name,
            node: self.index,
            port: lease.port,
            mac: attached.mac,
            addresses,
        };
        let running = RunningPod {
            pod,
            namespace,
            lease,
        };
        self.attach(&running)?;
        configure_pod(&running)?;
        self.pods.push(running);
        Ok(())
    }

    /// Takes a pod away: its port closes, its VF goes back.
    pub(crate) fn remove_pod(&mut self, number: usize) -> Result<()> {
        let running = self.pods.remove(number);
        self.runtime
            .block_on(self.client.detach(self.client.fence(), &running.lease))?;
        let vf = self.card.require_vf()?;
        let level = dpumesh_core::vf::ResetLevel::Config;
        self.runtime
            .block_on(vf.release(self.card.fence(), &running.lease, level))?;
        Ok(())
    }

    fn attach(&self, running: &RunningPod) -> Result<()> {
        let attachment = Attachment {
            lease: running.lease.clone(),
            mac: running.pod.mac,
            addresses: running.pod.addresses.clone(),
            gateway: GATEWAY,
            ingress: rules::ingress(&running.pod),
        };
        self.ask(self.client.attach(self.client.fence(), &attachment))
    }

    fn apply(&self, rules: Vec<SteeringRule>) -> Result<()> {
        let fence = self.client.fence();
        let replace = self
            .client
            .steering()
            .replace(fence, Owner::Agent, rules, Atomicity::Rollback);
        self.ask(replace)?.into_result()?;
        Ok(())
    }

    /// Whether the dataplane takes a peer that claims to be the agent of `dpu` with these credentials.
    pub(crate) fn knock(&self, dpu: &DpuId, credentials: &Credentials) -> Result<()> {
        connect(&self.runtime, self.index, dpu, credentials).map(drop)
    }

    /// The card of this node, by name.
    pub(crate) fn dpu(&self) -> &DpuId {
        &self.dpu
    }

    /// The agent's own credentials.
    pub(crate) fn credentials(&self) -> &Credentials {
        &self.credentials
    }

    /// Makes a call of the agent; the channel's connection lives on the host's threads.
    pub(crate) fn ask<T>(&self, call: impl Future<Output = dpumesh_core::Result<T>>) -> Result<T> {
        Ok(self.runtime.block_on(call)?)
    }

    /// The files with the proxy's secrets.
    pub(crate) fn secrets(&self) -> SecretFiles {
        SecretFiles::within(&self.folder)
    }

    /// What the proxy's admin server answers for a path.
    pub(crate) fn ask_proxy(&self, path: &str) -> Result<String> {
        let answer = self.own.soc.run(|| get_admin(path))??;
        let (_, body) = answer
            .split_once("\r\n\r\n")
            .ok_or("no answer from the admin server")?;
        Ok(body.to_owned())
    }

    /// The file with the routes that the proxy watches.
    pub(crate) fn routes(&self) -> PathBuf {
        self.folder.join("routes.json")
    }

    /// Process ids of dataplane and proxy.
    pub(crate) fn processes(&self) -> (u32, Option<u32>) {
        (self.dataplane.id(), self.proxy.as_ref().map(Process::id))
    }
}

/// The fence of a remote dataplane.
trait Fenced {
    fn fence(&self) -> dpumesh_core::Fence;
}

impl Fenced for DataplaneClient {
    fn fence(&self) -> dpumesh_core::Fence {
        dpumesh_core::Fence(self.epoch())
    }
}

fn dpu_name(index: usize) -> DpuId {
    DpuId(format!("dpu-{}", index + 1))
}

fn vtep(index: usize) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(192, 0, 2, index as u8 + 1))
}

fn pod_addresses(node: usize, pod: u16) -> Vec<IpAddr> {
    let (node, pod) = (node as u16 + 1, pod + 1);
    vec![
        IpAddr::V4(Ipv4Addr::new(10, 244, node as u8, pod as u8)),
        IpAddr::V6(Ipv6Addr::new(0xfd00, 0x244, node, 0, 0, 0, 0, pod)),
    ]
}

/// In overlay mode the encapsulation takes its share; in underlay mode pods keep to the network's MTU here.
fn pod_mtu(plan: &Plan) -> Result<Mtu> {
    let overhead = if plan.overlay { 50 } else { 0 };
    Mtu::ETHERNET
        .minus(overhead)
        .ok_or_else(|| "no room for the encapsulation".into())
}

/// The cable between the SoCs. Returns the MACs of its ends.
fn wire(one: &Namespace, two: &Namespace, overlay: bool) -> Result<Vec<MacAddr>> {
    let macs: Vec<MacAddr> = (1..3).map(|end| MacAddr([0x02, 0xd5, 0, 0, 0, end])).collect();
    let ends = [(one, macs[0]), (two, macs[1])];
    let [near, far] =
        ends.map(|(namespace, mac)| VethEnd::new(WIRE).in_namespace(namespace).mac(mac.0).mtu(1500));
    Netlink::open_in(one)?.create_veth(&near, &far)?;
    for (index, (namespace, _)) in ends.into_iter().enumerate() {
        let mut netlink = Netlink::open_in(namespace)?;
        let link = netlink.link(WIRE)?;
        netlink.change_link(link.index, &LinkChange::new().up())?;
        if overlay {
            netlink.add_address(&on(link.index, vtep(index), 24)?)?;
        }
    }
    Ok(macs)
}

/// The management link between host and SoC: the only way between them.
fn management(index: usize, host: &Namespace, soc: &Namespace) -> Result<()> {
    let near = VethEnd::new(MANAGEMENT).in_namespace(host);
    let far = VethEnd::new(MANAGEMENT).in_namespace(soc);
    Netlink::open_in(host)?.create_veth(&near, &far)?;
    for (namespace, end) in [(host, 1), (soc, 2)] {
        let mut netlink = Netlink::open_in(namespace)?;
        let link = netlink.link(MANAGEMENT)?;
        netlink.change_link(link.index, &LinkChange::new().up())?;
        netlink.add_address(&on(link.index, management_address(index, end), 30)?)?;
    }
    Ok(())
}

fn management_address(index: usize, end: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(169, 254, 100 + index as u8, end))
}

fn on(link: LinkIndex, address: IpAddr, length: u8) -> Result<Address> {
    Ok(Address {
        link,
        net: IpNet::new(address, length)?,
    })
}

fn open_card(index: usize, own: &Namespaces, folder: &Path, plan: &Plan) -> Result<TapBackend> {
    let mut options = TapOptions::new(
        folder.join("card"),
        dpu_name(index).0,
        Role::Host,
        mode(index, plan),
    );
    options.profile = plan.profile;
    options.vf_kind = plan.vf_kind;
    options.host_namespace = Some(own.host.path());
    options.fabric_namespace = Some(own.fabric.path());
    Ok(TapBackend::open(options, None, None)?)
}

fn mode(index: usize, plan: &Plan) -> Mode {
    if plan.overlay {
        Mode::Overlay { vtep: vtep(index) }
    } else {
        Mode::Underlay {
            ifname: WIRE.to_owned(),
        }
    }
}

/// A runtime whose connections leave from the host's namespace.
fn host_runtime(host: &Namespace) -> Result<Runtime> {
    let host = host.try_clone()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .on_thread_start(move || {
            if let Err(error) = host.enter_thread() {
                eprintln!("agent: {error}");
            }
        })
        .build()?;
    Ok(runtime)
}

fn connect(
    runtime: &Runtime,
    index: usize,
    dpu: &DpuId,
    credentials: &Credentials,
) -> Result<DataplaneClient> {
    let address = format!("{}:{CHANNEL_PORT}", management_address(index, 2));
    let (dpu, credentials) = (dpu.clone(), credentials.clone());
    // Spawned, so that the connection is made by a thread in the host's namespace.
    let connected =
        runtime.spawn(async move { DataplaneClient::connect(&address, &dpu, &credentials).await });
    Ok(runtime.block_on(connected)??)
}

fn start_dataplane(index: usize, own: &Namespaces, folder: &Path, plan: &Plan, run: &Run) -> Result<Process> {
    let mut command = ourselves("dpu-dataplane");
    command.args([
        "--dpu",
        &dpu_name(index).0,
        "--profile",
        plan.profile.name(),
        "--log-level",
        "warn",
    ]);
    command.arg("--card").arg(folder.join("card"));
    command.args(["--vf-device", vf_device(plan.vf_kind)]);
    command.arg("--fabric-netns").arg(own.fabric.path());
    command.arg("--stack-netns").arg(own.stack.path());
    command
        .arg("--credentials")
        .arg(folder.join("dataplane-credentials"));
    command.args(["--congestion", "cubic"]);
    let listen = SocketAddr::new(management_address(index, 2), CHANNEL_PORT);
    command.args(["--listen", &listen.to_string()]);
    match mode(index, plan) {
        Mode::Overlay { vtep } => command.args(["--vtep", &vtep.to_string()]),
        Mode::Underlay { ifname } => command.args(["--uplink", &ifname]),
    };
    let mut dataplane = Process::start(run, &format!("dpu-dataplane-{}", index + 1), &own.soc, command)?;
    dataplane.wait_for_line("ready", PATIENCE)?;
    Ok(dataplane)
}

/// The dataplane's word for what stands for a VF.
const fn vf_device(kind: VfKind) -> &'static str {
    match kind {
        VfKind::Tap => "tap",
        VfKind::Veth => "veth",
    }
}

/// One of our programs: this executable with its name as first argument.
fn ourselves(program: &str) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg(program);
    command
}

/// Addresses and routes of a pod: everything goes to the router behind the VF.
fn configure_pod(running: &RunningPod) -> Result<()> {
    let mut netlink = Netlink::open_in(&running.namespace)?;
    let link = netlink.link(POD_INTERFACE)?;
    netlink.change_link(link.index, &LinkChange::new().up())?;
    for address in &running.pod.addresses {
        let (length, gateway, default) = match address {
            IpAddr::V4(_) => (32, "169.254.1.1".parse()?, Route::default_v4()),
            IpAddr::V6(_) => (128, "fe80::1".parse()?, Route::default_v6()),
        };
        netlink.add_address(&on(link.index, *address, length)?)?;
        let metrics = RouteMetrics {
            congestion: Some("cubic".to_owned()),
            ..RouteMetrics::default()
        };
        netlink.replace_route(&default.via(gateway).onlink().on(link.index).metrics(metrics))?;
    }
    Ok(())
}

/// Asks the admin server of the namespace that the thread is in.
fn get_admin(path: &str) -> std::io::Result<String> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, mesh::ADMIN_PORT));
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: admin\r\nConnection: close\r\n\r\n"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}
