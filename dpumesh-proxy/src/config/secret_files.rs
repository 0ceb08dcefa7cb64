//! [`SecretFiles`]: secrets by SDS from files (`sds_config.path_config_source`), over another store.
//!
//! Such a secret has a name of its own here, [`name`], so that the store beneath never hears of it. A file is a `DiscoveryResponse` of
//! `Secret`s; it is looked at as every xDS file is, and a new content serves the next handshake: nothing is drained. A content that
//! is refused, or that lacks a secret, leaves the last good one.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::files::{SECRETS, Stamp, read_file, stamp};
use super::translate_tls::{Content, content};
use crate::config::ConfigError;
use crate::tls::{Certified, Held, Listed, Roots, Secrets};

/// What a name of a secret from a file begins with.
pub(super) const PREFIX: &str = "sds-file:";

/// The name by which a secret of a file is asked for.
pub(super) fn name(file: &str, secret: &str) -> Arc<str> {
    format!("{PREFIX}{secret}|{file}").into()
}

/// The file and the secret that a name stands for; `None` where the store beneath is meant.
fn parse(name: &str) -> Option<(&str, &str)> {
    let (secret, file) = name.strip_prefix(PREFIX)?.split_once('|')?;
    Some((file, secret))
}

/// Secrets from files, and those of the store beneath.
#[derive(Debug)]
pub(crate) struct SecretFiles {
    beneath: Arc<dyn Secrets>,
    held: Held,
    files: Mutex<BTreeMap<String, File>>,
}

/// A file in use.
#[derive(Debug, Default)]
struct File {
    /// Whether it was ever looked at.
    seen: bool,
    /// The content that was read last, whether it was taken or not.
    stamp: Option<Stamp>,
    /// A state seen once: a file written in place is read when two looks agree.
    settling: Option<Stamp>,
    /// Names that the configuration has, in full.
    certificates: BTreeSet<Arc<str>>,
    roots: BTreeSet<Arc<str>>,
}

impl SecretFiles {
    pub(crate) fn over(beneath: Arc<dyn Secrets>) -> Self {
        Self {
            beneath,
            held: Held::default(),
            files: Mutex::default(),
        }
    }

    fn files(&self) -> MutexGuard<'_, BTreeMap<String, File>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this file is in use.
    pub(crate) fn reads(&self, file: &str) -> bool {
        self.files().contains_key(file)
    }

    /// Looks at the files. `tell` hears of each new content, once, that it is in force or why not.
    pub(crate) fn look(&self, tell: &mut dyn FnMut(&str, Result<(), ConfigError>)) {
        for (path, file) in &mut *self.files() {
            let now = stamp(path);
            if file.seen {
                if now.is_none() || now == file.stamp {
                    continue;
                }
                let replaced = now.as_ref().map(Stamp::inode) != file.stamp.as_ref().map(Stamp::inode);
                if !replaced && file.settling != now {
                    file.settling = now;
                    continue;
                }
            }
            (file.seen, file.stamp) = (true, now);
            tell(path, self.read(path, file));
        }
    }

    fn read(&self, path: &str, file: &File) -> Result<(), ConfigError> {
        let mut contents = Vec::new();
        for item in read_file(SECRETS, path)?.items {
            let (secret, content) = content(&item.at).map_err(|error| error.in_file(path))?;
            contents.push((name(path, &secret), content));
        }
        for wanted in file.certificates.iter().chain(&file.roots) {
            let wants_roots = file.roots.contains(wanted);
            let is_there = contents
                .iter()
                .any(|(name, content)| name == wanted && matches!(content, Content::Roots(_)) == wants_roots);
            if !is_there {
                let secret = parse(wanted).map_or(&**wanted, |(_, secret)| secret);
                let what = if wants_roots {
                    "validation_context"
                } else {
                    "tls_certificate"
                };
                return Err(
                    ConfigError::new("resources", format!("no secret {secret:?} with a {what}"))
                        .in_file(path),
                );
            }
        }
        for (name, content) in contents {
            match content {
                Content::Certified(certified) => self.held.put(&name, certified),
                Content::Roots(roots) => self.held.put_roots(&name, roots),
            }
        }
        Ok(())
    }
}

impl Secrets for SecretFiles {
    fn certificate(&self, name: &str) -> Option<Arc<Certified>> {
        match parse(name) {
            Some(_) => self.held.certificate(name),
            None => self.beneath.certificate(name),
        }
    }

    fn roots(&self, name: &str) -> Option<Arc<Roots>> {
        match parse(name) {
            Some(_) => self.held.roots(name),
            None => self.beneath.roots(name),
        }
    }

    /// Files that are new are read with the next look.
    fn want(&self, certificates: &BTreeSet<Arc<str>>, roots: &BTreeSet<Arc<str>>) {
        let mut files = BTreeMap::<String, File>::new();
        let mut beneath = (BTreeSet::new(), BTreeSet::new());
        for wanted in certificates {
            match parse(wanted) {
                Some((file, _)) => {
                    let file = files.entry(file.to_owned()).or_default();
                    file.certificates.insert(Arc::clone(wanted));
                }
                None => drop(beneath.0.insert(Arc::clone(wanted))),
            }
        }
        for wanted in roots {
            match parse(wanted) {
                Some((file, _)) => drop(
                    files
                        .entry(file.to_owned())
                        .or_default()
                        .roots
                        .insert(Arc::clone(wanted)),
                ),
                None => drop(beneath.1.insert(Arc::clone(wanted))),
            }
        }
        self.beneath.want(&beneath.0, &beneath.1);
        let mut known = self.files();
        for (path, file) in &mut files {
            if let Some(before) = known.remove(path) {
                // Where more is wanted of a file, it is read once more.
                let enough =
                    file.certificates.is_subset(&before.certificates) && file.roots.is_subset(&before.roots);
                if enough {
                    (file.seen, file.stamp, file.settling) = (before.seen, before.stamp, before.settling);
                }
            }
        }
        for secret in known
            .values()
            .flat_map(|gone| gone.certificates.iter().chain(&gone.roots))
        {
            self.held.remove(secret);
        }
        *known = files;
    }

    fn list(&self) -> Vec<Listed> {
        let plain = |mut listed: Listed| {
            if let Some((_, secret)) = parse(&listed.name) {
                listed.name = secret.to_owned();
            }
            listed
        };
        let files = self.files();
        let certificates = files.values().flat_map(|file| &file.certificates);
        let certificates =
            certificates.map(|name| Listed::certificate(name, self.held.certificate(name).as_deref()));
        let roots = files.values().flat_map(|file| &file.roots);
        let roots = roots.map(|name| Listed::roots(name, self.held.roots(name).as_deref()));
        self.beneath
            .list()
            .into_iter()
            .chain(certificates.chain(roots).map(plain))
            .collect()
    }
}
