//! [`VfAllocator`]: leases of the card's virtual functions.
//!
//! A lease's record is made, with a snapshot of the VF's attributes, before the VF is touched. Every call decides
//! everything before it changes anything, so a failed one leaves no trace; only a jammed or frozen VF
//! ([`super::MemoryCard::jam`], [`super::MemoryCard::freeze`]) fails in the middle of a release. Network namespaces are
//! names in a map.
//!
//! Reclaim brings back a VF from a namespace by a move ([`ResetLevel::Config`]), from a foreign driver by a rebind, which
//! resets the function, and one that is missing by a reset of the device.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use dpumesh_core::vf::{
    AttachedVf, Attachment, Disruption, LeaseId, LeaseOwner, LinkState, Released, ResetLevel, TeardownErrors,
    VfConfig, VfCount, VfLease, VfLocation, VfRequest, VfSelector, VfState, VfVlan,
};
use dpumesh_core::{
    AttachmentKinds, Effect, Error, ErrorKind, Event, Fence, MacAddr, Mtu, PciAddress, PfIndex, PortRef,
    ResetLevels, Result, Role, VfAllocator, VfAttributes,
};

use super::device::{Card, NAME, PF, State, error};
use super::ports::Port;

/// A virtual function.
#[derive(Clone, Debug)]
pub(super) struct Function {
    pub(super) port: PortRef,
    pub(super) attributes: Attributes,
    /// The lease that the SoC took.
    pub(super) admitted: Option<VfLease>,
    /// The lease that the host made.
    held: Option<Held>,
    location: VfLocation,
    place: Option<Place>,
    jammed: bool,
    frozen: bool,
}

/// What can be set of a VF.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Attributes {
    pub(super) mac: MacAddr,
    admin_mac: MacAddr,
    pub(super) vlan: VfVlan,
    trust: bool,
    pub(super) spoof_check: bool,
    link_state: LinkState,
    pub(super) mtu: Mtu,
}

/// The record of a lease.
#[derive(Clone, Debug)]
struct Held {
    lease: VfLease,
    snapshot: Attributes,
}

/// Where and how a VF is attached.
#[derive(Clone, Debug)]
struct Place {
    attachment: Attachment,
    ifindex: Option<u32>,
}

impl Function {
    pub(super) fn new(vf: u16, mtu: Mtu) -> Self {
        let [high, low] = vf.to_be_bytes();
        Self {
            port: PortRef::vf(vf),
            attributes: Attributes {
                mac: MacAddr([0x02, 0, 0, 0x0f, high, low]),
                admin_mac: MacAddr::default(),
                vlan: VfVlan {
                    id: None,
                    qos: 0,
                    service_tag: false,
                },
                trust: false,
                spoof_check: false,
                link_state: LinkState::Auto,
                mtu,
            },
            admitted: None,
            held: None,
            location: VfLocation::Host,
            place: None,
            jammed: false,
            frozen: false,
        }
    }

    /// Host and SoC hold the same lease: frames may pass.
    pub(super) fn is_held_by_both(&self) -> bool {
        let held = self.held.as_ref().map(|held| held.lease.id);
        held.is_some() && held == self.admitted.as_ref().map(|lease| lease.id)
    }

    pub(super) fn is_leased(&self) -> bool {
        self.held.is_some()
    }

    pub(super) fn link_up(&self) -> bool {
        self.attributes.link_state != LinkState::Disable
    }

    /// Gives back the name that it has in a namespace.
    pub(super) fn leave(&self, namespaces: &mut BTreeMap<PathBuf, BTreeSet<String>>) {
        if let Some(Place {
            attachment: Attachment::Netns { path, ifname },
            ..
        }) = &self.place
            && let Some(names) = namespaces.get_mut(path)
        {
            names.remove(ifname);
        }
    }

    fn has_lease(&self, lease: &VfLease) -> bool {
        self.held.as_ref().is_some_and(|held| held.lease == *lease)
    }

