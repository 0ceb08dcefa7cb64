//! Where the card and the vendor's library are: everything that was looked at is in the error.

use std::fmt;
use std::path::{Path, PathBuf};

use dpumesh_core::PciAddress;

use crate::sys::{Library, LoadError};

/// PCI vendor of the card (Kube-OVN, "Offload with YUSUR").
pub const VENDOR: u16 = 0x1f47;
/// PCI device of its physical functions.
pub const PF_DEVICE: u16 = 0x1001;
/// PCI device of its virtual functions.
pub const VF_DEVICE: u16 = 0x110f;

/// Where the library is looked for when nobody says.
pub const LIBRARY_PATHS: [&str; 4] = [
    "/usr/lib64/libyusur_np.so",
    "/usr/lib/libyusur_np.so",
    "/usr/local/lib/libyusur_np.so",
    "/opt/yusur/lib/libyusur_np.so",
];

/// No library could be loaded.
#[derive(Debug)]
pub struct NoLibrary {
    /// What became of each file that was tried, in order.
    pub tried: Vec<LoadError>,
}

impl fmt::Display for NoLibrary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("no library of the network processor (symbol yusur_np_table_v1)")?;
        for (i, error) in self.tried.iter().enumerate() {
            write!(f, "{} {error}", if i == 0 { ": tried" } else { ";" })?;
        }
        Ok(())
    }
}

impl std::error::Error for NoLibrary {}

/// Loads the given file, or the first of [`LIBRARY_PATHS`] that is one.
///
/// A given file is the only one that is tried.
///
/// # Errors
/// [`NoLibrary`].
pub fn library(given: Option<&Path>) -> Result<Library, NoLibrary> {
    let usual = || LIBRARY_PATHS.iter().map(PathBuf::from).collect();
    let candidates: Vec<PathBuf> = given.map_or_else(usual, |path| vec![path.to_owned()]);
    let mut tried = Vec::new();
    for path in candidates {
        match Library::load(&path) {
            Ok(library) => return Ok(library),
            Err(error) => tried.push(error),
        }
    }
    Err(NoLibrary { tried })
}

/// There is no such card, or more than one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NoCard {
    /// The bus cannot be read.
    #[error("looked for a Yusur card (PCI 1f47:1001) in {path}: {source}")]
    Bus {
        /// The folder of PCI devices.
        path: PathBuf,
        /// Why it cannot be read.
        source: std::io::Error,
    },
    /// Nothing on the bus is one.
    #[error(
        "no Yusur card: looked for PCI 1f47:1001 among the {devices} devices of {path}{}",
        if *.vfs == 0 { "; is the card seated, and is this the side of it that has the physical function?" }
        else { "; there are only its virtual functions (1f47:110f): this machine was given those alone" }
    )]
    None {
        /// The folder of PCI devices.
        path: PathBuf,
        /// Devices there.
        devices: usize,
        /// Virtual functions of such cards among them.
        vfs: usize,
    },
    /// Nothing is at the address that was given.
    #[error("no PCI device at {address}: looked in {path}")]
    Absent {
        /// The address.
        address: PciAddress,
        /// The folder of PCI devices.
        path: PathBuf,
    },
    /// Something else is at the address that was given.
    #[error(
        "{address} in {path} is PCI {vendor:04x}:{device:04x}, a Yusur card's physical function is 1f47:1001"
    )]
    Other {
        /// The address.
        address: PciAddress,
        /// The folder of PCI devices.
        path: PathBuf,
        /// Its vendor.
        vendor: u16,
        /// Its device.
        device: u16,
    },
    /// Which one?
    #[error("several Yusur cards, say which: {}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "))]
    Several(Vec<PciAddress>),
}

