//! [`Journal`]: every attachment, on disk before anything is done about it.
//!
//! ```text
//! DIR/attachments.json   {"version":1,"records":[…]}, replaced as a whole: new file, sync, rename, sync of the folder
//! DIR/lock               flock of the one agent that runs
//! ```
//! A reader finds the old or the new state whatever happened between. One that cannot be read is an error: an agent that took
//! it for empty would give the VFs of running pods away.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use dpumesh_core::vf::VfLease;
use dpumesh_core::{MacAddr, Mtu};
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use crate::talk::{AttachmentKey, PodName};

const FILE: &str = "attachments.json";
const VERSION: u32 = 1;

/// What is known of an attachment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// Which attachment.
    pub key: AttachmentKey,
    /// Name of its network.
    pub network: String,
    /// Path of the pod's namespace.
    pub netns: PathBuf,
    /// Inode number of that namespace: a path may come to mean another one.
    pub netns_inode: u64,
    /// Who the pod is.
    pub pod: PodName,
    /// How far it is.
    pub stage: Stage,
    /// Its VF, from when one was leased.
    pub lease: Option<VfLease>,
    /// The VF's MAC, from when it was in the pod.
    pub mac: Option<MacAddr>,
    /// The VF's MTU, from when it was in the pod.
    pub mtu: Option<Mtu>,
    /// Its addresses, from when it was bound.
    pub addresses: Vec<IpAddr>,
}

/// How far an attachment is; see [`crate::agent`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// A VF is about to be leased and moved.
    Begun,
    /// The VF is in the pod.
    Attached,
    /// The dataplane shall know the port.
    Bound {
        /// The pod's program was acknowledged: its rules shall be installed.
        governed: bool,
    },
    /// It is being taken away.
    Closing {
        /// The dataplane may know the port: it has to close it first.
        admitted: bool,
    },
}

impl Record {
    /// Whether the dataplane may know the port.
    pub fn is_admitted(&self) -> bool {
        matches!(
            self.stage,
            Stage::Bound { .. } | Stage::Closing { admitted: true }
        )
    }

    /// Whether the pod's namespace is the one that it was.
    pub fn is_namespace_there(&self) -> bool {
        inode(&self.netns).is_ok_and(|inode| inode == self.netns_inode)
    }
}

/// The number by which the kernel knows the namespace at a path.
pub(super) fn inode(netns: &Path) -> io::Result<u64> {
    use std::os::unix::fs::MetadataExt;
    fs::metadata(netns).map(|file| file.ino())
}

/// The attachments of this host.
#[derive(Debug)]
pub struct Journal {
    folder: PathBuf,
    records: BTreeMap<AttachmentKey, Record>,
    _lock: Flock<File>,
}

/// Why there is no journal.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// A file.
    #[error("{}: {error}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// Somebody else has it.
    #[error("{}: another istio-dpu-agent works with this folder; end it, or give this one a --state of its own", .0.display())]
    Locked(PathBuf),
    /// It cannot be read.
    #[error("{}: {reason}; move it away only after the node was drained: without it the VFs of running pods are taken back", path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct OnDisk {
    version: u32,
    records: Vec<Record>,
}

