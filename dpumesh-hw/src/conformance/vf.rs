//! Leases of virtual functions: the sentences of [`dpumesh_core::vf::VfAllocator`].
//!
//! | file | about |
//! |---|---|
//! | `lease` | who gets which VF, and what a lease is worth |
//! | `attributes` | MAC, VLAN, MTU and the like, as transactions |
//! | `cancel` | calls that were given up |
//! | `place` | attach and detach |
//! | `release` | giving back, and getting back what was not given |
//! | `admission` | the SoC's half of a lease |
//! | `count` | how many VFs there are |

mod admission;
mod attributes;
mod cancel;
mod count;
mod lease;
mod place;
mod release;

use std::sync::Arc;

use dpumesh_core::vf::{Released, ResetLevel, VfConfig, VfLease, VfRequest, VfState};
use dpumesh_core::{Backend, BackendExt, Fence, MacAddr, Mtu, PortRef, VfAllocator};

use super::Rig;
use super::check::{CaseResult, Halt};

pub(super) use admission::*;
pub(super) use attributes::*;
pub(super) use cancel::*;
pub(super) use count::*;
pub(super) use lease::*;
pub(super) use place::*;
pub(super) use release::*;

/// The host's half with its VF part at hand.
struct Host {
    backend: Arc<dyn Backend>,
}

impl Host {
    fn of(rig: &dyn Rig) -> Self {
        Self { backend: rig.host() }
    }

    fn vf(&self) -> Result<&dyn VfAllocator, Halt> {
        Ok(self.backend.require_vf()?)
    }

    fn fence(&self) -> Fence {
        self.backend.fence()
    }

    async fn lease(&self, owner: &str) -> Result<VfLease, Halt> {
        Ok(self.vf()?.lease(self.fence(), &VfRequest::new(owner)).await?)
    }

    async fn configure(&self, lease: &VfLease, config: VfConfig) -> CaseResult {
        Ok(self.vf()?.configure(self.fence(), lease, &config).await?)
    }

    async fn release(&self, lease: &VfLease) -> Result<Released, Halt> {
        Ok(self
            .vf()?
            .release(self.fence(), lease, ResetLevel::Config)
            .await?)
    }

    async fn state(&self, port: PortRef) -> Result<VfState, Halt> {
        let states = self.vf()?.list().await?;
        states
            .into_iter()
            .find(|state| state.port == port)
            .ok_or_else(|| Halt::failed(format!("list does not show {port}")))
    }

    async fn leases(&self) -> Result<Vec<VfLease>, Halt> {
        let states = self.vf()?.list().await?;
        Ok(states.into_iter().filter_map(|state| state.lease).collect())
    }
}

fn mac(last: u8) -> VfConfig {
    VfConfig {
        mac: Some(MacAddr([2, 0xc0, 0xff, 0xee, 0, last])),
        ..VfConfig::default()
    }
}

fn mtu(octets: u16) -> VfConfig {
    VfConfig {
        mtu: Mtu::try_from(octets).ok(),
        ..VfConfig::default()
    }
}
