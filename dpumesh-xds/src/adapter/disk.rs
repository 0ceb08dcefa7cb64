//! The last good configuration on disk, so that a restarted adapter serves before istiod answers, or without it.
//!
//! ```text
//! DIR/pods.json                               pods that have a stream
//! DIR/pods/NAME.NAMESPACE/{cds,lds,eds,rds}   what its stream brought and was taken: a DeltaDiscoveryResponse each
//! ```
//! A thread of its own writes; each file is replaced at once, and what changes several times before it is written is written once. There
//! are no secrets in it. A process that is killed may lose the last moments: the next stream brings them again.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use prost::Message as _;

use super::pods::LocalPod;
use super::stream::{load, tidy};
use crate::client::Update;
use crate::discovery::{DeltaDiscoveryResponse, Resource, ResourceType};
use crate::ir::PodView;

/// What is kept, and under which name.
const KEPT: [(ResourceType, &str); 4] = [
    (ResourceType::Cluster, "cds"),
    (ResourceType::Endpoints, "eds"),
    (ResourceType::Listener, "lds"),
    (ResourceType::Route, "rds"),
];

/// A way to the writing thread.
#[derive(Debug, Clone)]
pub struct Keeper {
    jobs: Sender<Job>,
}

/// The writing thread. [`Self::finish`] waits until everything is on disk.
#[derive(Debug)]
pub struct Writer {
    jobs: Sender<Job>,
    thread: JoinHandle<()>,
}

impl Writer {
    /// Waits until everything is on disk that was said so far, and ends the thread. What is said later is lost.
    pub fn finish(self) {
        let _ = self.jobs.send(Job::End);
        if self.thread.join().is_err() {
            tracing::error!("the writer of the last good configuration panicked");
        }
    }
}

#[derive(Debug)]
enum Job {
    Update(String, Update, bool),
    Pods(Vec<LocalPod>),
    End,
}

/// Opens the folder and starts the thread.
///
/// # Errors
/// The folder cannot be made.
pub fn open(folder: &Path) -> io::Result<(Keeper, Writer)> {
    std::fs::create_dir_all(folder.join("pods"))?;
    let (jobs, receiver) = channel();
    let folder = folder.to_owned();
    let thread = std::thread::Builder::new()
        .name("last-good".to_owned())
        .spawn(move || write(&folder, &receiver))?;
    let keeper = Keeper { jobs: jobs.clone() };
    Ok((keeper, Writer { jobs, thread }))
}

impl Keeper {
    /// What a pod's stream brought and was taken. `whole`: there is nothing else of that type.
    pub fn update(&self, pod: &str, update: Update, whole: bool) {
        let _ = self.jobs.send(Job::Update(pod.to_owned(), update, whole));
    }

    /// The pods that there are.
    pub fn pods(&self, pods: Vec<LocalPod>) {
        let _ = self.jobs.send(Job::Pods(pods));
    }
}

/// What was kept. A file that is not there or unreadable is left out, and said.
pub fn restore(folder: &Path) -> Vec<(LocalPod, PodView)> {
    let list = match std::fs::read(folder.join("pods.json")) {
        Ok(list) => list,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Vec::new(),
        Err(error) => {
            tracing::warn!(%error, "the kept list of pods cannot be read");
            return Vec::new();
        }
    };
    let pods: Vec<LocalPod> = serde_json::from_slice(&list).unwrap_or_else(|error| {
        tracing::warn!(%error, "the kept list of pods is damaged");
        Vec::new()
    });
    pods.into_iter()
        .map(|pod| {
            let view = restore_view(&place(folder, &pod.key()), &pod);
            (pod, view)
        })
        .collect()
}

fn restore_view(folder: &Path, pod: &LocalPod) -> PodView {
    let mut view = PodView::new(pod.pod());
    for (kind, file) in KEPT {
        for resource in read(&folder.join(file)) {
            if let Err(reason) = load(&mut view, kind, &resource) {
                tracing::warn!(pod = pod.key(), reason, "a kept resource is not taken any more");
            }
        }
    }
    tidy(&mut view);
    view
}

fn place(folder: &Path, pod: &str) -> PathBuf {
    folder.join("pods").join(pod)
}

/// A file's resources; none if it is not there or damaged.
fn read(path: &Path) -> Vec<Resource> {
    let Ok(bytes) = std::fs::read(path) else {
        return Vec::new();
    };
    match DeltaDiscoveryResponse::decode(&*bytes) {
        Ok(response) => response.resources,
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "kept configuration is damaged");
            Vec::new()
        }
    }
}

/// Names of resources, and what became of them: `None`, gone.
#[derive(Debug, Default)]
struct Change {
    whole: bool,
    resources: BTreeMap<String, Option<Resource>>,
}

fn write(folder: &Path, jobs: &Receiver<Job>) {
    let mut ended = false;
    while !ended && let Ok(first) = jobs.recv() {
        let mut changes: BTreeMap<(String, ResourceType), Change> = BTreeMap::new();
        let mut pods = None;
        for job in std::iter::once(first).chain(std::iter::from_fn(|| jobs.try_recv().ok())) {
            match job {
                Job::Pods(all) => pods = Some(all),
                Job::End => ended = true,
                Job::Update(pod, update, whole) => merge(&mut changes, pod, update, whole),
            }
        }
        if let Some(pods) = pods {
            report(keep_pods(folder, &pods), "pods.json");
        }
        for ((pod, kind), change) in changes {
            report(keep(&place(folder, &pod), kind, change), &pod);
        }
    }
}

