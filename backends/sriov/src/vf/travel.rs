//! The way of a VF into a pod and back home.
//!
//! Where it is about to go is recorded before it moves; [`super::locate`] looks there. A network device changes its namespace
//! and its name in one request, so that it is never seen under a wrong name. A function whose namespace died was put into the
//! machine's first namespace by the kernel; one that is nowhere is taken from its driver and given back.

use std::thread;
use std::time::{Duration, Instant};

use dpumesh_core::vf::{AttachedVf, Attachment, VfLease};
use dpumesh_core::{Effect, Error, ErrorKind, Fence, PortRef, Result, Retry};
use dpumesh_hw::netlink::Link;

use super::SriovVf;
use super::attributes::patiently;
use super::locate::{Whereabouts, mac_of, mtu_of};
use crate::abilities::VFIO;
use crate::card::Change;
use crate::discover::{self, VirtualFunction};
use crate::kernel::{LinkEdit, Outcome, Spot};
use crate::record::Place;

impl SriovVf {
    pub(super) fn put(&self, fence: Fence, lease: &VfLease, attachment: &Attachment) -> Result<AttachedVf> {
        const ATTACH: &str = "vf.attach";
        self.host(ATTACH)?;
        let mut change = self.card.fenced(ATTACH, fence)?;
        let wanted = match attachment {
            Attachment::Netns { path, ifname } => Place::Netns {
                path: path.clone(),
                ifname: ifname.clone(),
            },
            Attachment::Vfio
                if change
                    .kernel()
                    .sysfs()
                    .join("bus/pci/drivers")
                    .join(VFIO)
                    .exists() =>
            {
                Place::Vfio
            }
            _ => {
                let message =
                    "a VF of this card attaches to a network namespace, or to VFIO where vfio-pci is loaded";
                return Err(change.refuse(ErrorKind::Unsupported, message).field("attachment"));
            }
        };
        let port = change.leased(lease)?;
        let function = change.function(port)?;
        match wanted {
            Place::Vfio => self.put_to_vfio(&mut change, port, &function),
            _ => self.put_into_netns(&mut change, port, &function, wanted),
        }
    }

    fn put_into_netns(
        &self,
        change: &mut Change<'_>,
        port: PortRef,
        function: &VirtualFunction,
        wanted: Place,
    ) -> Result<AttachedVf> {
        let Place::Netns { path, ifname } = &wanted else {
            return Err(change.refuse(ErrorKind::Fault, "no namespace to go to"));
        };
        check_ifname(change, ifname)?;
        let to = Spot::At(path.clone());
        let found = change.locate(port, function)?;
        if let Whereabouts::Netdev { spot, link } = &found
            && *spot == to
            && link.name == *ifname
        {
            return self.arrived(change, port, wanted.clone(), spot, link);
        }
        let Whereabouts::Netdev {
            spot: Spot::Host,
            link,
        } = found
        else {
            return Err(elsewhere(change, port, &found));
        };
        let there = change.kernel().links(&to).map_err(|failed| {
            let mut error = change.failed(failed);
            error.kind = ErrorKind::NotFound;
            error.retry = Retry::Never;
            error.object(path.display()).field("attachment.path")
        })?;
        if change.kernel().namespace(&to).ok() == change.kernel().namespace(&Spot::Host).ok() {
            let message = "that is the host's own namespace";
            return Err(change
                .refuse(ErrorKind::Invalid, message)
                .field("attachment.path"));
        }
        if there.iter().any(|other| other.name == *ifname) {
            return Err(change
                .refuse(ErrorKind::Exists, "the name is taken there")
                .object(ifname));
        }
        change.write_going(port, wanted.clone())?;
        let moved = patiently(|| change.kernel().move_link(&Spot::Host, link.index, &to, ifname));
        if let Err(failed) = moved {
            return Err(self.undo_move(
                change,
                port,
                function,
                failed.errno == Some(libc::EEXIST),
                failed.into_error(change),
            ));
        }
        change.refresh()?;
        match change.locate(port, function)? {
            Whereabouts::Netdev { spot, link } if spot == to => {
                match self.arrived(change, port, wanted, &spot, &link) {
                    Ok(attached) => Ok(attached),
                    Err(failed) => Err(self.undo_move(change, port, function, false, failed)),
                }
            }
            _ => Err(missing(change, port)),
        }
    }

