//! Which pods get a stream: those that the cluster knows *and* the node has.
//!
//! A pod is in the cluster when the controller has a [`Binding`] for it: asked before that, a control plane answers with a configuration
//! that lacks the inbound half, and an acknowledged one proves nothing. It is on the node when the agent asked for it to be
//! governed, with the addresses it gave it. Name, namespace and uid must agree: a pod that was made anew under its
//! old name is another pod. Pods of a list ([`PodEntry`]) are complete as they are.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use crate::ir::{Identity, Pod, Workload};
use crate::mesh::Binding;

/// A local pod, as the operator lists it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PodEntry {
    /// Its address.
    pub ip: IpAddr,
    /// Kubernetes name.
    pub name: String,
    /// Kubernetes namespace.
    pub namespace: String,
    /// Kubernetes service account.
    pub service_account: String,
    /// File with its token, audience `istio-ca`; none where it is asked of the Kubernetes API, or the connection's certificate
    /// speaks for it.
    #[serde(default)]
    pub token: Option<PathBuf>,
    /// Kubernetes uid, to ask for a token bound to it.
    #[serde(default)]
    pub uid: String,
    /// Its labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

impl PodEntry {
    /// With everything that a stream needs.
    pub fn complete(&self, trust_domain: &str) -> LocalPod {
        LocalPod {
            name: self.name.clone(),
            namespace: self.namespace.clone(),
            uid: self.uid.clone(),
            service_account: self.service_account.clone(),
            trust_domain: trust_domain.to_owned(),
            addresses: vec![self.ip],
            labels: self.labels.clone(),
            token: self.token.clone(),
            listed: true,
        }
    }
}

/// A pod with everything that a stream needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalPod {
    /// Kubernetes name.
    pub name: String,
    /// Kubernetes namespace.
    pub namespace: String,
    /// Kubernetes uid; empty for a pod of a list that does not say it.
    pub uid: String,
    /// Kubernetes service account.
    pub service_account: String,
    /// Trust domain of the mesh.
    pub trust_domain: String,
    /// Its addresses on this node.
    pub addresses: Vec<IpAddr>,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// File with its token, of a pod of a list.
    pub token: Option<PathBuf>,
    /// Whether it is of a list.
    pub listed: bool,
}

impl LocalPod {
    /// `pod.namespace`.
    pub fn key(&self) -> String {
        key(&self.namespace, &self.name)
    }

    /// Who it is.
    pub fn identity(&self) -> Identity {
        Identity {
            trust_domain: self.trust_domain.clone(),
            namespace: self.namespace.clone(),
            service_account: self.service_account.clone(),
        }
    }

    /// As the aggregation knows it.
    pub fn pod(&self) -> Pod {
        Pod {
            name: self.name.clone(),
            addresses: self.addresses.clone(),
            identity: self.identity(),
        }
    }

    /// What its metrics call it, as Istio's injection names it: by its labels, and where they do not say, by its name.
    pub fn workload(&self, cluster: &str) -> Workload {
        let label = |names: &[&str]| {
            let mut found = names.iter().filter_map(|name| self.labels.get(*name));
            found.find(|value| !value.is_empty()).cloned()
        };
        let name = workload_name(&self.name, &self.labels);
        Workload {
            canonical_name: label(&["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"])
                .unwrap_or_else(|| name.clone()),
            canonical_revision: label(&[
                "service.istio.io/canonical-revision",
                "app.kubernetes.io/version",
                "version",
            ])
            .unwrap_or_else(|| "latest".to_owned()),
            cluster: cluster.to_owned(),
            app: label(&["app"]).unwrap_or_default(),
            version: label(&["version"]).unwrap_or_default(),
            name,
        }
    }

    /// Whether a stream for `self` is one for `other`: labels may change under it.
    pub fn is(&self, other: &Self) -> bool {
        self.uid == other.uid && self.pod() == other.pod() && self.token == other.token
    }
}

