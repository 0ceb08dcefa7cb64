//! [`Disturb`]: what happens to a card that no call of the contract brings about: a carrier falls, a table stops taking
//! changes, firmware gives fewer VFs. Cases ask for one [`Disturbance`] each, and are skipped where it cannot be had.

use async_trait::async_trait;
use dpumesh_core::offload::ConnectionToken;
use dpumesh_core::{Error, ErrorKind, PortRef, Result};

use super::Rig;
use super::check::{CaseResult, Halt};

/// Brings about what no call of the contract can.
#[async_trait]
pub trait Disturb: Send + Sync {
    /// Makes it so, from now on.
    ///
    /// # Errors
    /// `Unsupported` ([`Disturbance::not_here`]): not with this card, and the case is skipped. Else what kept it from happening.
    async fn disturb(&self, what: &Disturbance) -> Result<()>;
}

/// What can happen to a card. More may come: a fixture answers what it does not know by [`Disturbance::not_here`].
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Disturbance {
    /// The software behind the card's tables stands still (`true`) or works again: what is not in hardware acts on no
    /// frame.
    SoftwareStops(bool),
    /// The card carries out so many more changes of its rules and then fails with `Io`, until `None` mends it.
    RulesFail {
        /// Changes that still work.
        after: Option<usize>,
    },
    /// Every change of a VF's attributes fails with `Io`, also the one that a release makes, or works again.
    AttributesFail {
        /// Which VF.
        port: PortRef,
        /// Whether they fail.
        fail: bool,
    },
    /// The card gives at most so many VFs, whatever it is asked for, until `None` mends it.
    FewerVfs(Option<u16>),
    /// An open port gives so many more of the frames that wait there, then fails with `Io`, until `None` mends it.
    PortFails {
        /// Which port.
        port: PortRef,
        /// Frames that it still gives.
        after: Option<usize>,
    },
    /// A port's carrier comes or goes.
    Carrier {
        /// Which port.
        port: PortRef,
        /// Carrier from now on.
        up: bool,
    },
    /// The card's health changes; `None` is healthy.
    Health(Option<Error>),
    /// The network processor passes octets of a connection that it carries.
    Passed {
        /// Which connection.
        token: ConnectionToken,
        /// Octets from client to server.
        up: u32,
        /// Octets from server to client.
        down: u32,
    },
    /// Activating a program fails with `Fault`, or works again.
    ActivationFails(bool),
}

impl Disturbance {
    /// Its name in reports, as `rig.disturb.carrier`.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::SoftwareStops(_) => "rig.disturb.software",
            Self::RulesFail { .. } => "rig.disturb.rules",
            Self::AttributesFail { .. } => "rig.disturb.attributes",
            Self::FewerVfs(_) => "rig.disturb.vfs",
            Self::PortFails { .. } => "rig.disturb.port",
            Self::Carrier { .. } => "rig.disturb.carrier",
            Self::Health(_) => "rig.disturb.health",
            Self::Passed { .. } => "rig.disturb.connection",
            Self::ActivationFails(_) => "rig.disturb.activation",
        }
    }

    /// The answer of a fixture that cannot bring it about.
    pub fn not_here(&self) -> Error {
        Error::new(
            ErrorKind::Unsupported,
            self.name(),
            "the fixture cannot bring this about",
        )
    }
}

/// Disturbs the card, or ends the case as not supported.
pub(super) async fn disturb(rig: &dyn Rig, what: Disturbance) -> CaseResult {
    let done = match rig.disturb() {
        Some(able) => able.disturb(&what).await,
        None => Err(what.not_here()),
    };
    match done {
        Err(error) if error.kind == ErrorKind::Unsupported => {
            Err(Halt::not_supported(what.name(), error.message.clone()))
        }
        done => Ok(done?),
    }
}
