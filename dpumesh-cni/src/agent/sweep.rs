//! What nobody asks for: carry on after a restart, read the notes of the plugin, find pods that are gone.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use dpumesh_core::BackendExt;
use dpumesh_core::vf::{LeaseId, ResetLevel, VfState};

use super::attachments::is_ours;
use super::journal::{Record, Stage};
use super::{Node, Ungoverned};
use crate::talk;

impl Node {
    /// Carries on where the last agent ended: takes back what was not finished and what nobody knows. Before anybody is served.
    ///
    /// # Errors
    /// The card does not tell its VFs.
    pub async fn recover(self: &Arc<Self>) -> dpumesh_core::Result<()> {
        let vf = self.card().require_vf()?;
        let states = vf.list().await?;
        let current = leases(&states);
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
                    if governed {
                        self.resume(&record).await;
                    } else {
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

    /// Takes back what belongs to pods whose namespace is gone or whose VF the card has lost, and what a plugin left a note
    /// about.
    pub async fn sweep(&self, socket: &Path) {
        self.read_notes(socket).await;
        // Before the leases are listed: one that is given meanwhile must not count as lost.
        let records = self.records();
        let current = match self.card().vf() {
            Some(vf) => vf.list().await.ok().map(|states| leases(&states)),
            None => None,
        };
        for record in records {
            let lost = match (&current, &record.lease) {
                (Some(current), Some(lease)) => !current.contains(&lease.id),
                _ => false,
            };
            if matches!(record.stage, Stage::Closing { .. }) {
                continue;
            }
            if !record.is_namespace_there() {
                self.take_back(&record, "its namespace is gone").await;
            } else if lost {
                tracing::error!(key = %record.key, pod = %record.pod, "the card has lost its VF: start the pod anew");
                self.take_back(&record, "the card has lost its VF").await;
            }
        }
    }

    /// Takes back what a record says, unless there is another attachment of that name by now.
    async fn take_back(&self, record: &Record, why: &str) {
        let _held = self.hold(&record.key).await;
        let same = |now: &Record| now.lease == record.lease && now.netns_inode == record.netns_inode;
        if !self.record(&record.key).is_some_and(|now| same(&now)) {
            return;
        }
        tracing::info!(key = %record.key, pod = %record.pod, "taken back: {why}");
        if let Err(error) = self.close(&record.key).await {
            tracing::error!(key = %record.key, "cannot be taken back yet: {error}");
        }
    }

    /// DELs that came while no agent was there. A note goes when its work is done.
    pub(super) async fn read_notes(&self, socket: &Path) {
        let notes: Vec<PathBuf> = fs::read_dir(talk::notes_of(socket))
            .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
            .unwrap_or_default();
        for note in notes {
            if let Some(key) = talk::key_of(&note)
                && let Err(error) = self.detach(&key).await
            {
                tracing::error!(%key, "deleted while the agent was away, cannot be taken back yet: {error}");
                continue;
            }
            if let Err(error) = fs::remove_file(&note) {
                tracing::warn!("{}: {error}", note.display());
            }
        }
    }
}

fn leases(states: &[VfState]) -> BTreeSet<LeaseId> {
    let leases = states.iter().filter_map(|state| state.lease.as_ref());
    leases.map(|lease| lease.id).collect()
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