/// The name of what made a pod. The pod's own name has it in front; the labels that controllers put on their pods tell how much of it.
fn workload_name(pod: &str, labels: &BTreeMap<String, String>) -> String {
    if let Some(job) = labels
        .get("batch.kubernetes.io/job-name")
        .or_else(|| labels.get("job-name"))
    {
        return job.clone();
    }
    if let Some(hash) = labels.get("pod-template-hash")
        && let Some((deployment, _)) = pod.rsplit_once(&format!("-{hash}-"))
    {
        return deployment.to_owned();
    }
    // StatefulSets and DaemonSets have no other name between their own and the pod's.
    if labels.contains_key("controller-revision-hash")
        && let Some((set, _)) = pod.rsplit_once('-')
    {
        return set.to_owned();
    }
    pod.to_owned()
}

/// `pod.namespace`.
pub fn key(namespace: &str, name: &str) -> String {
    format!("{name}.{namespace}")
}

/// A pod the agent asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    /// Kubernetes name.
    pub name: String,
    /// Kubernetes namespace.
    pub namespace: String,
    /// Kubernetes uid; empty where the runtime did not say it: then the name alone must do.
    pub uid: String,
    /// The addresses it got.
    pub addresses: Vec<IpAddr>,
}

/// The table. Changes ring [`Pods::changed`].
#[derive(Debug, Default)]
pub struct Pods {
    tables: Mutex<Tables>,
    /// Rings when [`Pods::local`] may have changed.
    pub changed: Notify,
}

#[derive(Debug, Default)]
struct Tables {
    listed: BTreeMap<String, LocalPod>,
    bindings: BTreeMap<String, Binding>,
    asked: BTreeMap<String, Asked>,
    /// From before a restart, until the controller has said which of them are still there.
    restored: BTreeMap<String, LocalPod>,
}

impl Pods {
    /// Pods of a list, and those that had a program before a restart.
    pub fn new(listed: Vec<LocalPod>, restored: Vec<LocalPod>) -> Self {
        let by_key = |pods: Vec<LocalPod>| pods.into_iter().map(|pod| (pod.key(), pod)).collect();
        let mut tables = Tables {
            listed: by_key(listed),
            restored: by_key(restored),
            ..Tables::default()
        };
        let listed = std::mem::take(&mut tables.listed);
        tables
            .restored
            .retain(|key, pod| !pod.listed && !listed.contains_key(key));
        // What was asked for before the restart is not asked for again.
        for (key, pod) in &tables.restored {
            let asked = Asked {
                name: pod.name.clone(),
                namespace: pod.namespace.clone(),
                uid: pod.uid.clone(),
                addresses: pod.addresses.clone(),
            };
            tables.asked.insert(key.clone(), asked);
        }
        tables.listed = listed;
        Self {
            tables: Mutex::new(tables),
            changed: Notify::new(),
        }
    }