    fn pci(&self) -> Option<PciAddress> {
        let PortRef::Vf { vf, .. } = self.port else {
            return None;
        };
        // One device of eight functions after another, behind the physical function on bus 0x3b.
        let number = u8::try_from(vf.0 + 8).ok()?;
        PciAddress::new(0, 0x3b, number / 8, number % 8)
    }

    fn driver(&self) -> &str {
        match &self.location {
            VfLocation::Driver(name) => name,
            _ => NAME,
        }
    }

    fn fits(&self, selector: &VfSelector) -> bool {
        selector.port.is_none_or(|port| port == self.port)
            && selector.pf.is_none_or(|pf| pf == PF)
            && selector.pci.is_none_or(|pci| Some(pci) == self.pci())
            && selector.numa_node.is_none_or(|node| node == 0)
            && selector
                .driver
                .as_ref()
                .is_none_or(|driver| driver == self.driver())
    }

    fn attached(&self) -> AttachedVf {
        let ifindex = self.place.as_ref().and_then(|place| place.ifindex);
        AttachedVf::new(self.attributes.mac, self.attributes.mtu, ifindex)
    }

    fn state(&self, role: Role) -> VfState {
        let mut state = VfState::new(self.port, self.attributes.mac, self.attributes.mtu);
        state.admin_mac = self.attributes.admin_mac;
        state.pci = self.pci();
        state.location = self.location.clone();
        state.lease = if role.is_host() {
            self.held.as_ref().map(|held| held.lease.clone())
        } else {
            self.admitted.clone()
        };
        state
    }
}

impl Attributes {
    fn set(&mut self, config: &VfConfig) {
        if let Some(mac) = config.mac {
            self.mac = mac;
            self.admin_mac = mac;
        }
        let VfConfig {
            vlan,
            trust,
            spoof_check,
            link_state,
            mtu,
            ..
        } = config;
        self.vlan = vlan.unwrap_or(self.vlan);
        self.trust = trust.unwrap_or(self.trust);
        self.spoof_check = spoof_check.unwrap_or(self.spoof_check);
        self.link_state = link_state.unwrap_or(self.link_state);
        self.mtu = mtu.unwrap_or(self.mtu);
    }
}

/// VFs of a card in memory, from one side.
#[derive(Debug)]
pub(super) struct MemoryVf {
    card: Arc<Card>,
    role: Role,
}

impl MemoryVf {
    pub(super) fn new(card: Arc<Card>, role: Role) -> Self {
        Self { card, role }
    }

    fn host(&self, operation: &'static str) -> Result<()> {
        if self.role.is_host() {
            return Ok(());
        }
        Err(error(
            ErrorKind::Unsupported,
            operation,
            "this is the host's part, and this side is the SoC",
        ))
    }

    fn soc(&self, operation: &'static str) -> Result<()> {
        if self.role.is_soc() {
            return Ok(());
        }
        Err(error(
            ErrorKind::Unsupported,
            operation,
            "this is the SoC's part, and this side is the host",
        ))
    }

    fn plan(&self, state: &State, operation: &'static str, pf: PfIndex, count: u16) -> Result<Disruption> {
        if pf != PF {
            return Err(error(ErrorKind::NotFound, operation, "there is no such PF").field("pf"));
        }
        if !state.capabilities.vf.resizable {
            let message = "the number of VFs is fixed";
            return Err(error(ErrorKind::Unsupported, operation, message).field("count"));
        }
        let most = state.capabilities.vf.max_vfs;
        if count > most {
            let message = format!("{count} VFs are more than the {most} that the card has");
            return Err(error(ErrorKind::CapacityExceeded, operation, message).object("vf"));
        }
        let going = state.functions.iter().skip(count.into());
        Ok(if going.into_iter().any(Function::is_leased) {
            Disruption::Drain
        } else {
            Disruption::None
        })
    }
}