    /// Switches on what arrived, and records where it is now.
    fn arrived(
        &self,
        change: &mut Change<'_>,
        port: PortRef,
        place: Place,
        spot: &Spot,
        link: &Link,
    ) -> Result<AttachedVf> {
        if !link.up {
            let switched = patiently(|| change.kernel().change_link(spot, link.index, &LinkEdit::up(true)));
            switched.map_err(|failed| change.failed(failed))?;
        }
        change.write_place(port, place)?;
        Ok(AttachedVf::new(
            mac_of(link),
            mtu_of(link.mtu),
            Some(link.index.0),
        ))
    }

    /// Takes a VF back home that got stuck on its way.
    fn undo_move(
        &self,
        change: &mut Change<'_>,
        port: PortRef,
        function: &VirtualFunction,
        taken: bool,
        mut failed: Error,
    ) -> Error {
        if taken {
            failed.kind = ErrorKind::Exists;
            failed.retry = Retry::Never;
        }
        let home = self.bring_home(change, port, function);
        if home.is_err() {
            return failed.effect(Effect::Partial);
        }
        failed
    }

    fn put_to_vfio(
        &self,
        change: &mut Change<'_>,
        port: PortRef,
        function: &VirtualFunction,
    ) -> Result<AttachedVf> {
        let found = change.locate(port, function)?;
        match &found {
            Whereabouts::Driver(driver) if driver == VFIO => {}
            Whereabouts::Netdev { spot: Spot::Host, .. } | Whereabouts::Unbound => {
                change.write_going(port, Place::Vfio)?;
                if let Err(failed) = bind(change, function, Some(VFIO)) {
                    return Err(self.undo_move(change, port, function, false, failed.into_error(change)));
                }
            }
            _ => return Err(elsewhere(change, port, &found)),
        }
        change.write_place(port, Place::Vfio)?;
        let before = change
            .record
            .held(port)
            .and_then(|held| held.snapshot.netdev.clone());
        let config = change
            .record
            .held(port)
            .map(|held| held.config.clone())
            .unwrap_or_default();
        let mac = config
            .mac
            .or_else(|| before.as_ref().map(|before| before.mac))
            .unwrap_or_default();
        let mtu = before.map_or_else(Default::default, |before| mtu_of(before.mtu));
        Ok(AttachedVf::new(mac, config.mtu.unwrap_or(mtu), None))
    }

    pub(super) fn fetch(&self, fence: Fence, lease: &VfLease) -> Result<()> {
        const DETACH: &str = "vf.detach";
        self.host(DETACH)?;
        let mut change = self.card.fenced(DETACH, fence)?;
        let port = change.leased(lease)?;
        let function = change.function(port)?;
        self.bring_home(&mut change, port, &function)
    }

    /// Gets a VF back to the host's namespace and to its network driver, from wherever it is.
    pub(super) fn bring_home(
        &self,
        change: &mut Change<'_>,
        port: PortRef,
        function: &VirtualFunction,
    ) -> Result<()> {
        change.refresh()?;
        let held = change.record.held(port).cloned();
        match await_return(change, port, function)? {
            Whereabouts::Netdev { spot: Spot::Host, .. } => {}
            Whereabouts::Netdev { spot, link } => self.move_home(change, port, &spot, &link)?,
            _ => {
                let driver = held.as_ref().and_then(|held| held.snapshot.driver.as_deref());
                rebind(change, function, driver).map_err(|failed| change.failed(failed))?;
                change.refresh()?;
                let function = change.function(port)?;
                match change.locate(port, &function)? {
                    Whereabouts::Netdev { spot: Spot::Host, .. } => {}
                    // A driver registers its devices in the machine's first namespace.
                    Whereabouts::Netdev { spot, link } => self.move_home(change, port, &spot, &link)?,
                    _ => return Err(missing(change, port)),
                }
            }
        }
        change.refresh()?;
        if held.is_some_and(|held| held.place != Place::Host || held.going.is_some()) {
            change.write_place(port, Place::Host)?;
        }
        Ok(())
    }

    fn move_home(&self, change: &mut Change<'_>, port: PortRef, from: &Spot, link: &Link) -> Result<()> {
        let before = change
            .record
            .held(port)
            .and_then(|held| held.snapshot.netdev.clone());
        let own = before.map_or_else(|| link.name.clone(), |before| before.name);
        // The name may be another's by now; the kernel finds a free one for a pattern.
        for name in [own.as_str(), "vf%d"] {
            let taken = change.links().iter().any(|other| other.name == name);
            if taken {
                continue;
            }
            match patiently(|| change.kernel().move_link(from, link.index, &Spot::Host, name)) {
                Err(failed) if failed.errno == Some(libc::EEXIST) => {}
                done => return done.map_err(|failed| change.failed(failed)),
            }
        }
        Err(change
            .refuse(ErrorKind::Io, "no name is free at the host")
            .object(port))
    }
}

