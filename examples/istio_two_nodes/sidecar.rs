//! [`Sidecar`]: an ordinary sidecar: stock Envoy in the pod's namespace, configured by istiod, with the pod's own token and key.
//!
//! What Istio's image does by `istio-iptables` and its agent is done here by iptables and `dpu-keys --istiod`. Stock Envoy lacks Istio's own
//! filters, so an EnvoyFilter takes them out of the configurations of these pods, and of no others.

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use dpumesh_examples::children::{Process, Run};
use serde_json::{Value, json};

use super::Result;
use super::envoy::{self, ADMIN_PORT};
use super::kubelet::{NAMESPACE, RunningPod};
use super::node;
use super::ordinary::tool;
use super::peers::ControlPlane;

/// The label of pods that have a stock Envoy as their sidecar.
pub(crate) const LABEL: (&str, &str) = ("sidecar", "stock-envoy");
/// The group that both programs run as: what they send is not captured.
const GROUP: u32 = 1337;
/// How long a program may take until it serves.
const PATIENCE: Duration = Duration::from_secs(30);

/// Envoy and the keeper of its keys.
#[derive(Debug)]
pub(crate) struct Sidecar {
    /// Whose.
    pub(crate) pod: String,
    pub(crate) envoy: Process,
    keys: Process,
}

impl Sidecar {
    /// Captures the pod's TCP and starts both.
    pub(crate) fn start(
        pod: &RunningPod,
        uid: &str,
        folder: &Path,
        control: &ControlPlane,
        run: &Run,
    ) -> Result<Self> {
        fs::create_dir_all(folder)?;
        let name = &pod.spec.name;
        // Before anything connects: of a connection that is older than the rules, the answers would be captured.
        capture(pod, run)?;
        let token = token(pod, uid, control)?;
        let token_file = folder.join("token");
        fs::write(&token_file, &token)?;
        let (istiod, root) = (
            control.variable("ISTIOD_SECURE_GRPC")?,
            Path::new(control.variable("ISTIOD_ROOT")?),
        );
        let sds = folder.join("sds.sock");
        let mut keys = node::program("dpu-keys")?;
        keys.gid(GROUP)
            .args(["--istiod", istiod, "--log-level", "warn"])
            .args([
                "--identity",
                &format!("spiffe://cluster.local/ns/{NAMESPACE}/sa/{}", pod.spec.app),
            ])
            .arg("--root")
            .arg(root)
            .arg("--token")
            .arg(&token_file)
            .arg("--sds")
            .arg(&sds);
        let keys = Process::start(run, &format!("keys of {name}"), &pod.namespace, keys)?;
        let file = folder.join("envoy.json");
        let sources = Sources {
            pod,
            istiod,
            root,
            token: &token,
            sds: &sds,
        };
        fs::write(&file, bootstrap(&sources)?.to_string())?;
        let mut command = Command::new(envoy::program().ok_or("there is no Envoy")?);
        command
            .gid(GROUP)
            .args([
                "--disable-hot-restart",
                "--log-level",
                "warning",
                "--concurrency",
                "1",
            ])
            .args(["--drain-time-s", "45", "--drain-strategy", "immediate"])
            // Of every field of istiod's that Envoy would rather not have.
            .args(["--component-log-level", "misc:error"])
            .arg("--config-path")
            .arg(&file);
        let mut envoy = Process::start(run, &format!("sidecar of {name}"), &pod.namespace, command)?;
        envoy.wait_for_port(&pod.namespace, ([127, 0, 0, 1], ADMIN_PORT).into(), PATIENCE)?;
        Ok(Self {
            pod: name.clone(),
            envoy,
            keys,
        })
    }

    /// What its programs have said last, for people.
    pub(crate) fn last_words(&self) -> String {
        let both = [&self.envoy, &self.keys];
        let words = both.map(|process| format!("---- {}\n{}", process.name(), process.stderr()));
        words.join("\n")
    }
}

/// A token for the pod's account, as the kubelet projects it.
fn token(pod: &RunningPod, uid: &str, control: &ControlPlane) -> Result<String> {
    let text = control.kubectl(&[
        "create",
        "token",
        pod.spec.app,
        "-n",
        NAMESPACE,
        "--audience=istio-ca",
        "--bound-object-kind=Pod",
        &format!("--bound-object-name={}", pod.spec.name),
        &format!("--bound-object-uid={uid}"),
    ])?;
    Ok(text.trim().to_owned())
}