#[async_trait]
impl VfAllocator for MemoryVf {
    async fn plan_vf_count(&self, pf: PfIndex, count: u16) -> Result<Disruption> {
        const PLAN: &str = "vf.plan_vf_count";
        self.host(PLAN)?;
        let state = self.card.present(PLAN)?;
        self.plan(&state, PLAN, pf, count)
    }

    async fn set_vf_count(&self, fence: Fence, pf: PfIndex, count: u16) -> Result<VfCount> {
        const SET: &str = "vf.set_vf_count";
        self.host(SET)?;
        let mut state = self.card.fenced(fence, SET)?;
        if self.plan(&state, SET, pf, count)? != Disruption::None {
            return Err(error(ErrorKind::Busy, SET, "a VF that would go is leased"));
        }
        let kinds = state.capabilities.events;
        let actual = state.trouble.most_vfs.map_or(count, |most| count.min(most));
        for event in state.resize(actual, self.card.config().mtu) {
            self.card.raise_of(kinds, &event);
        }
        Ok(VfCount {
            actual,
            needs: if actual < count {
                Disruption::Reboot
            } else {
                Disruption::None
            },
        })
    }

    async fn list(&self) -> Result<Vec<VfState>> {
        let state = self.card.present("vf.list")?;
        let role = self.role;
        Ok(state.functions.iter().map(|vf| vf.state(role)).collect())
    }

    async fn lease(&self, fence: Fence, request: &VfRequest) -> Result<VfLease> {
        const LEASE: &str = "vf.lease";
        self.host(LEASE)?;
        let mut state = self.card.fenced(fence, LEASE)?;
        if request.owner.0.is_empty() {
            return Err(error(ErrorKind::Invalid, LEASE, "must not be empty").field("owner"));
        }
        let held = state.functions.iter().filter_map(|vf| vf.held.as_ref());
        if let Some(held) = held.into_iter().find(|held| held.lease.owner == request.owner) {
            return Ok(held.lease.clone());
        }
        let index = state.find_free(&request.selector)?;
        state.check_config(LEASE, index, &request.config)?;
        let id = LeaseId(state.number());
        let owner = request.owner.clone();
        let port = state.functions[index].port;
        let lease = VfLease::new(id, self.card.dpu().clone(), port, owner, state.epoch);
        let function = &mut state.functions[index];
        function.held = Some(Held {
            lease: lease.clone(),
            snapshot: function.attributes.clone(),
        });
        self.card.set_attributes(&mut state, index, &request.config);
        self.card.look_at_marks(&mut state);
        Ok(lease)
    }

    async fn admit(&self, fence: Fence, lease: &VfLease) -> Result<()> {
        const ADMIT: &str = "vf.admit";
        self.soc(ADMIT)?;
        let mut state = self.card.fenced(fence, ADMIT)?;
        if lease.dpu != *self.card.dpu() {
            let message = format!("the lease is of {}, this is {}", lease.dpu, self.card.dpu());
            return Err(error(ErrorKind::Invalid, ADMIT, message).field("lease.dpu"));
        }
        if lease.epoch != state.epoch {
            return Err(stale(ADMIT, lease));
        }
        let Some(function) = state.functions.iter_mut().find(|vf| vf.port == lease.port) else {
            return Err(error(ErrorKind::NotFound, ADMIT, "there is no such VF").object(lease.port));
        };
        match &function.admitted {
            Some(other) if other != lease => {
                let message = format!("lease {} of this port was not revoked", other.id.0);
                Err(error(ErrorKind::Conflict, ADMIT, message).object(lease.port))
            }
            _ => {
                function.admitted = Some(lease.clone());
                Ok(())
            }
        }
    }

    async fn revoke(&self, fence: Fence, lease: &VfLease) -> Result<()> {
        const REVOKE: &str = "vf.revoke";
        self.soc(REVOKE)?;
        let mut state = self.card.fenced(fence, REVOKE)?;
        let function = state.functions.iter_mut().find(|vf| vf.port == lease.port);
        let Some(function) = function.filter(|vf| vf.admitted.as_ref() == Some(lease)) else {
            return Ok(());
        };
        function.admitted = None;
        if let Some(port) = state.ports.get_mut(&lease.port) {
            port.close();
        }
        Ok(())
    }

