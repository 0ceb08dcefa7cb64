//! [`Kubelet`]: plays a node's kubelet and container runtime: objects through the Kubernetes API, the network through the CNI
//! protocol, processes in the pod's namespace.

use std::io::Write;
use std::net::IpAddr;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use dpumesh_hw::netns::Namespace;
use ipnet::IpNet;
use serde_json::{Value, json};

use super::Result;
use super::peers::ControlPlane;
use super::sidecar;

/// Where delegated plugins are.
const DELEGATED: &str = "/usr/lib/cni";
/// Name of the pod's interface.
const INTERFACE: &str = "eth0";

/// Index of the node without a DPU.
pub(crate) const ORDINARY: usize = 2;

/// A pod as its user writes it.
#[derive(Clone, Debug)]
pub(crate) struct PodSpec {
    pub(crate) name: String,
    pub(crate) app: &'static str,
    pub(crate) version: &'static str,
    /// Index of its node.
    pub(crate) node: usize,
}

/// The namespace that everything is in.
pub(crate) const NAMESPACE: &str = "shop";
/// Port of the pods' servers.
pub(crate) const HTTP_PORT: u16 = 8080;

impl PodSpec {
    /// A pod of a deployment's kind: its account is named as its app.
    pub(crate) fn new(name: &str, app: &'static str, version: &'static str, node: usize) -> Self {
        Self {
            name: name.to_owned(),
            app,
            version,
            node,
        }
    }

    /// Its labels. Its user says one word about DPUs, the label that opts in. That of a pod with a sidecar is what injection writes.
    pub(crate) fn labels(&self) -> Value {
        let mut labels = json!({"app": self.app, "version": self.version});
        if self.node == ORDINARY {
            labels["security.istio.io/tlsMode"] = "istio".into();
            labels[sidecar::LABEL.0] = sidecar::LABEL.1.into();
        } else {
            labels["dpumesh.io/dataplane"] = "dpu".into();
        }
        labels
    }

    /// As a Kubernetes object.
    pub(crate) fn object(&self) -> Value {
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": self.name, "namespace": NAMESPACE, "labels": self.labels()},
            "spec": {
                "nodeName": node_name(self.node), "serviceAccountName": self.app,
                "containers": [{"name": "app", "image": "none", "ports": [{"containerPort": HTTP_PORT}]}]},
        })
    }
}

/// What a node is called.
pub(crate) fn node_name(index: usize) -> String {
    format!("node-{}", index + 1)
}

/// A node as a Kubernetes object.
pub(crate) fn node_object(index: usize, tunnel_endpoint: IpAddr) -> Value {
    let name = node_name(index);
    json!({"apiVersion": "v1", "kind": "Node", "metadata": {
        "name": name, "labels": {"kubernetes.io/hostname": name},
        "annotations": {"dpumesh.io/tunnel-endpoint": tunnel_endpoint.to_string()}}})
}

/// A pod that runs.
#[derive(Debug)]
pub(crate) struct RunningPod {
    pub(crate) spec: PodSpec,
    pub(crate) namespace: Namespace,
    pub(crate) address: IpAddr,
    container: String,
    result: Value,
}

impl RunningPod {
    /// One whose network our plugin has no part in.
    pub(crate) fn without_plugin(spec: PodSpec, namespace: Namespace, address: IpAddr) -> Self {
        Self {
            spec,
            namespace,
            address,
            container: String::new(),
            result: Value::Null,
        }
    }
}

/// A node's kubelet.
#[derive(Debug)]
pub(crate) struct Kubelet {
    /// The plugin by its name, as a runtime looks for it.
    plugin: PathBuf,
    conf: Value,
}

impl Kubelet {
    /// Makes the folders of a node's runtime. `subnet` are its pods' addresses.
    pub(crate) fn new(folder: &Path, agent: &Path, subnet: IpNet) -> Result<Self> {
        let programs = folder.join("cni");
        std::fs::create_dir_all(&programs)?;
        let plugin = programs.join("istio-dpu-cni");
        symlink(std::env::current_exe()?, &plugin)?;
        let conf = json!({
            "cniVersion": "1.0.0", "name": "mesh", "type": "istio-dpu-cni",
            "agentSocket": agent,
            "ipam": {"type": "host-local", "dataDir": folder.join("ipam"), "ranges": [[{"subnet": subnet}]],
                     "routes": [{"dst": "0.0.0.0/0"}]},
        });
        Ok(Self { plugin, conf })
    }

    /// Gives a pod that is in the API its network: closed or governed, as the plugin says.
    pub(crate) fn add(&self, spec: &PodSpec, uid: &str, host: &Namespace) -> Result<RunningPod> {
        let namespace = Namespace::create()?;
        let container = format!("{}-{}", spec.name, namespace.id().inode());
        let result = self.call("ADD", host, &container, spec, uid, Some(&namespace), None)?;
        let text = result["ips"][0]["address"]
            .as_str()
            .ok_or("the plugin told no address")?;
        let address = text.parse::<IpNet>()?.addr();
        Ok(RunningPod {
            spec: spec.clone(),
            namespace,
            address,
            container,
            result,
        })
    }

    /// Takes its network away.
    pub(crate) fn remove(&self, pod: &RunningPod, host: &Namespace) -> Result<()> {
        let container = &pod.container;
        let netns = Some(&pod.namespace);
        self.call("DEL", host, container, &pod.spec, "", netns, Some(&pod.result))?;
        Ok(())
    }

    #[allow(clippy::too_many_arguments, reason = "the words of one CNI call")]
    fn call(
        &self,
        verb: &str,
        host: &Namespace,
        container: &str,
        spec: &PodSpec,
        uid: &str,
        netns: Option<&Namespace>,
        previous: Option<&Value>,
    ) -> Result<Value> {
        let mut conf = self.conf.clone();
        if let Some(previous) = previous {
            conf["prevResult"] = previous.clone();
        }
        let mut arguments = format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE={NAMESPACE};K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID={container}",
            spec.name
        );
        if !uid.is_empty() {
            arguments.push_str(&format!(";K8S_POD_UID={uid}"));
        }
        let mut command = Command::new(&self.plugin);
        command
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("CNI_COMMAND", verb)
            .env("CNI_PATH", DELEGATED)
            .env("CNI_CONTAINERID", container)
            .env("CNI_NETNS", netns.map(Namespace::path).unwrap_or_default())
            .env("CNI_IFNAME", INTERFACE)
            .env("CNI_ARGS", arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = host.spawn(command)?;
        let mut stdin = child.stdin.take().ok_or("the plugin reads nothing")?;
        stdin.write_all(conf.to_string().as_bytes())?;
        drop(stdin);
        let output = child.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stdout);
        if !output.status.success() {
            let words = String::from_utf8_lossy(&output.stderr);
            return Err(format!("CNI {verb} of {}: {said} {words}", spec.name).into());
        }
        Ok(serde_json::from_str(&said).unwrap_or(Value::Null))
    }
}

/// What a kubelet writes once a pod's processes run.
pub(crate) fn publish(control: &ControlPlane, pod: &RunningPod) -> Result<()> {
    let condition = |kind: &str| json!({"type": kind, "status": "True"});
    let all = ["Initialized", "ContainersReady", "PodScheduled", "Ready"].map(condition);
    let ip = pod.address.to_string();
    let status =
        json!({"status": {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}], "conditions": all}});
    let (name, patch) = (&pod.spec.name, status.to_string());
    control.kubectl(&[
        "patch",
        "pod",
        name,
        "-n",
        NAMESPACE,
        "--subresource=status",
        "--type=merge",
        "-p",
        &patch,
    ])?;
    Ok(())
}