fn report(result: io::Result<()>, what: &str) {
    if let Err(error) = result {
        tracing::warn!(what, %error, "the last good configuration could not be kept");
    }
}

fn merge(changes: &mut BTreeMap<(String, ResourceType), Change>, pod: String, update: Update, whole: bool) {
    let change = changes.entry((pod, update.kind)).or_default();
    if whole {
        *change = Change {
            whole,
            resources: BTreeMap::new(),
        };
    }
    for resource in update.resources {
        change.resources.insert(resource.name.clone(), Some(resource));
    }
    for name in update.removed {
        change.resources.insert(name, None);
    }
}

fn keep(folder: &Path, kind: ResourceType, change: Change) -> io::Result<()> {
    // The folder is made with the list of pods; a late word of a pod that went must not bring it back.
    let Some((_, file)) = KEPT.into_iter().find(|(kept, _)| *kept == kind) else {
        return Ok(());
    };
    if !folder.is_dir() {
        return Ok(());
    }
    let path = folder.join(file);
    let mut resources: BTreeMap<String, Resource> = BTreeMap::new();
    if !change.whole {
        resources.extend(read(&path).into_iter().map(|r| (r.name.clone(), r)));
    }
    for (name, resource) in change.resources {
        match resource {
            Some(resource) => drop(resources.insert(name, resource)),
            None => drop(resources.remove(&name)),
        }
    }
    let response = DeltaDiscoveryResponse {
        type_url: kind.url().to_owned(),
        resources: resources.into_values().collect(),
        ..DeltaDiscoveryResponse::default()
    };
    replace(&path, &response.encode_to_vec())
}

fn keep_pods(folder: &Path, pods: &[LocalPod]) -> io::Result<()> {
    let list = serde_json::to_vec(pods).map_err(io::Error::other)?;
    replace(&folder.join("pods.json"), &list)?;
    for pod in pods {
        std::fs::create_dir_all(place(folder, &pod.key()))?;
    }
    for entry in std::fs::read_dir(folder.join("pods"))? {
        let entry = entry?;
        if !pods.iter().any(|pod| *entry.file_name() == *pod.key()) {
            std::fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

/// Writes a file so that it is the old one or the new one, whenever one looks.
pub(super) fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut fresh = path.as_os_str().to_owned();
    fresh.push(".new");
    std::fs::write(&fresh, bytes)?;
    std::fs::rename(&fresh, path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recorded;

    fn local() -> LocalPod {
        let pod = recorded::pod(0);
        LocalPod {
            name: pod.name,
            namespace: pod.identity.namespace,
            uid: "u".into(),
            service_account: pod.identity.service_account,
            trust_domain: pod.identity.trust_domain,
            addresses: pod.addresses,
            labels: BTreeMap::new(),
            token: None,
            listed: false,
        }
    }

    fn update(kind: ResourceType, resources: Vec<Resource>, removed: &[&str]) -> Update {
        Update {
            kind,
            resources,
            removed: removed.iter().map(|n| (*n).to_owned()).collect(),
        }
    }

    #[test]
    fn what_was_taken_is_there_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let pod = local();
        let (keeper, writer) = open(folder.path()).unwrap();
        keeper.pods(vec![pod.clone()]);
        for (file, kind) in recorded::TYPES {
            keeper.update(&pod.key(), update(kind, recorded::resources(0, file), &[]), false);
        }
        writer.finish();
        let restored = restore(folder.path());
        assert_eq!(restored[0].0, pod);
        assert_eq!(restored[0].1, recorded::view(0).0);

        let (keeper, writer) = open(folder.path()).unwrap();
        let name = recorded::resources(0, "lds")[0].name.clone();
        keeper.update(
            &pod.key(),
            update(ResourceType::Listener, vec![], &[&name]),
            false,
        );
        writer.finish();
        let restored = restore(folder.path());
        assert!(!restored[0].1.listeners.contains_key(&name));
        assert!(restored[0].1.listeners.len() > 2);

        let (keeper, writer) = open(folder.path()).unwrap();
        keeper.pods(vec![]);
        keeper.update(
            &pod.key(),
            update(ResourceType::Listener, recorded::resources(0, "lds"), &[]),
            true,
        );
        writer.finish();
        assert!(restore(folder.path()).is_empty());
        assert!(!place(folder.path(), &pod.key()).exists());
    }

    #[test]
    fn damage_is_no_configuration_and_no_panic() {
        let folder = tempfile::tempdir().unwrap();
        assert!(restore(folder.path()).is_empty());
        let pod = local();
        std::fs::write(
            folder.path().join("pods.json"),
            serde_json::to_vec(&[&pod]).unwrap(),
        )
        .unwrap();
        let place = place(folder.path(), &pod.key());
        std::fs::create_dir_all(&place).unwrap();
        std::fs::write(place.join("cds"), b"\xff\xff\xff").unwrap();
        assert_eq!(restore(folder.path())[0].1, PodView::new(pod.pod()));
        std::fs::write(folder.path().join("pods.json"), b"[{").unwrap();
        assert!(restore(folder.path()).is_empty());
    }
}