    async fn configure(&self, fence: Fence, lease: &VfLease, config: &VfConfig) -> Result<()> {
        const CONFIGURE: &str = "vf.configure";
        self.host(CONFIGURE)?;
        let mut state = self.card.fenced(fence, CONFIGURE)?;
        let index = state.leased(CONFIGURE, lease)?;
        state.check_config(CONFIGURE, index, config)?;
        state.functions[index].check_change(CONFIGURE)?;
        self.card.set_attributes(&mut state, index, config);
        Ok(())
    }

    async fn attach(&self, fence: Fence, lease: &VfLease, attachment: &Attachment) -> Result<AttachedVf> {
        const ATTACH: &str = "vf.attach";
        self.host(ATTACH)?;
        let mut state = self.card.fenced(fence, ATTACH)?;
        let index = state.leased(ATTACH, lease)?;
        if let Some(place) = &state.functions[index].place {
            if place.attachment == *attachment {
                return Ok(state.functions[index].attached());
            }
            return Err(error(ErrorKind::Busy, ATTACH, "it is attached elsewhere").object(lease.port));
        }
        let location = state.check_attachment(attachment)?;
        state.functions[index].check_move(ATTACH)?;
        let ifindex = matches!(attachment, Attachment::Netns { .. })
            .then(|| u32::try_from(state.number()).unwrap_or(u32::MAX));
        state.enter_netns(attachment);
        let function = &mut state.functions[index];
        function.location = location;
        function.place = Some(Place {
            attachment: attachment.clone(),
            ifindex,
        });
        Ok(function.attached())
    }

    async fn detach(&self, fence: Fence, lease: &VfLease) -> Result<()> {
        const DETACH: &str = "vf.detach";
        self.host(DETACH)?;
        let mut state = self.card.fenced(fence, DETACH)?;
        let index = state.leased(DETACH, lease)?;
        state.bring_back(DETACH, index)
    }

    async fn release(&self, fence: Fence, lease: &VfLease, level: ResetLevel) -> Result<Released> {
        const RELEASE: &str = "vf.release";
        self.host(RELEASE)?;
        let mut state = self.card.fenced(fence, RELEASE)?;
        check_level(&state, RELEASE, level)?;
        let Some(index) = state.functions.iter().position(|vf| vf.has_lease(lease)) else {
            return Ok(Released::NotCurrent);
        };
        let mut failed: Vec<Error> = state.bring_back(RELEASE, index).err().into_iter().collect();
        match state.functions[index].check_change(RELEASE) {
            Ok(()) => self.card.restore_attributes(&mut state, index),
            Err(error) => failed.push(error),
        }
        if !failed.is_empty() {
            let message = "the VF stays leased, since not every step worked";
            return Err(error(ErrorKind::Io, RELEASE, message)
                .object(lease.port)
                .effect(Effect::Partial)
                .source(TeardownErrors(failed)));
        }
        state.functions[index].held = None;
        self.card.look_at_marks(&mut state);
        Ok(Released::Freed)
    }

    async fn reclaim(
        &self,
        fence: Fence,
        port: PortRef,
        live: &[LeaseOwner],
        level: ResetLevel,
    ) -> Result<ResetLevel> {
        const RECLAIM: &str = "vf.reclaim";
        self.host(RECLAIM)?;
        let mut state = self.card.fenced(fence, RECLAIM)?;
        check_level(&state, RECLAIM, level)?;
        let Some(index) = state.functions.iter().position(|vf| vf.port == port) else {
            return Err(error(ErrorKind::NotFound, RECLAIM, "there is no such VF").object(port));
        };
        let owner = state.functions[index].held.as_ref().map(|held| &held.lease.owner);
        if owner.is_some_and(|owner| live.contains(owner)) {
            return Err(error(ErrorKind::Busy, RECLAIM, "it is leased and its owner lives").object(port));
        }
        let needed = state.functions[index].reclaim_level();
        if needed > level {
            let message = format!("it takes a reset of level {needed:?} to get it back");
            return Err(error(ErrorKind::Io, RECLAIM, message).object(port).field("level"));
        }
        self.card.take_back(&mut state, index);
        Ok(needed)
    }
}

