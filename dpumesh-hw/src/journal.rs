//! A card's memory on disk: one value, replaced as a whole, that survives a crash at any moment.
//!
//! ```text
//! DIR/state.0, DIR/state.1     alternating: the newer one with a sound checksum counts
//!   dpumesh-card 1 <generation> <octets> <crc32>\n<JSON>
//! DIR/lock                     flock: shared to read, exclusive to change
//! DIR/<name>                   flock: held by one process, as the one that reads a port ([`Journal::try_claim`])
//! ```
//! A new value goes to a temporary file, is synced, and renamed over the *older* slot; so a reader finds the old or the new
//! value whatever happened, even when the newer slot is damaged later. Two damaged slots are an error: a card is never
//! taken for a fresh one because its memory is unreadable.
//!
//! Write-ahead is the caller's part: what is about to be done to a device is stored before it is touched, so that who
//! opens the directory after a crash finds what to undo.

#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use serde::Serialize;
use serde::de::DeserializeOwned;

const SLOTS: [&str; 2] = ["state.0", "state.1"];
const MAGIC: &str = "dpumesh-card";
const VERSION: &str = "1";

/// The directory of a card.
#[derive(Clone, Debug)]
pub struct Journal {
    dir: PathBuf,
}

/// The right to read (or, made by [`Journal::lock`], to change) the value, until dropped.
#[derive(Debug)]
pub struct Guard {
    _lock: Flock<File>,
}

/// Why the value could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Both copies are unreadable.
    #[error("{}: both copies of the card's state are damaged ({reason}); remove the directory to make a fresh card", dir.display())]
    Damaged {
        /// Where.
        dir: PathBuf,
        /// What is wrong with them.
        reason: String,
    },
}

impl Journal {
    /// Makes the directory when it is not there.
    ///
    /// # Errors
    /// `Io`.
    pub fn open(dir: &Path) -> Result<Self, JournalError> {
        fs::create_dir_all(dir).map_err(|source| JournalError::Io {
            path: dir.to_owned(),
            source,
        })?;
        Ok(Self { dir: dir.to_owned() })
    }

    /// The directory, for files of the card's own beside the value.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Waits for the right to change the value.
    ///
    /// # Errors
    /// `Io`.
    pub fn lock(&self) -> Result<Guard, JournalError> {
        self.flock("lock", FlockArg::LockExclusive)
            .map(|lock| Guard { _lock: lock })
    }

    /// Waits for the right to read the value.
    ///
    /// # Errors
    /// `Io`.
    pub fn lock_shared(&self) -> Result<Guard, JournalError> {
        self.flock("lock", FlockArg::LockShared)
            .map(|lock| Guard { _lock: lock })
    }

    /// Takes a lock of this name without waiting; `None` while somebody holds it. A dead holder's is free.
    ///
    /// # Errors
    /// `Io`.
    pub fn try_claim(&self, name: &str) -> Result<Option<Guard>, JournalError> {
        match self.flock(name, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Some(Guard { _lock: lock })),
            Err(JournalError::Io { source, .. }) if source.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn flock(&self, name: &str, kind: FlockArg) -> Result<Flock<File>, JournalError> {
        let path = self.dir.join(name);
        let opened = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path);
        let mut file = opened.map_err(|source| JournalError::Io {
            path: path.clone(),
            source,
        })?;
        loop {
            match Flock::lock(file, kind) {
                Ok(lock) => return Ok(lock),
                Err((back, nix::Error::EINTR)) => file = back,
                Err((_, errno)) => {
                    return Err(JournalError::Io {
                        path,
                        source: errno.into(),
                    });
                }
            }
        }
    }

    /// The value and its generation; `None` on a fresh directory. The guard keeps it from changing meanwhile.
    ///
    /// # Errors
    /// `Io`, `Damaged` when neither copy is sound.
    pub fn load<T: DeserializeOwned>(&self, _guard: &Guard) -> Result<Option<(u64, T)>, JournalError> {
        let mut best: Option<(u64, T)> = None;
        let mut damage = None;
        for slot in SLOTS {
            let path = self.dir.join(slot);
            let octets = match fs::read(&path) {
                Ok(octets) => octets,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(source) => return Err(JournalError::Io { path, source }),
            };
            match decode(&octets) {
                Ok((generation, value)) => {
                    if best.as_ref().is_none_or(|(newest, _)| generation > *newest) {
                        best = Some((generation, value));
                    }
                }
                Err(reason) => damage = Some(format!("{slot}: {reason}")),
            }
        }
        match (best, damage) {
            (None, Some(reason)) => Err(JournalError::Damaged {
                dir: self.dir.clone(),
                reason,
            }),
            (best, _) => Ok(best),
        }
    }

    /// Replaces the value; on return it is on disk. `generation` is one more than the loaded one.
    ///
    /// # Errors
    /// `Io`; the former value is still there.
    pub fn store<T: Serialize>(
        &self,
        _guard: &Guard,
        generation: u64,
        value: &T,
    ) -> Result<(), JournalError> {
        let slot = self.dir.join(SLOTS[(generation % 2) as usize]);
        let temporary = slot.with_extension("new");
        let written = (|| {
            let mut file = File::create(&temporary)?;
            file.write_all(&encode(generation, value)?)?;
            file.sync_all()?;
            fs::rename(&temporary, &slot)?;
            File::open(&self.dir)?.sync_all()
        })();
        written.map_err(|source| JournalError::Io { path: slot, source })
    }