/// What `istio-iptables` writes, as far as TCP goes: what comes in goes to 15006, what the application sends to 15001.
fn capture(pod: &RunningPod, run: &Run) -> Result<()> {
    let envoys = format!("-m owner --gid-owner {GROUP}");
    for rule in [
        "PREROUTING -p tcp --dport 15000:15090 -j RETURN".to_owned(),
        "PREROUTING -p tcp -j REDIRECT --to-ports 15006".to_owned(),
        // Envoy to its own application.
        "OUTPUT -o lo -s 127.0.0.6/32 -j RETURN".to_owned(),
        // The application to itself by its service: in again.
        format!("OUTPUT -o lo ! -d 127.0.0.1/32 -p tcp {envoys} -j REDIRECT --to-ports 15006"),
        format!("OUTPUT {envoys} -j RETURN"),
        "OUTPUT -o lo -j RETURN".to_owned(),
        "OUTPUT -p tcp -j REDIRECT --to-ports 15001".to_owned(),
    ] {
        tool(run, &pod.namespace, "iptables", &format!("-w -t nat -A {rule}"))?;
    }
    Ok(())
}

struct Sources<'a> {
    pod: &'a RunningPod,
    istiod: &'a str,
    root: &'a Path,
    token: &'a str,
    sds: &'a Path,
}

/// What Istio's agent writes for its Envoy, less what this does not need.
fn bootstrap(sources: &Sources<'_>) -> Result<Value> {
    let pod = sources.pod;
    let spec = &pod.spec;
    let mut istiod = envoy::http2("xds-grpc", envoy::Way::Address(sources.istiod.parse()?));
    istiod["transport_socket"] = json!({"name": "envoy.transport_sockets.tls", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
        "sni": "istiod.istio-system.svc",
        "common_tls_context": {
            "alpn_protocols": ["h2"],
            "validation_context": {
                "trusted_ca": {"filename": sources.root},
                "match_typed_subject_alt_names": [
                    {"san_type": "DNS", "matcher": {"exact": "istiod.istio-system.svc"}}]}}}});
    let id = format!(
        "sidecar~{}~{}.{NAMESPACE}~{NAMESPACE}.svc.cluster.local",
        pod.address, spec.name
    );
    Ok(json!({
        "node": {"id": id, "cluster": format!("{}.{NAMESPACE}", spec.app), "metadata": {
            "NAMESPACE": NAMESPACE, "SERVICE_ACCOUNT": spec.app, "CLUSTER_ID": "Kubernetes",
            "INSTANCE_IPS": pod.address.to_string(), "LABELS": spec.labels()}},
        "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": ADMIN_PORT}}},
        "dynamic_resources": {
            "ads_config": {
                "api_type": "DELTA_GRPC", "transport_api_version": "V3", "set_node_on_first_message_only": true,
                "grpc_services": [{
                    "envoy_grpc": {"cluster_name": "xds-grpc"},
                    "initial_metadata": [
                        {"key": "authorization", "value": format!("Bearer {}", sources.token)},
                        {"key": "clusterid", "value": "Kubernetes"}]}]},
            "cds_config": {"ads": {}, "resource_api_version": "V3", "initial_fetch_timeout": "0s"},
            "lds_config": {"ads": {}, "resource_api_version": "V3", "initial_fetch_timeout": "0s"}},
        "static_resources": {"clusters": [istiod, envoy::http2("sds-grpc", envoy::Way::Socket(sources.sds))]},
    }))
}

/// Takes Istio's own filters, which stock Envoy does not have, out of the configurations of pods with [`LABEL`].
///
/// A cluster's filters can be replaced but not removed: an idle one of stock Envoy's takes the place.
pub(crate) fn envoy_filter() -> Value {
    let remove = |apply_to: &str, filter: Value| json!({"applyTo": apply_to, "match": {"listener": {"filterChain": {"filter": filter}}}, "patch": {"operation": "REMOVE"}});
    let network = ["istio.stats", "istio.metadata_exchange"]
        .map(|name| remove("NETWORK_FILTER", json!({"name": name})));
    let http = ["istio.stats", "istio.metadata_exchange", "istio.alpn"].map(|name| {
        let filter =
            json!({"name": "envoy.filters.network.http_connection_manager", "subFilter": {"name": name}});
        remove("HTTP_FILTER", filter)
    });
    let clusters = json!({"applyTo": "CLUSTER", "patch": {"operation": "MERGE_AND_REPLACE_LIST", "value": {"filters": [
        {"name": "envoy.filters.upstream_network.reverse_tunnel_lifecycle",
         "typed_config": {"@type": "type.googleapis.com/google.protobuf.Empty", "value": {}}}]}}});
    let patches: Vec<Value> = network.into_iter().chain(http).chain([clusters]).collect();
    let (key, value) = LABEL;
    json!({"apiVersion": "networking.istio.io/v1alpha3", "kind": "EnvoyFilter",
        "metadata": {"name": "stock-envoy", "namespace": NAMESPACE},
        "spec": {"workloadSelector": {"labels": {key: value}}, "configPatches": patches}})
}
