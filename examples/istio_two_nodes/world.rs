//! [`World`]: the mesh with its workloads, how to ask them, and Istio's YAML as something that comes and goes.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use dpumesh_examples::children::Process;
use dpumesh_examples::workload::http_client::{self, Options, Summary};
use dpumesh_examples::workload::{self, READY};
use serde_json::json;

use super::Result;
use super::kubelet::{HTTP_PORT, NAMESPACE, ORDINARY, PodSpec, RunningPod};
use super::node::{Nodes, list};
use super::ordinary::Ordinary;
use super::peers::DEBOUNCE;
use super::sidecar;

/// How long an effect may take to show.
const PATIENCE: Duration = Duration::from_secs(45);
/// Port of all services.
const SERVICE_PORT: u16 = 80;

/// A service of the mesh: its name, which is also its app and its account, and its address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Service {
    pub(crate) name: &'static str,
    number: u8,
}

/// Who calls the others.
pub(crate) const FRONT: Service = Service {
    name: "front",
    number: 1,
};
/// Has a version on each node.
pub(crate) const REVIEWS: Service = Service {
    name: "reviews",
    number: 2,
};
/// On the second node.
pub(crate) const RATINGS: Service = Service {
    name: "ratings",
    number: 3,
};
/// Behind an ordinary sidecar, on the node without a DPU.
pub(crate) const ORDERS: Service = Service {
    name: "orders",
    number: 4,
};
/// Beside it, likewise.
pub(crate) const STOCK: Service = Service {
    name: "stock",
    number: 5,
};
/// All of pods on DPUs.
pub(crate) const SERVICES: [Service; 3] = [FRONT, REVIEWS, RATINGS];

impl Service {
    pub(crate) fn address(self) -> SocketAddr {
        (Ipv4Addr::new(10, 96, 1, self.number), SERVICE_PORT).into()
    }

    pub(crate) fn host(self) -> String {
        format!("{}.{NAMESPACE}.svc.cluster.local", self.name)
    }
}

/// The mesh.
#[derive(Debug)]
pub(crate) struct World {
    // Ended before the pods they run in.
    servers: Vec<(String, Process)>,
    pub(crate) nodes: Nodes,
    /// What scenarios have applied and not deleted.
    applied: Vec<String>,
    /// What is being played, for the names of its figures.
    pub(crate) playing: &'static str,
    /// How long things took, milliseconds, in the order they were seen.
    pub(crate) took: Vec<(String, f64)>,
}

/// How long something took to change traffic.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Effect {
    kubectl: Duration,
    after: Duration,
}

impl std::fmt::Display for Effect {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "in force {} ms after kubectl, which took {} ms (istiod waits {} ms for more)",
            self.after.as_millis(),
            self.kubectl.as_millis(),
            DEBOUNCE.as_millis()
        )
    }
}

