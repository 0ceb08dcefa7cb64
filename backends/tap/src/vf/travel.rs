//! The way of a VF into a pod and back home.
//!
//! Where it is about to go is recorded before it moves; [`crate::yard`] looks there first. A VF that vanished with its
//! namespace is made anew. Teardown tries every step.

use dpumesh_core::vf::{AttachedVf, Attachment, LeaseOwner, Released, ResetLevel, TeardownErrors, VfLease};
use dpumesh_core::{Effect, Error, ErrorKind, Fence, PortRef, Result};
use dpumesh_hw::netns::Namespace;

use super::attributes::missing;
use super::{TapVf, observed, recorded};
use crate::card::{Attributes, Change, Function, Place, error, index_of};
use crate::yard::{Found, index_number};

impl TapVf {
    pub(super) fn put(&self, fence: Fence, lease: &VfLease, attachment: &Attachment) -> Result<AttachedVf> {
        const ATTACH: &str = "vf.attach";
        self.host(ATTACH)?;
        let mut change = self.card.fenced(ATTACH, fence)?;
        let Attachment::Netns { path, ifname } = attachment else {
            let message = "an emulated VF is a network device: it attaches to a network namespace";
            return Err(error(ErrorKind::Unsupported, ATTACH, message).field("attachment"));
        };
        let index = self.leased(&change, ATTACH, lease)?;
        check_ifname(ifname)?;
        let wanted = Place::Netns {
            path: path.clone(),
            ifname: ifname.clone(),
        };
        let mut function = recorded(&change, index);
        let mut yard = change.yard()?;
        let Some(found) = yard.find(index, &function)? else {
            return Err(missing(ATTACH, lease.port));
        };
        if found.place == wanted && found.link.name == *ifname {
            return self.arrived(&mut change, index, &found);
        }
        if found.place != Place::Host {
            return Err(error(ErrorKind::Busy, ATTACH, "it is attached elsewhere").object(lease.port));
        }
        let to = Namespace::open(path).map_err(|failed| {
            error(ErrorKind::NotFound, ATTACH, failed.to_string())
                .field("attachment.path")
                .source(failed)
        })?;
        if yard.is_home(&to) {
            let message = "that is the host's own namespace";
            return Err(error(ErrorKind::Invalid, ATTACH, message).field("attachment.path"));
        }
        if yard
            .is_taken(&to, ifname)
            .map_err(|failed| not_a_namespace(failed, path))?
        {
            return Err(error(ErrorKind::Exists, ATTACH, "the name is taken there").object(ifname));
        }
        function.going = Some(wanted);
        change.state.functions.insert(index, function.clone());
        change.commit()?;
        if let Err(failed) = yard.send(&found, &to, ifname) {
            return Err(self.undo_move(&mut change, index, function, failed));
        }
        let Some(found) = yard.find(index, &function)? else {
            return Err(missing(ATTACH, lease.port));
        };
        self.arrived(&mut change, index, &found)
    }

    /// Records where a VF is now, and switches it on in case a process died before that.
    fn arrived(&self, change: &mut Change<'_>, index: u16, found: &Found) -> Result<AttachedVf> {
        let mut function = recorded(change, index);
        if !found.link.up {
            change.yard()?.switch_on(found)?;
        }
        if function.place != found.place || function.going.is_some() {
            function.place = found.place.clone();
            function.going = None;
            change.state.functions.insert(index, function.clone());
            change.commit()?;
        }
        let attributes = observed(&function, Some(found));
        Ok(AttachedVf::new(
            attributes.mac,
            attributes.mtu,
            Some(index_number(found.link.index)),
        ))
    }

    /// Takes a VF back home that got stuck on its way.
    fn undo_move(&self, change: &mut Change<'_>, index: u16, mut function: Function, failed: Error) -> Error {
        let home = change
            .yard()
            .and_then(|mut yard| match yard.find(index, &function)? {
                Some(found) => yard.bring_home(index, &found),
                None => Err(missing("vf.attach", PortRef::vf(index))),
            });
        function.going = None;
        change.state.functions.insert(index, function);
        if home.and_then(|()| change.commit()).is_err() {
            return failed.effect(Effect::Partial);
        }
        failed
    }

    pub(super) fn fetch(&self, fence: Fence, lease: &VfLease) -> Result<()> {
        const DETACH: &str = "vf.detach";
        self.host(DETACH)?;
        let mut change = self.card.fenced(DETACH, fence)?;
        let index = self.leased(&change, DETACH, lease)?;
        self.bring_home(&mut change, index)
    }

    /// Moves a VF home from wherever it is; one that vanished with its namespace is made anew.
    pub(super) fn bring_home(&self, change: &mut Change<'_>, index: u16) -> Result<()> {
        let mut function = recorded(change, index);
        let mut yard = change.yard()?;
        match yard.find(index, &function)? {
            Some(found) if found.place == Place::Host && !found.link.up => {}
            Some(found) => yard.bring_home(index, &found)?,
            None => yard.make(index, &function)?,
        }
        if function.place != Place::Host || function.going.is_some() {
            function.place = Place::Host;
            function.going = None;
            change.state.functions.insert(index, function);
            change.commit()?;
        }
        Ok(())
    }

