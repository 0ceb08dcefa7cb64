//! The memory backend as a foreign library, made by `export_backend!`: what a Rust backend of a vendor looks like. The kit
//! runs against it in `tests/kit.rs`, through the dynamic linker.
//!
//! Its configuration is a JSON object whose member `card` names the card: the same name is the same card, as long as the
//! process lives.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use dpumesh_core::offload::{Program, TableKind};
use dpumesh_core::vf::VfLocation;
use dpumesh_core::{Error, ErrorKind, Frame, PortRef};
use dpumesh_hw::loader::export::{CardRig, Exported};
use dpumesh_hw::memory::{MemoryCard, TableSpec, program};

dpumesh_hw::export_backend!(open, rig, programs());

static CARDS: Mutex<Option<HashMap<String, MemoryCard>>> = Mutex::new(None);

fn open(config: &str) -> Result<Exported, Error> {
    let refuse = |message: String| Error::new(ErrorKind::Invalid, "backend.open", message);
    let config: serde_json::Value = serde_json::from_str(config)
        .map_err(|error| refuse(format!("the configuration is no JSON: {error}")))?;
    let name = config["card"]
        .as_str()
        .ok_or_else(|| refuse("the configuration has no text `card`".to_owned()).field("card"))?;
    let mut cards = CARDS.lock().unwrap_or_else(PoisonError::into_inner);
    let card = cards
        .get_or_insert_default()
        .entry(name.to_owned())
        .or_default()
        .clone();
    Ok(Exported::with_rig(card.both(), Arc::new(Bench(card))))
}

/// What the kit may do to a card.
struct Bench(MemoryCard);

impl CardRig for Bench {
    fn lose(&self) {
        self.0.lose();
    }

    fn bring_back(&self) {
        self.0.restore();
    }

    fn inject(&self, port: PortRef, octets: &[u8]) -> bool {
        let wire = self.0.wire(port);
        wire.map(|wire| wire.send(Frame::copy_of(octets))).is_some()
    }

    fn observe(&self, port: PortRef) -> Option<Vec<u8>> {
        let arrival = self.0.wire(port)?.receive()?;
        Some(arrival.frame.octets().to_vec())
    }

    fn netns(&self, path: &str, present: bool) {
        let path = PathBuf::from(path);
        if present {
            self.0.add_netns(&path, &[]);
        } else {
            self.0.remove_netns(&path);
        }
    }

    fn jam(&self, port: PortRef, jammed: bool) {
        self.0.jam(port, jammed);
    }

    fn strand(&self, port: PortRef) {
        self.0.strand(port, VfLocation::Driver("vfio-pci".to_owned()));
    }
}

/// As those of the kit's own fixture of this backend.
fn programs() -> Vec<Program> {
    let table = |name: &str, kind| TableSpec {
        name: name.to_owned(),
        kind,
        key_len: 6,
        value_len: 4,
        capacity: 300,
    };
    vec![
        program("switch", &[table("peers", TableKind::Exact)]),
        program("router", &[table("routes", TableKind::Lpm)]),
    ]
}
