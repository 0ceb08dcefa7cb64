//! The real API, the program, and the certificates between them.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use k8s_openapi::api::admissionregistration::v1::MutatingWebhookConfiguration;
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service};
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use serde_json::{Value, json};

/// Between two looks at something that tells nobody.
const STEP: Duration = Duration::from_millis(20);
/// Longest wait for anything.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

const PROGRAM: &str = env!("CARGO_BIN_EXE_istio-dpu-controller");
const PEERS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/peers");

/// Reports that the test did not run, past any capturing. With `DPUMESH_NO_SKIP=1` that is a failure, unless `DPUMESH_PEERS=absent` says that
/// whoever runs this has counted the peers as missing already.
fn skip(reason: &str) {
    let _ = writeln!(
        std::io::stderr(),
        "SKIPPED istio-dpu-controller against the real API: {reason}"
    );
    let is = |name, value| std::env::var_os(name).is_some_and(|found| found == value);
    assert!(
        !is("DPUMESH_NO_SKIP", "1") || is("DPUMESH_PEERS", "absent"),
        "skipped: {reason}"
    );
}

/// Whether `tests/peers/build` has built what `run` needs.
fn are_peers_built() -> bool {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")));
    let Some(Ok(entries)) = cache.map(|cache| std::fs::read_dir(cache.join("dpumesh/peers"))) else {
        return false;
    };
    let names: Vec<String> = entries
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    ["istiod-", "kube-"]
        .iter()
        .all(|peer| names.iter().any(|name| name.starts_with(peer)))
}

pub(crate) async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "in vain: {what}");
        tokio::time::sleep(STEP).await;
    }
}

pub(crate) struct Cluster {
    folder: tempfile::TempDir,
    peers: PathBuf,
    /// They were started here, and end with this.
    own: bool,
    client: Client,
    /// Part of every name.
    run: String,
}

impl Cluster {
    pub(crate) async fn start() -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let running = std::env::var_os("DPUMESH_PEERS_DIR").map(PathBuf::from);
        let own = running.is_none();
        if own && !are_peers_built() {
            skip("the peers are not built: tests/peers/build");
            return None;
        }
        let peers = running.unwrap_or_else(|| folder.path().join("peers"));
        if own {
            peers_do(&peers, "start", &[]);
        }
        let client = client(&peers.join("kube/config")).await;
        let run = format!("c{}", std::process::id());
        let cluster = Self {
            folder,
            peers,
            own,
            client,
            run,
        };
        let namespace: Namespace = read(json!({"metadata": {"name": cluster.run}}));
        Api::all(cluster.client.clone())
            .create(&PostParams::default(), &namespace)
            .await
            .unwrap();
        Some(cluster)
    }

    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// A name of this run's own.
    pub(crate) fn name(&self, name: &str) -> String {
        format!("{}-{name}", self.run)
    }

    pub(crate) fn key(&self, pod: &str) -> String {
        format!("{}/{pod}", self.run)
    }

    fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.client.clone(), &self.run)
    }

    fn nodes(&self) -> Api<Node> {
        Api::all(self.client.clone())
    }

    pub(crate) async fn node(&self, name: &str, endpoint: Option<&str>) {
        let node = read(
            json!({"metadata": {"name": name, "annotations": {"dpumesh.io/tunnel-endpoint": endpoint}}}),
        );
        self.nodes().create(&PostParams::default(), &node).await.unwrap();
    }

    pub(crate) async fn annotate(&self, node: &str, endpoint: &str) {
        let patch = json!({"metadata": {"annotations": {"dpumesh.io/tunnel-endpoint": endpoint}}});
        self.nodes()
            .patch(node, &PatchParams::default(), &Patch::Merge(patch))
            .await
            .unwrap();
    }

    /// The pod as the API made it. The account that it needs may come a moment after its namespace.
    pub(crate) async fn pod(&self, name: &str, node: &str, labels: Value) -> Pod {
        let pod: Pod = read(json!({
            "metadata": {"name": name, "labels": labels},
            "spec": {"nodeName": node, "containers": [{"name": "main", "image": "none"}]}
        }));
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.pods().create(&PostParams::default(), &pod).await {
                Ok(made) => return made,
                Err(error) => assert!(Instant::now() < deadline, "{name}: {error}"),
            }
            tokio::time::sleep(STEP).await;
        }
    }

    pub(crate) async fn ready(&self, pod: &str, address: &str) {
        let patch = json!({"status": {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}],
            "conditions": [{"type": "Ready", "status": "True"}]}});
        self.pods()
            .patch_status(pod, &PatchParams::default(), &Patch::Merge(patch))
            .await
            .unwrap();
    }

    pub(crate) async fn delete(&self, pod: &str) {
        self.pods()
            .delete(pod, &DeleteParams::default().grace_period(0))
            .await
            .unwrap();
    }

    /// Makes a service of one port without pods; its address.
    pub(crate) async fn service(&self, name: &str, port: u16, protocol: &str) -> String {
        let service: Service = read(json!({
            "metadata": {"name": name},
            "spec": {"ports": [{"port": port, "protocol": protocol}]}
        }));
        let services = Api::<Service>::namespaced(self.client.clone(), &self.run);
        let made = services.create(&PostParams::default(), &service).await.unwrap();
        made.spec.unwrap().cluster_ip.unwrap()
    }

    pub(crate) async fn opt_namespace_in(&self) {
        let patch = json!({"metadata": {"labels": {"dpumesh.io/dataplane": "dpu"}}});
        let namespaces = Api::<Namespace>::all(self.client.clone());
        namespaces
            .patch(&self.run, &PatchParams::default(), &Patch::Merge(patch))
            .await
            .unwrap();
    }

    /// Starts or stops one of the peers.
    pub(crate) fn peers(&self, verb: &str, peer: &str) {
        peers_do(&self.peers, verb, &[peer]);
    }

    fn kubectl(&self, arguments: &[&str], input: &str) -> String {
        let script = format!(". {}/env && exec kubectl \"$@\"", self.peers.display());
        let mut child = Command::new("bash")
            .args(["-c", &script, "kubectl"])
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "kubectl {arguments:?}");
        String::from_utf8(output.stdout).unwrap()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.own {
            peers_do(&self.peers, "stop", &[]);
        } else {
            let nodes = [self.name("n1"), self.name("n2")];
            let _ = self.kubectl(
                &[
                    "delete",
                    "--ignore-not-found",
                    "mutatingwebhookconfiguration",
                    "dpumesh",
                ],
                "",
            );
            let _ = self.kubectl(
                &["delete", "--ignore-not-found", "node", &nodes[0], &nodes[1]],
                "",
            );
            let _ = self.kubectl(&["delete", "--wait=false", "namespace", &self.run], "");
        }
    }
}