    pub(super) fn end_lease(&self, fence: Fence, lease: &VfLease, level: ResetLevel) -> Result<Released> {
        const RELEASE: &str = "vf.release";
        self.host(RELEASE)?;
        let mut change = self.card.fenced(RELEASE, fence)?;
        check_level(RELEASE, level)?;
        let Ok(index) = self.leased(&change, RELEASE, lease) else {
            return Ok(Released::NotCurrent);
        };
        let failed = self.tear_down(&mut change, index, level);
        if !failed.0.is_empty() {
            let message = format!("the VF stays leased, since not every step worked: {failed}");
            return Err(error(ErrorKind::Io, RELEASE, message)
                .object(lease.port)
                .effect(Effect::Partial)
                .source(failed));
        }
        Ok(Released::Freed)
    }

    /// Brings a VF home, resets it, restores its attributes and ends its lease. Every step is tried.
    fn tear_down(&self, change: &mut Change<'_>, index: u16, level: ResetLevel) -> TeardownErrors {
        let mut failed = TeardownErrors::default();
        let mut step = |done: Result<()>| failed.0.extend(done.err());
        step(self.bring_home(change, index));
        let mut function = recorded(change, index);
        let original = function.held.as_ref().map_or_else(
            || self.card.factory_attributes(index),
            |held| held.snapshot.clone(),
        );
        if level == ResetLevel::Function {
            step(self.make_anew(change, index, &function));
        }
        let restored = restore(change, index, &function, &original);
        if restored.is_ok() {
            // Also when the VF did not come home: the record tells what the device has.
            function = recorded(change, index);
            function.attributes = original;
            change.state.functions.insert(index, function);
        }
        step(restored);
        if failed.0.is_empty() {
            function = recorded(change, index);
            function.held = None;
            change.state.functions.insert(index, function);
        }
        failed.0.extend(change.commit().err());
        failed
    }

    /// The emulator's function-level reset: the device is deleted and made again, and who reads its frames loses it.
    fn make_anew(&self, change: &Change<'_>, index: u16, function: &Function) -> Result<()> {
        let mut yard = change.yard()?;
        if let Some(found) = yard.find(index, function)? {
            yard.delete(&found)?;
        }
        yard.make(index, function)
    }

    pub(super) fn get_back(
        &self,
        fence: Fence,
        port: PortRef,
        live: &[LeaseOwner],
        level: ResetLevel,
    ) -> Result<ResetLevel> {
        const RECLAIM: &str = "vf.reclaim";
        self.host(RECLAIM)?;
        let mut change = self.card.fenced(RECLAIM, fence)?;
        check_level(RECLAIM, level)?;
        let index = index_of(port).filter(|index| change.state.functions.contains_key(index));
        let Some(index) = index else {
            return Err(error(ErrorKind::NotFound, RECLAIM, "there is no such VF").object(port));
        };
        let function = recorded(&change, index);
        if function
            .held
            .as_ref()
            .is_some_and(|held| live.contains(&held.lease.owner))
        {
            return Err(error(ErrorKind::Busy, RECLAIM, "it is leased and its owner lives").object(port));
        }
        let needed = match change.yard()?.find(index, &function)? {
            Some(_) => ResetLevel::Config,
            None => ResetLevel::Function,
        };
        if needed > level {
            let message = format!("its device is gone: it takes a reset of level {needed:?} to get it back");
            return Err(error(ErrorKind::Io, RECLAIM, message).object(port).field("level"));
        }
        let failed = self.tear_down(&mut change, index, needed.min(ResetLevel::Config));
        if !failed.0.is_empty() {
            let message = format!("not every step worked: {failed}");
            return Err(error(ErrorKind::Io, RECLAIM, message)
                .object(port)
                .effect(Effect::Partial)
                .source(failed));
        }
        Ok(needed)
    }
}

fn restore(change: &Change<'_>, index: u16, function: &Function, original: &Attributes) -> Result<()> {
    let mut yard = change.yard()?;
    match yard.find(index, function)? {
        Some(found) => yard.set(&found, original),
        None => Err(missing("vf.release", PortRef::vf(index))),
    }
}

fn check_level(operation: &'static str, level: ResetLevel) -> Result<()> {
    if level == ResetLevel::Device {
        let message = "the emulated card resets as a whole only between its lives";
        return Err(error(ErrorKind::Unsupported, operation, message).field("level"));
    }
    Ok(())
}

fn check_ifname(ifname: &str) -> Result<()> {
    let fits = (1..=15).contains(&ifname.len()) && !matches!(ifname, "." | "..");
    if fits
        && ifname
            .bytes()
            .all(|octet| octet.is_ascii_graphic() && octet != b'/' && octet != b':')
    {
        return Ok(());
    }
    let message = "a device name is 1 to 15 printable octets without / and :";
    Err(error(ErrorKind::Invalid, "vf.attach", message).field("attachment.ifname"))
}

/// A path that opens but cannot be entered is none of a namespace.
fn not_a_namespace(mut failed: Error, path: &std::path::Path) -> Error {
    failed.kind = ErrorKind::NotFound;
    failed.retry = failed.kind.usual_retry();
    failed.object(path.display()).field("attachment.path")
}