impl Journal {
    /// Opens the journal in a folder, made for this user alone when it is not there. Blocks for some milliseconds.
    ///
    /// # Errors
    /// Another agent has it, or it cannot be read.
    pub fn open(folder: &Path) -> Result<Self, JournalError> {
        let at = |path: PathBuf| move |error| JournalError::File { path, error };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .map_err(at(folder.to_owned()))?;
        let path = folder.join("lock");
        let mut options = File::options();
        let file = options
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path);
        let lock = Flock::lock(file.map_err(at(path))?, FlockArg::LockExclusiveNonblock)
            .map_err(|_| JournalError::Locked(folder.to_owned()))?;
        let path = folder.join(FILE);
        let records = match fs::read(&path) {
            Ok(octets) => decode(&octets).map_err(|reason| JournalError::Damaged { path, reason })?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => return Err(at(path)(error)),
        };
        Ok(Self {
            folder: folder.to_owned(),
            records,
            _lock: lock,
        })
    }

    /// What is known of an attachment.
    pub fn get(&self, key: &AttachmentKey) -> Option<&Record> {
        self.records.get(key)
    }

    /// Every attachment, by key.
    pub fn records(&self) -> impl Iterator<Item = &Record> {
        self.records.values()
    }

    /// Writes a record down, in place of an older one. Afterwards it is on disk.
    ///
    /// # Errors
    /// The file could not be written; then nothing has changed.
    pub fn put(&mut self, record: Record) -> Result<(), JournalError> {
        let key = record.key.clone();
        let before = self.records.insert(key.clone(), record);
        self.save().inspect_err(|_| {
            match before {
                Some(before) => self.records.insert(key, before),
                None => self.records.remove(&key),
            };
        })
    }

    /// Forgets a record.
    ///
    /// # Errors
    /// The file could not be written; then nothing has changed.
    pub fn remove(&mut self, key: &AttachmentKey) -> Result<(), JournalError> {
        let Some(before) = self.records.remove(key) else {
            return Ok(());
        };
        self.save().inspect_err(|_| {
            self.records.insert(key.clone(), before);
        })
    }

    fn save(&self) -> Result<(), JournalError> {
        let disk = OnDisk {
            version: VERSION,
            records: self.records.values().cloned().collect(),
        };
        let path = self.folder.join(FILE);
        let write = || {
            let octets = serde_json::to_vec(&disk)?;
            let new = path.with_extension("new");
            let mut options = File::options();
            let mut file = options
                .create(true)
                .truncate(true)
                .write(true)
                .mode(0o600)
                .open(&new)?;
            file.write_all(&octets)?;
            file.sync_all()?;
            fs::rename(&new, &path)?;
            File::open(&self.folder)?.sync_all()
        };
        write().map_err(|error: io::Error| JournalError::File {
            path: path.clone(),
            error,
        })
    }
}

fn decode(octets: &[u8]) -> Result<BTreeMap<AttachmentKey, Record>, String> {
    let disk: OnDisk = serde_json::from_slice(octets).map_err(|error| error.to_string())?;
    if disk.version != VERSION {
        return Err(format!(
            "is of version {}, this agent writes {VERSION}",
            disk.version
        ));
    }
    Ok(disk
        .records
        .into_iter()
        .map(|record| (record.key.clone(), record))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(container: &str) -> Record {
        Record {
            key: AttachmentKey {
                container: container.to_owned(),
                ifname: "eth0".to_owned(),
            },
            network: "mesh".to_owned(),
            netns: "/run/netns/x".into(),
            netns_inode: 7,
            pod: PodName::default(),
            stage: Stage::Bound { governed: true },
            lease: None,
            mac: None,
            mtu: None,
            addresses: vec!["10.244.1.2".parse().expect("an address")],
        }
    }

    #[test]
    fn what_was_put_is_there_after_a_restart() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut journal = Journal::open(folder.path()).expect("opened");
        journal.put(record("a")).expect("written");
        journal.put(record("b")).expect("written");
        journal.remove(&record("a").key).expect("written");
        assert!(matches!(
            Journal::open(folder.path()),
            Err(JournalError::Locked(_))
        ));
        drop(journal);
        let journal = Journal::open(folder.path()).expect("opened");
        assert_eq!(journal.records().collect::<Vec<_>>(), [&record("b")]);
    }

    #[test]
    fn a_damaged_journal_is_never_taken_for_an_empty_one() {
        let folder = tempfile::tempdir().expect("a folder");
        Journal::open(folder.path())
            .expect("opened")
            .put(record("a"))
            .expect("written");
        let path = folder.path().join(FILE);
        let whole = fs::read(&path).expect("there");
        for cut in 0..whole.len() {
            fs::write(&path, &whole[..cut]).expect("cut");
            let error = Journal::open(folder.path()).expect_err("damaged");
            assert!(matches!(error, JournalError::Damaged { .. }), "{error}");
        }
        let newer = String::from_utf8(whole)
            .expect("JSON")
            .replace("\"version\":1", "\"version\":2");
        fs::write(&path, newer).expect("written");
        assert!(
            Journal::open(folder.path())
                .expect_err("newer")
                .to_string()
                .contains("version 2")
        );
    }

    #[test]
    fn what_cannot_be_written_has_not_happened() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut journal = Journal::open(folder.path()).expect("opened");
        journal.put(record("a")).expect("written");
        fs::create_dir(folder.path().join("attachments.new")).expect("in the way");
        journal.put(record("b")).expect_err("not written");
        journal.remove(&record("a").key).expect_err("not written");
        assert_eq!(journal.records().collect::<Vec<_>>(), [&record("a")]);
    }
}
