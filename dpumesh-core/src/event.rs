//! What a card reports by itself.

use serde::{Deserialize, Serialize};

use crate::backend::Epoch;
use crate::error::Error;
use crate::port::PortRef;
use crate::steering::{Cookie, Counters, Owner};

/// An event of one backend, in the order it happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Event {
    /// The card is gone; calls fail with `DeviceLost` until `Back`.
    Lost {
        /// The life that ended.
        epoch: Epoch,
    },
    /// The card is usable again, with nothing of its former life but what `list` shows.
    Back {
        /// The new life.
        epoch: Epoch,
    },
    /// A port's carrier changed.
    Link {
        /// Which port.
        port: PortRef,
        /// Carrier now.
        up: bool,
    },
    /// The card's health changed; `None` is healthy.
    Health(Option<Error>),
    /// A finite resource passed its high-water mark; raised again only after it fell below.
    HighWater {
        /// Name, as in occupancy.
        resource: String,
        /// In use.
        used: u64,
        /// How many there are.
        limit: u64,
    },
    /// Rules were removed because nothing hit them, with their final counters.
    Aged {
        /// Whose rules.
        owner: Owner,
        /// Which, and what they had counted.
        rules: Vec<(Cookie, Option<Counters>)>,
    },
    /// A VF appeared.
    VfAdded(PortRef),
    /// A VF disappeared without having been released.
    VfRemoved(PortRef),
    /// The subscriber was too slow: so many events were lost. Read the state again.
    Overflowed(u64),
}