    /// Removes the value, what was claimed, the files called `others`, and the directory, if nothing foreign is in it.
    ///
    /// # Errors
    /// `Io`.
    pub fn remove(self, others: &[&str]) -> Result<(), JournalError> {
        let entries = fs::read_dir(&self.dir).map_err(|source| JournalError::Io {
            path: self.dir.clone(),
            source,
        })?;
        for entry in entries.flatten() {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            let ours = name == "lock" || name.starts_with("state.") || name.ends_with(".port");
            if ours || others.contains(&&*name) {
                let path = entry.path();
                fs::remove_file(&path).map_err(|source| JournalError::Io { path, source })?;
            }
        }
        fs::remove_dir(&self.dir).map_err(|source| JournalError::Io {
            path: self.dir,
            source,
        })
    }
}

fn encode<T: Serialize>(generation: u64, value: &T) -> io::Result<Vec<u8>> {
    let json = serde_json::to_vec(value)?;
    let sum = sum(generation, &json);
    let mut octets = format!("{MAGIC} {VERSION} {generation} {} {sum:08x}\n", json.len()).into_bytes();
    octets.extend(json);
    Ok(octets)
}

fn sum(generation: u64, json: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&generation.to_le_bytes());
    hasher.update(json);
    hasher.finalize()
}

fn decode<T: DeserializeOwned>(octets: &[u8]) -> Result<(u64, T), String> {
    let end = octets
        .iter()
        .position(|octet| *octet == b'\n')
        .ok_or("no header line")?;
    let header = std::str::from_utf8(&octets[..end]).map_err(|_| "header is no text")?;
    let fields: Vec<&str> = header.split(' ').collect();
    let [MAGIC, version, generation, len, found] = fields[..] else {
        return Err("foreign header".into());
    };
    if version != VERSION {
        return Err(format!("version {version}, known is {VERSION}"));
    }
    let generation = generation.parse().map_err(|_| "generation is no number")?;
    let json = &octets[end + 1..];
    if len.parse() != Ok(json.len()) {
        return Err(format!("{} octets instead of {len}", json.len()));
    }
    if u32::from_str_radix(found, 16) != Ok(sum(generation, json)) {
        return Err("checksum differs".into());
    }
    let value = serde_json::from_slice(json).map_err(|error| error.to_string())?;
    Ok((generation, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn journal() -> (tempfile::TempDir, Journal) {
        let dir = tempfile::tempdir().expect("a directory");
        let journal = Journal::open(&dir.path().join("card")).expect("opened");
        (dir, journal)
    }

    fn read(journal: &Journal) -> Option<(u64, String)> {
        journal
            .load(&journal.lock_shared().expect("locked"))
            .expect("readable")
    }

    fn write(journal: &Journal, generation: u64, value: &str) {
        journal
            .store(&journal.lock().expect("locked"), generation, &value)
            .expect("written");
    }

    #[test]
    fn the_newest_value_counts() {
        let (_dir, journal) = journal();
        assert_eq!(read(&journal), None);
        for generation in 1..6 {
            write(&journal, generation, &format!("value {generation}"));
            assert_eq!(read(&journal), Some((generation, format!("value {generation}"))));
        }
    }

    #[test]
    fn a_slot_torn_at_any_octet_gives_the_old_value_or_the_new() {
        let (_dir, journal) = journal();
        write(&journal, 1, "old");
        write(&journal, 2, "new and longer");
        let path = journal.dir.join("state.0");
        let whole = fs::read(&path).expect("there");
        for len in 0..=whole.len() {
            fs::write(&path, &whole[..len]).expect("torn");
            let expected = if len == whole.len() {
                (2, "new and longer")
            } else {
                (1, "old")
            };
            assert_eq!(
                read(&journal),
                Some((expected.0, expected.1.to_owned())),
                "{len} octets"
            );
        }
        for at in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[at] ^= 1;
            fs::write(&path, &flipped).expect("flipped");
            assert_eq!(read(&journal), Some((1, "old".to_owned())), "octet {at}");
        }
    }

    #[test]
    fn a_torn_temporary_file_is_no_harm() {
        let (_dir, journal) = journal();
        write(&journal, 1, "old");
        fs::write(journal.dir.join("state.new"), b"dpumesh-card 1 9").expect("torn");
        assert_eq!(read(&journal), Some((1, "old".to_owned())));
        write(&journal, 2, "new");
        assert_eq!(read(&journal), Some((2, "new".to_owned())));
    }

    #[test]
    fn two_damaged_slots_are_no_fresh_card() {
        let (_dir, journal) = journal();
        write(&journal, 1, "old");
        fs::write(journal.dir.join("state.1"), b"garbage").expect("damaged");
        let answer = journal.load::<String>(&journal.lock().expect("locked"));
        assert!(matches!(answer, Err(JournalError::Damaged { .. })));
    }

    #[test]
    fn a_claim_excludes_others_until_it_is_dropped() {
        let (_dir, journal) = journal();
        let held = journal.try_claim("uplink0.port").expect("tried").expect("free");
        assert!(journal.try_claim("uplink0.port").expect("tried").is_none());
        drop(held);
        assert!(journal.try_claim("uplink0.port").expect("tried").is_some());
        journal.remove(&[]).expect("removed");
    }
}
