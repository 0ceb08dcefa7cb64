//! What nobody asks for: carry on after a restart, read the notes of the plugin, find pods that are gone.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use dpumesh_core::BackendExt;
use dpumesh_core::vf::{LeaseId, ResetLevel};

use super::attachments::is_ours;
use super::journal::{Record, Stage};
use super::{Node, Ungoverned};
use crate::plugin::DELETED;
use crate::talk::AttachmentKey;

impl Node {
    /// Carries on where the last agent ended: takes back what was not finished and what nobody knows. Before anybody is served.
    ///
    /// # Errors
    /// The card does not tell its VFs.
    pub async fn recover(self: &Arc<Self>) -> dpumesh_core::Result<()> {
        let vf = self.card().require_vf()?;
        let states = vf.list().await?;
        let current: BTreeSet<LeaseId> = states
            .iter()
            .filter_map(|state| state.lease.as_ref())
            .map(|lease| lease.id)
            .collect();
        for record in self.records() {
            let lost = record
                .lease
                .as_ref()
                .is_some_and(|lease| !current.contains(&lease.id));
            match record.stage {
                // Where ADD does not succeed without a program, a pod without one is an ADD that was not finished.
                Stage::Bound { governed }
                    if !lost
                        && record.is_namespace_there()
                        && (governed || self.options().ungoverned == Ungoverned::Closed) =>
                {
                    if !governed {
                        self.govern_later(record);
                    }
                }
                _ => {
                    if lost {
                        tracing::error!(key = %record.key, pod = %record.pod, "the card has lost its VF: start the pod anew");
                    }
                    self.take_back(&record, "was not finished").await;
                }
            }
        }
        let known: BTreeSet<LeaseId> = self
            .records()
            .iter()
            .filter_map(|record| record.lease.as_ref())
            .map(|lease| lease.id)
            .collect();
        for lease in states.into_iter().filter_map(|state| state.lease) {
            if is_ours(&lease) && !known.contains(&lease.id) && self.is_leased(lease.id).await {
                tracing::warn!(port = %lease.port, owner = lease.owner.0, "leased for nobody: freed");
                if let Err(error) = vf.release(self.card().fence(), &lease, ResetLevel::Config).await {
                    tracing::error!(port = %lease.port, "cannot be freed: {error}");
                }
            }
        }
        Ok(())
    }

    /// Still, after what was taken back meanwhile.
    async fn is_leased(&self, id: LeaseId) -> bool {
        let Some(vf) = self.card().vf() else { return false };
        let states = vf.list().await.unwrap_or_default();
        states
            .iter()
            .any(|state| state.lease.as_ref().is_some_and(|lease| lease.id == id))
    }

    /// Takes back what belongs to pods whose namespace is gone, and what a plugin left a note about.
    pub async fn sweep(&self, socket: &Path) {
        self.read_notes(socket).await;
        for record in self.records() {
            let closing = matches!(record.stage, Stage::Closing { .. });
            if !closing && !record.is_namespace_there() {
                self.take_back(&record, "its namespace is gone").await;
            }
        }
    }

    async fn take_back(&self, record: &Record, why: &str) {
        tracing::info!(key = %record.key, pod = %record.pod, "taken back: {why}");
        if let Err(error) = self.detach(&record.key).await {
            tracing::error!(key = %record.key, "cannot be taken back yet: {error}");
        }
    }

    /// DELs that came while no agent was there. A note goes when its work is done.
    pub(super) async fn read_notes(&self, socket: &Path) {
        let folder = socket.parent().unwrap_or(Path::new("/")).join(DELETED);
        let notes: Vec<PathBuf> = fs::read_dir(&folder)
            .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
            .unwrap_or_default();
        for note in notes {
            let name = note
                .file_name()
                .map(|name| name.to_string_lossy().into_owned())
                .unwrap_or_default();
            if let Some((container, ifname)) = name.split_once('@') {
                let key = AttachmentKey {
                    container: container.to_owned(),
                    ifname: ifname.to_owned(),
                };
                if let Err(error) = self.detach(&key).await {
                    tracing::error!(%key, "deleted while the agent was away, cannot be taken back yet: {error}");
                    continue;
                }
            }
            if let Err(error) = fs::remove_file(&note) {
                tracing::warn!("{}: {error}", note.display());
            }
        }
    }
}

/// Sweeps every so often; never ends.
pub(super) async fn keep_sweeping(node: Arc<Node>, socket: PathBuf, every: Duration) {
    let mut tick = tokio::time::interval(every);
    tick.tick().await; // the first comes at once, and the start has swept
    loop {
        tick.tick().await;
        node.sweep(&socket).await;
        node.catch_up().await;
    }
}