/// The address of the card: the given one if it is one, or the only one there is.
///
/// Of a card with several physical functions the first is its address.
///
/// # Errors
/// [`NoCard`].
pub fn card(sysfs: &Path, given: Option<PciAddress>) -> Result<PciAddress, NoCard> {
    let path = sysfs.join("bus/pci/devices");
    if let Some(address) = given {
        return match ids(&path.join(address.to_string())) {
            None => Err(NoCard::Absent { address, path }),
            Some((VENDOR, PF_DEVICE)) => Ok(address),
            Some((vendor, device)) => Err(NoCard::Other {
                address,
                path,
                vendor,
                device,
            }),
        };
    }
    let listed = std::fs::read_dir(&path).map_err(|source| NoCard::Bus {
        path: path.clone(),
        source,
    })?;
    let (mut devices, mut vfs, mut found) = (0, 0, Vec::new());
    for entry in listed.flatten() {
        devices += 1;
        match ids(&entry.path()) {
            Some((VENDOR, PF_DEVICE)) => {
                let name = entry.file_name();
                found.extend(name.to_str().and_then(|name| name.parse::<PciAddress>().ok()));
            }
            Some((VENDOR, VF_DEVICE)) => vfs += 1,
            _ => {}
        }
    }
    found.sort_unstable_by_key(ToString::to_string);
    found.dedup_by_key(|address| slot(&address.to_string()));
    match found[..] {
        [] => Err(NoCard::None { path, devices, vfs }),
        [only] => Ok(only),
        _ => Err(NoCard::Several(found)),
    }
}

/// Domain, bus and device of an address: what one card shares.
fn slot(address: &str) -> String {
    address.split('.').next().unwrap_or(address).to_owned()
}

fn ids(device: &Path) -> Option<(u16, u16)> {
    let read = |name| {
        let text = std::fs::read_to_string(device.join(name)).ok()?;
        u16::from_str_radix(text.trim().trim_start_matches("0x"), 16).ok()
    };
    Some((read("vendor")?, read("device")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sysfs(devices: &[(&str, &str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().expect("a folder");
        for (address, vendor, device) in devices {
            let folder = root.path().join("bus/pci/devices").join(address);
            std::fs::create_dir_all(&folder).expect("made");
            std::fs::write(folder.join("vendor"), format!("0x{vendor}\n")).expect("written");
            std::fs::write(folder.join("device"), format!("0x{device}\n")).expect("written");
        }
        root
    }

    #[test]
    fn the_only_card_is_found_and_two_functions_are_one_card() {
        let root = sysfs(&[
            ("0000:00:01.0", "8086", "1533"),
            ("0000:3b:00.0", "1f47", "1001"),
            ("0000:3b:00.1", "1f47", "1001"),
            ("0000:3b:02.0", "1f47", "110f"),
        ]);
        let found = card(root.path(), None).expect("found");
        assert_eq!(found.to_string(), "0000:3b:00.0");
        assert_eq!(card(root.path(), Some(found)).expect("found"), found);
    }

    #[test]
    fn what_is_not_there_is_said_with_where_it_was_looked_for() {
        let root = sysfs(&[("0000:00:01.0", "8086", "1533"), ("0000:3b:02.0", "1f47", "110f")]);
        let path = root.path().join("bus/pci/devices").display().to_string();
        let at = |text: &str| Some(text.parse::<PciAddress>().expect("an address"));
        let cases = [
            (None, vec!["1f47:1001", "2 devices", "1f47:110f", &path]),
            (at("0000:05:00.0"), vec!["no PCI device at 0000:05:00.0", &path]),
            (at("0000:00:01.0"), vec!["is PCI 8086:1533", "1f47:1001", &path]),
        ];
        for (given, expected) in cases {
            let error = card(root.path(), given).expect_err("no card").to_string();
            for part in expected {
                assert!(error.contains(part), "`{error}` lacks `{part}`");
            }
        }
        let error = card(Path::new("/nowhere"), None).expect_err("no bus").to_string();
        assert!(error.contains("/nowhere/bus/pci/devices"), "{error}");
    }

    #[test]
    fn two_cards_are_told_apart() {
        let root = sysfs(&[("0000:3b:00.0", "1f47", "1001"), ("0000:86:00.0", "1f47", "1001")]);
        let error = card(root.path(), None).expect_err("which?").to_string();
        assert!(error.contains("0000:3b:00.0, 0000:86:00.0"), "{error}");
    }

    #[test]
    fn every_place_where_the_library_was_looked_for_is_named() {
        let error = library(None).map(|_| ());
        if let Err(error) = error {
            let text = error.to_string();
            for path in LIBRARY_PATHS {
                assert!(text.contains(path), "`{text}` lacks {path}");
            }
            assert!(text.contains("yusur_np_table_v1"), "{text}");
        }
        let given = library(Some(Path::new("/nowhere/lib.so")))
            .expect_err("absent")
            .to_string();
        assert!(given.contains("/nowhere/lib.so"), "{given}");
        assert!(
            !given.contains(LIBRARY_PATHS[0]),
            "a given file is the only one: {given}"
        );
    }
}