impl Function {
    fn check_move(&self, operation: &'static str) -> Result<()> {
        if self.jammed {
            return Err(error(ErrorKind::Io, operation, "the VF does not move").object(self.port));
        }
        Ok(())
    }

    fn check_change(&self, operation: &'static str) -> Result<()> {
        if self.frozen {
            return Err(
                error(ErrorKind::Io, operation, "the VF's attributes do not change").object(self.port),
            );
        }
        Ok(())
    }

    fn reclaim_level(&self) -> ResetLevel {
        match self.location {
            _ if self.jammed => ResetLevel::Function,
            VfLocation::Host | VfLocation::Netns { .. } => ResetLevel::Config,
            VfLocation::Driver(_) => ResetLevel::Function,
            _ => ResetLevel::Device,
        }
    }
}

impl State {
    /// The VF of a port.
    pub(super) fn function(&self, port: PortRef) -> Option<&Function> {
        let PortRef::Vf { vf, .. } = port else {
            return None;
        };
        self.functions.get(usize::from(vf.0)).filter(|vf| vf.port == port)
    }

    fn leased(&self, operation: &'static str, lease: &VfLease) -> Result<usize> {
        self.functions
            .iter()
            .position(|vf| vf.has_lease(lease))
            .ok_or_else(|| stale(operation, lease))
    }

    fn find_free(&self, selector: &VfSelector) -> Result<usize> {
        let fitting = || {
            self.functions
                .iter()
                .enumerate()
                .filter(|(_, vf)| vf.fits(selector))
        };
        // One that nobody leases but that is not on the host is stray: reclaimed first, then leased.
        let free = fitting().find(|(_, vf)| !vf.is_leased() && vf.location == VfLocation::Host);
        if let Some((index, _)) = free {
            return Ok(index);
        }
        if fitting().next().is_none() && !self.functions.is_empty() {
            let message = "no VF of the card fits the selector";
            return Err(error(ErrorKind::NotFound, "vf.lease", message).field("selector"));
        }
        let message = format!("vf is full: {0} of {0}", fitting().count());
        Err(error(ErrorKind::CapacityExceeded, "vf.lease", message).object("vf"))
    }

    fn check_config(&self, operation: &'static str, index: usize, config: &VfConfig) -> Result<()> {
        let offered = self.capabilities.vf.attributes;
        for (attribute, field, asked) in asked_for(config) {
            if asked && !offered.contains(attribute) {
                let message = "the card cannot set this attribute";
                return Err(error(ErrorKind::Unsupported, operation, message).field(field));
            }
        }
        if let Some(mac) = config.mac {
            self.check_mac(operation, index, mac)?;
        }
        if config.vlan.is_some_and(|vlan| vlan.qos > 7) {
            let message = "a priority code point is 0 to 7";
            return Err(error(ErrorKind::Invalid, operation, message).field("config.vlan.qos"));
        }
        if config.vlan.is_some_and(|vlan| vlan.service_tag) {
            let message = "the card adds 802.1Q tags only";
            return Err(error(ErrorKind::Unsupported, operation, message).field("config.vlan.service_tag"));
        }
        match (config.mtu, self.capabilities.vf.max_mtu) {
            (Some(mtu), Some(most)) if mtu > most => {
                let message = format!("{mtu} octets are more than the card's {most}");
                Err(error(ErrorKind::Invalid, operation, message).field("config.mtu"))
            }
            _ => Ok(()),
        }
    }

