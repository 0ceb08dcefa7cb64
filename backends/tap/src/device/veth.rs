//! Veth pairs of which one end is the card's: what a VF is where `/dev/net/tun` does not open.
//!
//! The card's end is read by a [`PacketPort`](super::PacketPort), which gets a copy of each frame; the original goes on
//! to the kernel's stack. Therefore that end resolves no neighbours, has no IPv6 and forwards nothing, and it is best in
//! a namespace with nothing else in it. It is switched on from the beginning: like a cable it only ever takes carrier
//! from the other end.

use dpumesh_core::{Error, ErrorKind, Result};
use dpumesh_hw::netlink::sysctl::{self, SysctlError};
use dpumesh_hw::netlink::{LinkChange, Netlink, NetlinkError, VethEnd};
use dpumesh_hw::netns::Namespace;

/// The card's end takes whatever the other end sends: its own MTU limits nothing.
const CARD_END_MTU: u32 = 65_535;

/// Makes a veth pair: `name` in `namespace`, switched off, and the card's end `card_end` in `fabric`, ready for a
/// [`PacketPort`](super::PacketPort). Blocks for some milliseconds.
///
/// # Errors
/// `Exists` when one of the names is taken, `Denied` without CAP_NET_ADMIN in both namespaces, `Io` else. A pair whose
/// card's end could not be made ready stays; [`ready_card_end`] goes on with it.
pub fn create_pair(namespace: &Namespace, name: &str, fabric: &Namespace, card_end: &str) -> Result<()> {
    let far = VethEnd::new(card_end).in_namespace(fabric).mtu(CARD_END_MTU);
    Netlink::open_in(namespace)
        .and_then(|mut netlink| netlink.create_veth(&VethEnd::new(name), &far))
        .map_err(|failed| link_error(card_end, failed))?;
    ready_card_end(fabric, card_end)
}

/// Makes the card's end of a veth pair silent and switches it on. Changes nothing on one that is ready.
///
/// # Errors
/// `NotFound` when it is not in `fabric`, `Denied` without CAP_NET_ADMIN there, `Io` else.
pub fn ready_card_end(fabric: &Namespace, card_end: &str) -> Result<()> {
    let failed = |failed| link_error(card_end, failed);
    let mut netlink = Netlink::open_in(fabric).map_err(failed)?;
    let link = netlink.link(card_end).map_err(failed)?;
    // Before it is up, so that nothing is announced.
    silence(fabric, card_end)?;
    netlink
        .change_link(link.index, &LinkChange::new().arp(false).up())
        .map_err(failed)
}

fn silence(fabric: &Namespace, card_end: &str) -> Result<()> {
    let settings = [
        (format!("ipv6/conf/{card_end}/disable_ipv6"), "1"),
        (format!("ipv4/conf/{card_end}/forwarding"), "0"),
    ];
    for (key, value) in settings {
        match sysctl::set(fabric, &key, value) {
            // A kernel without IPv6 has nothing to silence.
            Err(failed) if !failed.is_missing() => return Err(setting_error(card_end, failed)),
            _ => {}
        }
    }
    Ok(())
}

const OPERATION: &str = "veth.create";

fn link_error(card_end: &str, failed: NetlinkError) -> Error {
    let kind = match failed.errno() {
        _ if failed.is_missing() => ErrorKind::NotFound,
        Some(libc::EEXIST) => ErrorKind::Exists,
        Some(libc::EPERM | libc::EACCES) => ErrorKind::Denied,
        _ => ErrorKind::Io,
    };
    let mut error = Error::new(kind, OPERATION, failed.to_string())
        .backend(crate::NAME)
        .object(card_end);
    error.vendor_code = failed.errno().map(i64::from);
    error.source(failed)
}

fn setting_error(card_end: &str, failed: SysctlError) -> Error {
    Error::new(ErrorKind::Io, OPERATION, failed.to_string())
        .backend(crate::NAME)
        .object(card_end)
        .source(failed)
}