    fn tables(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The agent has this pod on the node.
    pub fn ask(&self, asked: Asked) {
        let key = key(&asked.namespace, &asked.name);
        self.tables().asked.insert(key, asked);
        self.changed.notify_one();
    }

    /// The agent has it no more.
    pub fn forget(&self, namespace: &str, name: &str, uid: &str) {
        let key = key(namespace, name);
        let mut tables = self.tables();
        if tables.asked.get(&key).is_some_and(|asked| asked.uid == uid) {
            tables.asked.remove(&key);
            tables.restored.remove(&key);
        }
        drop(tables);
        self.changed.notify_one();
    }

    /// What the controller says changed: `bindings` came or changed, `gone` (`NAMESPACE/NAME`) went. `all`: there are no others.
    pub fn bind(&self, bindings: Vec<Binding>, gone: &[String], all: bool) {
        let mut tables = self.tables();
        if all {
            tables.bindings.clear();
            tables.restored.clear();
        }
        for name in gone {
            if let Some((namespace, name)) = name.split_once('/') {
                tables.bindings.remove(&key(namespace, name));
            }
        }
        for binding in bindings {
            tables
                .bindings
                .insert(key(&binding.namespace, &binding.name), binding);
        }
        drop(tables);
        self.changed.notify_one();
    }

    /// Pods that are to have a stream, by `pod.namespace`.
    pub fn local(&self) -> BTreeMap<String, LocalPod> {
        let tables = self.tables();
        let mut local = tables.restored.clone();
        for (key, asked) in &tables.asked {
            let binding = tables.bindings.get(key);
            if let Some(binding) = binding.filter(|b| asked.uid.is_empty() || b.uid == asked.uid) {
                local.insert(key.clone(), joined(binding, asked));
            }
        }
        local.extend(tables.listed.clone());
        local
    }

    /// A pod of this identity, for whom its certificate may be asked.
    pub fn of_identity(&self, identity: &Identity) -> Option<LocalPod> {
        self.local().into_values().find(|pod| pod.identity() == *identity)
    }
}

fn joined(binding: &Binding, asked: &Asked) -> LocalPod {
    LocalPod {
        name: asked.name.clone(),
        namespace: asked.namespace.clone(),
        uid: binding.uid.clone(),
        service_account: binding.service_account.clone(),
        trust_domain: binding.trust_domain.clone(),
        addresses: asked.addresses.clone(),
        labels: binding.labels.clone(),
        token: None,
        listed: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn binding(uid: &str) -> Binding {
        Binding {
            name: "p".into(),
            namespace: "n".into(),
            uid: uid.into(),
            service_account: "sa".into(),
            trust_domain: "td".into(),
            ..Binding::default()
        }
    }

    fn asked(uid: &str) -> Asked {
        Asked {
            name: "p".into(),
            namespace: "n".into(),
            uid: uid.into(),
            addresses: vec!["10.0.0.1".parse().unwrap()],
        }
    }

    fn uids(pods: &Pods) -> Vec<String> {
        pods.local().into_values().map(|pod| pod.uid).collect()
    }

    #[test]
    fn a_workload_is_named_as_istio_names_it() {
        let pod = |name: &str, labels: &[(&str, &str)]| LocalPod {
            name: name.into(),
            labels: labels
                .iter()
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                .collect(),
            ..joined(&binding("1"), &asked("1"))
        };
        for (name, labels, wanted) in [
            ("web-5d4f-x2x9z", &[("pod-template-hash", "5d4f")][..], "web"),
            ("web-5d4f-x2x9z", &[], "web-5d4f-x2x9z"),
            ("db-0", &[("controller-revision-hash", "db-77")], "db"),
            ("load-x1", &[("job-name", "load")], "load"),
        ] {
            assert_eq!(pod(name, labels).workload("c").name, wanted, "{name}");
        }
        let bare = pod("web", &[]).workload("c");
        let (name, revision) = (&*bare.canonical_name, &*bare.canonical_revision);
        assert_eq!(
            (name, revision, &*bare.app, &*bare.cluster),
            ("web", "latest", "", "c")
        );
        let labels = [
            ("app", "a"),
            ("version", "2"),
            ("app.kubernetes.io/name", "k"),
            ("service.istio.io/canonical-revision", "r"),
        ];
        let full = pod("web", &labels).workload("c");
        assert_eq!((&*full.canonical_name, &*full.canonical_revision), ("k", "r"));
        assert_eq!((&*full.app, &*full.version), ("a", "2"));
    }

    #[test]
    fn a_pod_needs_both_the_cluster_and_the_node() {
        let pods = Pods::default();
        pods.ask(asked("1"));
        assert!(uids(&pods).is_empty());
        pods.bind(vec![binding("0")], &[], true);
        assert!(uids(&pods).is_empty(), "another pod of that name");
        pods.bind(vec![binding("1")], &[], false);
        assert_eq!(uids(&pods), ["1"]);
        let identity = Identity::parse("spiffe://td/ns/n/sa/sa").unwrap();
        assert_eq!(pods.of_identity(&identity).unwrap().name, "p");
        pods.forget("n", "p", "0");
        assert_eq!(uids(&pods), ["1"], "a late word about another pod of that name");
        pods.forget("n", "p", "1");
        assert!(uids(&pods).is_empty());
        assert_eq!(pods.of_identity(&identity), None);
        pods.ask(asked("1"));
        pods.bind(vec![], &["n/p".into()], false);
        assert!(uids(&pods).is_empty());
    }

    #[test]
    fn after_a_restart_pods_stay_until_the_controller_says_otherwise() {
        let first = Pods::default();
        first.ask(asked("1"));
        first.bind(vec![binding("1")], &[], true);
        let saved: Vec<LocalPod> = first.local().into_values().collect();
        let again = Pods::new(Vec::new(), saved.clone());
        assert_eq!(uids(&again), ["1"]);
        again.bind(vec![binding("1")], &[], true);
        assert_eq!(uids(&again), ["1"], "still asked for");
        let gone = Pods::new(Vec::new(), saved);
        gone.bind(vec![], &[], true);
        assert!(uids(&gone).is_empty());
    }
}