    fn check_mac(&self, operation: &'static str, index: usize, mac: MacAddr) -> Result<()> {
        if mac.is_zero() || mac.is_multicast() {
            let message = "must be the address of one station";
            return Err(error(ErrorKind::Invalid, operation, message).field("config.mac"));
        }
        let others = self.functions.iter().enumerate().filter(|(i, _)| *i != index);
        let user = others.map(|(_, vf)| vf).find(|vf| vf.attributes.mac == mac);
        let Some(user) = user else { return Ok(()) };
        let message = format!("{mac} is in use by {}", user.port);
        Err(error(ErrorKind::Conflict, operation, message)
            .field("config.mac")
            .object(user.port))
    }

    fn check_attachment(&self, attachment: &Attachment) -> Result<VfLocation> {
        const ATTACH: &str = "vf.attach";
        let offered = self.capabilities.vf.attachments;
        let (kind, location) = match attachment {
            Attachment::Netns { path, .. } => {
                (AttachmentKinds::NETNS, VfLocation::Netns { path: path.clone() })
            }
            Attachment::Vfio => (AttachmentKinds::VFIO, VfLocation::Driver("vfio-pci".to_owned())),
            Attachment::VhostUser { .. } => (
                AttachmentKinds::VHOST_USER,
                VfLocation::Driver("vhost-user".to_owned()),
            ),
            _ => {
                let message = "an attachment of a newer contract";
                return Err(error(ErrorKind::Unsupported, ATTACH, message).field("attachment"));
            }
        };
        if !offered.contains(kind) {
            let message = "VFs cannot be attached like this";
            return Err(error(ErrorKind::Unsupported, ATTACH, message).field("attachment"));
        }
        if let Attachment::Netns { path, ifname } = attachment {
            self.check_netns(path, ifname)?;
        }
        Ok(location)
    }

    fn check_netns(&self, path: &Path, ifname: &str) -> Result<()> {
        const ATTACH: &str = "vf.attach";
        let is_name = (1..=15).contains(&ifname.len())
            && !matches!(ifname, "." | "..")
            && ifname
                .bytes()
                .all(|b| b.is_ascii_graphic() && b != b'/' && b != b':');
        if !is_name {
            let message = "a device name is 1 to 15 printable octets without / and :";
            return Err(error(ErrorKind::Invalid, ATTACH, message).field("attachment.ifname"));
        }
        let Some(names) = self.namespaces.get(path) else {
            let message = "there is no such network namespace";
            return Err(error(ErrorKind::NotFound, ATTACH, message).object(path.display()));
        };
        if names.contains(ifname) {
            return Err(error(ErrorKind::Exists, ATTACH, "the name is taken there").object(ifname));
        }
        Ok(())
    }

    fn enter_netns(&mut self, attachment: &Attachment) {
        if let Attachment::Netns { path, ifname } = attachment
            && let Some(names) = self.namespaces.get_mut(path)
        {
            names.insert(ifname.clone());
        }
    }

    /// Moves a VF back to the host.
    fn bring_back(&mut self, operation: &'static str, index: usize) -> Result<()> {
        let function = &self.functions[index];
        if function.location == VfLocation::Host && function.place.is_none() {
            return Ok(());
        }
        function.check_move(operation)?;
        self.leave_place(index);
        Ok(())
    }

    fn leave_place(&mut self, index: usize) {
        let function = &mut self.functions[index];
        function.leave(&mut self.namespaces);
        function.location = VfLocation::Host;
        function.place = None;
    }

    fn resize(&mut self, count: u16, mtu: Mtu) -> Vec<Event> {
        let mut events = Vec::new();
        while self.functions.len() > usize::from(count) {
            let Some(gone) = self.functions.pop() else { break };
            gone.leave(&mut self.namespaces);
            self.ports.remove(&gone.port);
            events.push(Event::VfRemoved(gone.port));
        }
        for vf in self.functions.len() as u16..count {
            let function = Function::new(vf, mtu);
            self.ports.insert(function.port, Port::default());
            events.push(Event::VfAdded(function.port));
            self.functions.push(function);
        }
        events
    }
}