fn peers_do(folder: &Path, verb: &str, peers: &[&str]) {
    let mut command = Command::new(format!("{PEERS}/run"));
    let status = command.arg(verb).arg(folder).args(peers).status().unwrap();
    assert!(status.success(), "tests/peers/run {verb} {peers:?}");
}

fn read<T: serde::de::DeserializeOwned>(json: Value) -> T {
    serde_json::from_value(json).unwrap()
}

async fn client(kubeconfig: &Path) -> Client {
    let kubeconfig = Kubeconfig::read_from(kubeconfig).unwrap();
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
        .await
        .unwrap();
    Client::try_from(config).unwrap()
}

/// An authority of the test's own.
pub(crate) struct Credentials {
    issuer: CertifiedIssuer<'static, KeyPair>,
    folder: PathBuf,
}

impl Credentials {
    pub(crate) fn new(folder: &Path) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let credentials = Self {
            issuer,
            folder: folder.to_owned(),
        };
        std::fs::write(credentials.path("ca.pem"), credentials.authority()).unwrap();
        let (chain, key) = credentials.issue_for(&["controller.test", "127.0.0.1"]);
        std::fs::write(credentials.path("tls.pem"), chain).unwrap();
        std::fs::write(credentials.path("tls.key"), key).unwrap();
        credentials
    }

    pub(crate) fn authority(&self) -> String {
        self.issuer.pem()
    }

    /// Chain and key, PEM.
    pub(crate) fn issue(&self, name: &str) -> (String, String) {
        self.issue_for(&[name])
    }

    fn issue_for(&self, names: &[&str]) -> (String, String) {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::new(names)
            .unwrap()
            .signed_by(&key, &self.issuer)
            .unwrap();
        (certificate.pem(), key.serialize_pem())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }
}

/// The program.
pub(crate) struct Controller {
    child: Child,
    pub(crate) listen: String,
    status: String,
}