/// A namespace that died is taken apart in the background; only then the kernel puts its devices into the machine's first one. To
/// take the driver away meanwhile would race with that, so a VF that is on its way is waited for, for a bounded time.
fn await_return(change: &mut Change<'_>, port: PortRef, function: &VirtualFunction) -> Result<Whereabouts> {
    let was_away = change
        .record
        .held(port)
        .is_some_and(|held| held.place != Place::Host || held.going.is_some());
    let until = Instant::now() + RETURN;
    loop {
        let found = change.locate(port, function)?;
        let on_its_way = was_away && matches!(found, Whereabouts::Nowhere);
        if !on_its_way || Instant::now() >= until {
            return Ok(found);
        }
        thread::sleep(PAUSE);
        change.refresh()?;
    }
}

/// The kernel has taken a namespace apart within this time.
const RETURN: Duration = Duration::from_secs(3);
const PAUSE: Duration = Duration::from_millis(10);

impl Change<'_> {
    fn write_going(&mut self, port: PortRef, going: Place) -> Result<()> {
        if let Some(held) = self.record.held_mut(port) {
            held.going = Some(going);
        }
        self.commit()
    }

    fn write_place(&mut self, port: PortRef, place: Place) -> Result<()> {
        let Some(held) = self.record.held_mut(port) else {
            return Ok(());
        };
        if held.place == place && held.going.is_none() {
            return Ok(());
        }
        held.place = place;
        held.going = None;
        self.commit()
    }
}

impl crate::kernel::KernelError {
    fn into_error(self, change: &Change<'_>) -> Error {
        change.failed(self)
    }
}

/// Takes a function from its driver, if it has one, and gives it to another, or to the one that the kernel chooses.
pub(super) fn bind(change: &Change<'_>, function: &VirtualFunction, driver: Option<&str>) -> Outcome<()> {
    let kernel = change.kernel();
    let dir = discover::directory(function.pci);
    let pci = function.pci.to_string();
    let now = discover::driver_of(change.kernel().sysfs(), function.pci);
    if now.as_deref() == driver && driver.is_some() {
        return Ok(());
    }
    // A line end alone takes an override off.
    kernel.write(
        &dir.join("driver_override"),
        driver.filter(|driver| *driver == VFIO).unwrap_or("\n"),
    )?;
    if now.is_some() {
        unbind(change, function)?;
    }
    match driver.filter(|driver| *driver != VFIO) {
        Some(driver) => kernel.write(
            &std::path::Path::new("bus/pci/drivers").join(driver).join("bind"),
            &pci,
        ),
        None => kernel.write(std::path::Path::new("bus/pci/drivers_probe"), &pci),
    }
}

/// Takes a function from its driver and gives it to its network driver again: a device that is nowhere comes back.
pub(super) fn rebind(change: &Change<'_>, function: &VirtualFunction, driver: Option<&str>) -> Outcome<()> {
    let now = discover::driver_of(change.kernel().sysfs(), function.pci);
    if now.is_some() {
        change
            .kernel()
            .write(&discover::directory(function.pci).join("driver_override"), "\n")?;
        unbind(change, function)?;
    }
    bind(change, function, driver.filter(|driver| *driver != VFIO))
}

pub(super) fn unbind(change: &Change<'_>, function: &VirtualFunction) -> Outcome<()> {
    let unbind = discover::directory(function.pci).join("driver/unbind");
    change.kernel().write(&unbind, &function.pci.to_string())
}

fn elsewhere(change: &Change<'_>, port: PortRef, found: &Whereabouts) -> Error {
    match found {
        Whereabouts::Nowhere => missing(change, port),
        _ => change
            .refuse(ErrorKind::Busy, "it is attached elsewhere")
            .object(port),
    }
}

pub(super) fn missing(change: &Change<'_>, port: PortRef) -> Error {
    let message = "its network device is nowhere to be found; release or reclaim the VF";
    change
        .refuse(ErrorKind::Io, message)
        .object(port)
        .retry(Retry::Never)
}

fn check_ifname(change: &Change<'_>, ifname: &str) -> Result<()> {
    let fits = (1..=15).contains(&ifname.len()) && !matches!(ifname, "." | "..");
    let plain = |octet: u8| octet.is_ascii_graphic() && !matches!(octet, b'/' | b':' | b'%');
    if fits && ifname.bytes().all(plain) {
        return Ok(());
    }
    let message = "a device name is 1 to 15 printable octets without /, : and %";
    Err(change
        .refuse(ErrorKind::Invalid, message)
        .field("attachment.ifname"))
}