impl Card {
    fn set_attributes(&self, state: &mut State, index: usize, config: &VfConfig) {
        let mut attributes = state.functions[index].attributes.clone();
        attributes.set(config);
        self.change_attributes(state, index, attributes);
    }

    fn restore_attributes(&self, state: &mut State, index: usize) {
        if let Some(held) = &state.functions[index].held {
            let snapshot = held.snapshot.clone();
            self.change_attributes(state, index, snapshot);
        }
    }

    fn change_attributes(&self, state: &mut State, index: usize, attributes: Attributes) {
        let function = &mut state.functions[index];
        let was_up = function.link_up();
        function.attributes = attributes;
        let (port, up) = (function.port, function.link_up());
        if was_up != up {
            self.raise_of(state.capabilities.events, &Event::Link { port, up });
        }
    }

    fn take_back(&self, state: &mut State, index: usize) {
        state.functions[index].jammed = false;
        state.functions[index].frozen = false;
        state.leave_place(index);
        self.restore_attributes(state, index);
        state.functions[index].held = None;
        self.look_at_marks(state);
    }

    pub(super) fn add_netns(&self, path: PathBuf, names: &[&str]) {
        let names = names.iter().map(|name| (*name).to_owned());
        self.state().namespaces.entry(path).or_default().extend(names);
    }

    pub(super) fn remove_netns(&self, path: &Path) {
        let mut state = self.state();
        state.namespaces.remove(path);
        for function in &mut state.functions {
            if matches!(&function.location, VfLocation::Netns { path: at } if at == path) {
                function.location = VfLocation::Host;
                function.place = None;
            }
        }
    }

    pub(super) fn strand(&self, port: PortRef, location: VfLocation) -> bool {
        let mut state = self.state();
        let Some(function) = state.functions.iter_mut().find(|vf| vf.port == port) else {
            return false;
        };
        function.location = location;
        true
    }

    pub(super) fn jam(&self, port: PortRef, jammed: bool) -> bool {
        let mut state = self.state();
        let Some(function) = state.functions.iter_mut().find(|vf| vf.port == port) else {
            return false;
        };
        function.jammed = jammed;
        true
    }

    pub(super) fn freeze(&self, port: PortRef, frozen: bool) -> bool {
        let mut state = self.state();
        let Some(function) = state.functions.iter_mut().find(|vf| vf.port == port) else {
            return false;
        };
        function.frozen = frozen;
        true
    }
}

fn asked_for(config: &VfConfig) -> [(VfAttributes, &'static str, bool); 8] {
    [
        (VfAttributes::MAC, "config.mac", config.mac.is_some()),
        (VfAttributes::VLAN, "config.vlan", config.vlan.is_some()),
        (VfAttributes::TRUST, "config.trust", config.trust.is_some()),
        (
            VfAttributes::SPOOF_CHECK,
            "config.spoof_check",
            config.spoof_check.is_some(),
        ),
        (
            VfAttributes::LINK_STATE,
            "config.link_state",
            config.link_state.is_some(),
        ),
        (
            VfAttributes::MIN_RATE,
            "config.min_rate",
            config.min_rate.is_some(),
        ),
        (
            VfAttributes::MAX_RATE,
            "config.max_rate",
            config.max_rate.is_some(),
        ),
        (VfAttributes::MTU, "config.mtu", config.mtu.is_some()),
    ]
}

fn check_level(state: &State, operation: &'static str, level: ResetLevel) -> Result<()> {
    let needed = match level {
        ResetLevel::Config => ResetLevels::CONFIG,
        ResetLevel::Function => ResetLevels::FUNCTION,
        ResetLevel::Device => ResetLevels::DEVICE,
    };
    if state.capabilities.vf.resets.contains(needed) {
        return Ok(());
    }
    Err(error(ErrorKind::Unsupported, operation, "the card has no such reset").field("level"))
}

fn stale(operation: &'static str, lease: &VfLease) -> Error {
    let message = format!("lease {} of {} is not current", lease.id.0, lease.port);
    error(ErrorKind::Stale, operation, message).object("lease")
}