impl Controller {
    /// With the account and the role that it asks for, and its webhook registered.
    pub(crate) async fn start(cluster: &Cluster, credentials: &Credentials) -> Self {
        let namespace = cluster.kubectl(
            &[
                "create",
                "namespace",
                "dpumesh-system",
                "--dry-run=client",
                "-o",
                "json",
            ],
            "",
        );
        cluster.kubectl(&["apply", "-f", "-"], &namespace);
        cluster.kubectl(&["apply", "-f", "-"], &printed(&["--print-rbac"]));
        let token = cluster.kubectl(
            &["create", "token", "istio-dpu-controller", "-n", "dpumesh-system"],
            "",
        );
        let mut kubeconfig = Kubeconfig::read_from(cluster.peers.join("kube/config")).unwrap();
        let mut value = serde_json::to_value(&kubeconfig.auth_infos).unwrap();
        value[0]["user"] = json!({"token": token.trim()});
        kubeconfig.auth_infos = read(value);
        let restricted = credentials.path("controller.kubeconfig");
        // JSON is YAML.
        std::fs::write(&restricted, serde_json::to_string(&kubeconfig).unwrap()).unwrap();

        let path = |name: &str| credentials.path(name).into_os_string();
        let mut child = Command::new(PROGRAM)
            .arg("--kubeconfig")
            .arg(&restricted)
            .args([
                "--listen",
                "127.0.0.1:0",
                "--status",
                "127.0.0.1:0",
                "--webhook",
                "127.0.0.1:0",
            ])
            .args(["--log-level", "info,dpumesh_xds=debug"])
            .arg("--tls-cert")
            .arg(path("tls.pem"))
            .arg("--tls-key")
            .arg(path("tls.key"))
            .arg("--tls-client-ca")
            .arg(path("ca.pem"))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let address = |key: &str| {
            let word = line.split_whitespace().find_map(|word| word.strip_prefix(key));
            word.unwrap_or_else(|| panic!("{key} in {line:?}")).to_owned()
        };
        let controller = Self {
            listen: address("listen="),
            status: address("status="),
            child,
        };
        controller
            .register(cluster, credentials, &address("webhook="))
            .await;
        controller
    }

    /// Registers the webhook, and waits until the API server asks it.
    async fn register(&self, cluster: &Cluster, credentials: &Credentials, webhook: &str) {
        let authority = credentials.path("ca.pem");
        let yaml = printed(&[
            "--print-webhook",
            "--webhook-ca",
            authority.to_str().unwrap(),
            "--webhook-url",
            &format!("https://{webhook}"),
        ]);
        cluster.kubectl(&["apply", "-f", "-"], &yaml);
        let registered = Api::<MutatingWebhookConfiguration>::all(cluster.client.clone())
            .get("dpumesh")
            .await
            .unwrap();
        assert_eq!(registered.webhooks.unwrap().len(), 2);
        let deadline = Instant::now() + PATIENCE;
        loop {
            let tried: Pod = read(
                json!({"metadata": {"generateName": "try-", "labels": {"dpumesh.io/dataplane": "dpu"}},
                "spec": {"containers": [{"name": "main", "image": "none"}]}}),
            );
            let dry = PostParams {
                dry_run: true,
                ..PostParams::default()
            };
            if let Ok(pod) = cluster.pods().create(&dry, &tried).await
                && pod.metadata.labels.is_some_and(|labels| labels.len() == 3)
            {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "the API server does not ask the webhook"
            );
            tokio::time::sleep(STEP).await;
        }
    }

    /// A page of the status server: code and body.
    pub(crate) fn page(&self, path: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(&self.status).unwrap();
        write!(
            stream,
            "GET {path} HTTP/1.1\r\nHost: controller\r\nConnection: close\r\n\r\n"
        )
        .unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        let code = head.split_whitespace().nth(1).unwrap().parse().unwrap();
        (code, body.to_owned())
    }

    /// SIGTERM, and a good end.
    pub(crate) async fn end(mut self) {
        let kill = Command::new("kill")
            .arg(self.child.id().to_string())
            .status()
            .unwrap();
        assert!(kill.success());
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                assert!(status.success(), "{status}");
                return;
            }
            assert!(Instant::now() < deadline, "it does not end");
            tokio::time::sleep(STEP).await;
        }
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn printed(arguments: &[&str]) -> String {
    let output = Command::new(PROGRAM).args(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}");
    String::from_utf8(output.stdout).unwrap()
}