impl World {
    /// Makes the workloads and waits until each reaches each.
    pub(crate) fn new(nodes: Nodes, progress: &impl Fn(&str)) -> Result<Self> {
        progress("services and accounts");
        let mut objects =
            vec![json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})];
        for service in SERVICES.into_iter().chain([ORDERS, STOCK]) {
            let metadata = json!({"name": service.name, "namespace": NAMESPACE});
            objects.push(json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata}));
            objects.push(
                json!({"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": {
                "clusterIP": service.address().ip(), "selector": {"app": service.name},
                "ports": [{"name": "http", "port": SERVICE_PORT, "targetPort": HTTP_PORT}]}}),
            );
        }
        objects.push(sidecar::envoy_filter());
        nodes.control.apply(&list(objects))?;
        let mut world = Self {
            servers: Vec::new(),
            nodes,
            applied: Vec::new(),
            playing: "",
            took: vec![(
                "istiod waits for more changes".to_owned(),
                DEBOUNCE.as_secs_f64() * 1e3,
            )],
        };
        progress("pods: API, CNI, adapter, proxy");
        world.add_pods(&[
            PodSpec::new("front-1", "front", "v1", 0),
            PodSpec::new("reviews-1", "reviews", "v1", 0),
            PodSpec::new("reviews-2", "reviews", "v2", 1),
            PodSpec::new("ratings-1", "ratings", "v1", 1),
        ])?;
        if world.nodes.ordinary.is_some() {
            progress("pods with ordinary sidecars: stock Envoy, istiod");
            world.add_pods(&[
                PodSpec::new("orders-1", ORDERS.name, "v1", ORDINARY),
                PodSpec::new("stock-1", STOCK.name, "v1", ORDINARY),
            ])?;
        }
        Ok(world)
    }

    /// The machine without a DPU.
    pub(crate) fn ordinary(&self) -> Result<&Ordinary> {
        self.nodes
            .ordinary
            .as_ref()
            .ok_or_else(|| "there is no ordinary node".into())
    }

    /// Creates pods and starts their servers.
    pub(crate) fn add_pods(&mut self, specs: &[PodSpec]) -> Result<()> {
        self.nodes.add_pods(specs)?;
        for spec in specs {
            let pod = self.nodes.pod(&spec.name)?;
            let listen = SocketAddr::new(pod.address, HTTP_PORT).to_string();
            let role = ["http-server", &listen, &spec.name];
            let title = format!("http-server in {}", spec.name);
            let mut server =
                Process::start(&self.nodes.run, &title, &pod.namespace, workload::command(role))?;
            server.wait_for_line(READY, PATIENCE)?;
            self.servers.push((spec.name.clone(), server));
            self.nodes.publish(&spec.name)?;
        }
        Ok(())
    }

    /// Ends a pod's server and takes the pod away.
    pub(crate) fn remove_pod(&mut self, name: &str) -> Result<()> {
        self.servers.retain(|(pod, _)| pod != name);
        self.nodes.remove_pod(name)
    }

    /// Asks a service from a pod.
    pub(crate) fn get(
        &self,
        from: &str,
        service: Service,
        count: u64,
        adjust: &dyn Fn(&mut Options),
    ) -> Result<Summary> {
        let mut options = Options::new(service.address());
        options.host = Some(service.host());
        options.count = count;
        options.timeout_ms = 5000;
        adjust(&mut options);
        self.ask(self.nodes.pod(from)?, &options)
    }

    /// Asks an address from a pod.
    pub(crate) fn get_at(&self, from: &str, address: IpAddr, count: u64) -> Result<Summary> {
        let mut options = Options::new(SocketAddr::new(address, HTTP_PORT));
        options.count = count;
        options.timeout_ms = 5000;
        self.ask(self.nodes.pod(from)?, &options)
    }

    fn ask(&self, pod: &RunningPod, options: &Options) -> Result<Summary> {
        Ok(pod.namespace.run(|| http_client::get(options))??)
    }

    /// Applies YAML that the end of the scenario reverts, and waits until `shows`.
    pub(crate) fn apply(&mut self, yaml: &str, shows: impl Fn(&Self) -> Result<bool>) -> Result<Effect> {
        let kubectl = self.apply_only(yaml)?;
        let begun = Instant::now();
        self.until("what was applied changes traffic", shows)?;
        let after = begun.elapsed();
        self.note(
            &format!("{}: from kubectl's end to changed traffic", self.playing),
            after,
        );
        Ok(Effect { kubectl, after })
    }

    /// Applies YAML that the end of the scenario reverts; how long kubectl took.
    pub(crate) fn apply_only(&mut self, yaml: &str) -> Result<Duration> {
        let took = self.nodes.control.apply(yaml)?;
        if !self.applied.iter().any(|known| known == yaml) {
            self.applied.push(yaml.to_owned());
        }
        Ok(took)
    }

    /// Keeps how long something took; the first of each name.
    pub(crate) fn note(&mut self, name: &str, took: Duration) {
        if !self.took.iter().any(|(known, _)| known == name) {
            self.took.push((name.to_owned(), took.as_secs_f64() * 1e3));
        }
    }

    /// Deletes what was applied, and waits until `shows`.
    pub(crate) fn revert_until(&mut self, shows: impl Fn(&Self) -> Result<bool>) -> Result<Duration> {
        self.revert()?;
        let begun = Instant::now();
        self.until("its deletion reverts it", shows)?;
        Ok(begun.elapsed())
    }

    /// Deletes what was applied.
    pub(crate) fn revert(&mut self) -> Result<()> {
        let mut deleted = std::collections::BTreeSet::new();
        for yaml in std::mem::take(&mut self.applied).iter().rev() {
            // The same objects may have been applied with another content.
            if deleted.insert(names(yaml)) {
                self.nodes.control.delete(yaml)?;
            }
        }
        Ok(())
    }

    /// What a scenario has deleted itself.
    pub(crate) fn forget(&mut self, yaml: &str) {
        self.applied.retain(|known| known != yaml);
    }

    /// Waits for a condition.
    pub(crate) fn until(&self, what: &str, holds: impl Fn(&Self) -> Result<bool>) -> Result<()> {
        let begun = Instant::now();
        while !holds(self)? {
            if begun.elapsed() > PATIENCE {
                return Err(format!("not within {PATIENCE:?}: {what}").into());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// What the nodes' programs have said last.
    pub(crate) fn last_words(&self) -> String {
        let nodes = self.nodes.all.iter().map(super::node::Node::last_words);
        let sidecars = self.nodes.ordinary.iter().flat_map(|node| &node.sidecars);
        let words = nodes.chain(sidecars.map(super::sidecar::Sidecar::last_words));
        words.collect::<Vec<_>>().join("\n")
    }

    /// How to enter what is running.
    pub(crate) fn explain(&self) {
        println!("\nEverything is left running until Ctrl-C. To enter a pod, a SoC or a stack:");
        for pod in self.nodes.pods() {
            println!(
                "  {:10} {:12} nsenter --net={}",
                pod.spec.name,
                pod.address.to_string(),
                pod.namespace.path().display()
            );
        }
        if let Some(node) = &self.nodes.ordinary {
            for pod in &node.pods {
                let path = pod.namespace.path();
                println!(
                    "  {:10} {:12} nsenter --net={}",
                    pod.spec.name,
                    pod.address.to_string(),
                    path.display()
                );
            }
            println!(
                "  node-3                  nsenter --net={}",
                node.machine.path().display()
            );
        }
        for node in &self.nodes.all {
            println!(
                "  soc-{}                   nsenter --net={}",
                node.index + 1,
                node.soc.path().display()
            );
            println!(
                "  stack-{}                 nsenter --net={}",
                node.index + 1,
                node.stack.path().display()
            );
        }
        println!(
            "  control                 nsenter --net={}",
            self.nodes.control.namespace.path().display()
        );
    }
}

/// The lines of a YAML text that name its objects.
fn names(yaml: &str) -> String {
    let lines = yaml
        .lines()
        .filter(|line| line.starts_with("kind:") || line.starts_with("metadata:"));
    lines.collect::<Vec<_>>().join(";")
}
