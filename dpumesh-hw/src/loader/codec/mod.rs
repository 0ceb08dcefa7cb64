//! The contract's types as structs of the interface, both ways: `put_…` writes into an arena, `get_…` reads and checks.
//!
//! One pair per type serves both sides: the loader puts requests and gets answers, an exported backend the other way around.
//! Everything that is read is checked for what the contract's types cannot hold; the message names the field.

mod card;
mod error;
mod offload;
mod port;
mod steering;
mod vf;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use dpumesh_core::{ControllerId, Mtu, PciAddress, PfIndex, PortRef, VfIndex};

pub(crate) use card::*;
pub(crate) use error::*;
pub(crate) use offload::*;
pub(crate) use port::*;
pub(crate) use steering::*;
pub(crate) use vf::*;

use super::abi::*;
use super::arena::{Broken, sized};

/// What cannot be said over the interface has this code; a reader refuses it.
const UNKNOWN_CODE: u32 = u32::MAX;

/// Two functions between an enumeration and its codes.
macro_rules! codes {
    ($to:ident, $from:ident, $type:ty, $code:ty, $($variant:pat => $value:expr, $number:ident;)*) => {
        #[allow(unreachable_patterns, reason = "some of the enumerations may grow")]
        pub(crate) fn $to(value: $type) -> $code {
            match value {
                $($variant => $number,)*
                _ => $crate::loader::codec::UNKNOWN_CODE as $code,
            }
        }

        pub(crate) fn $from(code: $code, what: &str) -> Result<$type, $crate::loader::arena::Broken> {
            match code {
                $($number => Ok($value),)*
                _ => Err(format!("{what} is {code}, which means nothing")),
            }
        }
    };
}
pub(crate) use codes;

// Sizes of version 1.0: never to be changed, since older libraries send these.
sized! {
    dm_arena = 40, dm_rows = 32, dm_error = 840, dm_call = 40, dm_completion = 16, dm_host = 24, dm_info = 392,
    dm_capabilities = 288, dm_pattern = 168, dm_action = 96, dm_rule = 72, dm_rules = 24, dm_verdict = 40,
    dm_operation = 40, dm_batch = 24, dm_change = 64, dm_outcome = 80, dm_of_owner = 16, dm_installed = 32,
    dm_cookies = 32, dm_count = 40, dm_miss = 16, dm_occupancy = 40, dm_number = 16, dm_vf_count = 16,
    dm_vf_config = 48, dm_vf_request = 72, dm_vf_lease = 64, dm_attachment = 40, dm_vf_order = 56, dm_attached = 20,
    dm_vf_state = 72, dm_slot = 8, dm_program = 72, dm_program_info = 64, dm_table_info = 48, dm_entry = 64,
    dm_entries = 24, dm_connection = 176, dm_offload_stats = 32, dm_port_info = 80, dm_frame = 48, dm_aged = 56,
    dm_event = 96, dm_ops = 360, dm_hooks = 72,
}

pub(crate) fn put_port(port: PortRef) -> dm_port {
    let of = |kind, controller, pf, index| dm_port {
        kind,
        controller,
        pf,
        index,
    };
    match port {
        PortRef::Uplink(index) => of(DM_PORT_UPLINK, 0, 0, index),
        PortRef::Pf { controller, pf } => of(DM_PORT_PF, controller.0, pf.0, 0),
        PortRef::Vf { controller, pf, vf } => of(DM_PORT_VF, controller.0, pf.0, vf.0),
        PortRef::Stack(index) => of(DM_PORT_STACK, 0, 0, index),
    }
}

pub(crate) fn get_port(port: dm_port, what: &str) -> Result<PortRef, Broken> {
    let (controller, pf) = (ControllerId(port.controller), PfIndex(port.pf));
    match port.kind {
        DM_PORT_UPLINK => Ok(PortRef::Uplink(port.index)),
        DM_PORT_PF => Ok(PortRef::Pf { controller, pf }),
        DM_PORT_VF => Ok(PortRef::Vf {
            controller,
            pf,
            vf: VfIndex(port.index),
        }),
        DM_PORT_STACK => Ok(PortRef::Stack(port.index)),
        kind => Err(format!("{what}.kind is {kind}, which means nothing")),
    }
}

/// What stands where no port is meant.
pub(crate) const NO_PORT: dm_port = dm_port {
    kind: 0,
    controller: 0,
    pf: 0,
    index: 0,
};

pub(crate) const NO_ADDR: dm_addr = dm_addr {
    family: 0,
    octets: [0; 16],
};

pub(crate) fn put_addr(address: IpAddr) -> dm_addr {
    let mut octets = [0; 16];
    match address {
        IpAddr::V4(address) => octets[..4].copy_from_slice(&address.octets()),
        IpAddr::V6(address) => octets = address.octets(),
    }
    let family = if address.is_ipv4() { 4 } else { 6 };
    dm_addr { family, octets }
}

pub(crate) fn get_addr(address: dm_addr, what: &str) -> Result<IpAddr, Broken> {
    let o = address.octets;
    match address.family {
        4 => Ok(Ipv4Addr::new(o[0], o[1], o[2], o[3]).into()),
        6 => Ok(Ipv6Addr::from(o).into()),
        family => Err(format!("{what}.family is {family} instead of 4 or 6")),
    }
}

pub(crate) fn put_pci(address: PciAddress) -> dm_pci {
    dm_pci {
        domain: address.domain(),
        bus: address.bus(),
        device: address.device(),
        function: address.function(),
        reserved: [0; 3],
    }
}

pub(crate) fn get_pci(address: dm_pci, what: &str) -> Result<PciAddress, Broken> {
    PciAddress::new(address.domain, address.bus, address.device, address.function).ok_or_else(|| {
        format!(
            "{what} has device {} or function {} out of range",
            address.device, address.function
        )
    })
}

/// Yes or no as a number.
pub(crate) fn get_flag(flag: u32, what: &str) -> Result<bool, Broken> {
    match flag {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(format!("{what} is {flag} instead of 0 or 1")),
    }
}

pub(crate) fn get_mtu(mtu: u32, what: &str) -> Result<Mtu, Broken> {
    small(mtu, what)
}

/// A number into a type with a range of its own.
pub(crate) fn small<T: TryFrom<u16>>(number: u32, what: &str) -> Result<T, Broken> {
    u16::try_from(number)
        .ok()
        .and_then(|number| T::try_from(number).ok())
        .ok_or_else(|| format!("{what} is {number}, out of its range"))
}

/// Bits into a set of flags.
pub(crate) fn set<T>(bits: Option<T>, raw: u32, what: &str) -> Result<T, Broken> {
    bits.ok_or_else(|| format!("{what} has bits that mean nothing: {raw:#x}"))
}

#[cfg(test)]
mod tests;
