//! [`Ports`] of a card: frames of leased VFs and of its uplinks, by packet sockets on the host's network devices.
//!
//! | isolation | frames of a VF | frames of an uplink |
//! |---|---|---|
//! | [`Switchdev`](Isolation::Switchdev) | its representor's | the uplink's device |
//! | [`VlanPerVf`](Isolation::VlanPerVf) | the PF's, with the VF's tag | the PF's, without a tag of a VF |
//! | else, or protection waived | the host does not see them: there are no ports | – |
//!
//! A VF is known by where its frame came in: the NIC puts the tag on, and nothing that the VF sends changes it (a tag of its own
//! is further inside). The tag is not part of the port's frames: it is taken off and put on here ([`TrunkPort`]). The kernel
//! sorts by a filter on each socket; what that lets through is looked at again.
//!
//! Of a card without switchdev the host sees what is for the PF's MAC and for everybody; see [`crate::isolation`].

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, Weak};

use async_trait::async_trait;
use dpumesh_core::vf::LeaseId;
use dpumesh_core::{
    Epoch, Error, ErrorKind, Fence, Frame, HEADROOM, MacAddr, Mtu, PfIndex, PortCapabilities, PortInfo,
    PortIo, PortIoLimits, PortRef, Ports, Result, VlanId,
};
use dpumesh_hw::journal::Guard;
use dpumesh_hw::netlink::Link;

use crate::card::{Change, Inner, error, indices, journal_error};
use crate::isolation::{self, Isolation};
use crate::vf::SriovVf;
use crate::{NAME, eswitch};

const OPEN: &str = "ports.open";
const TAG: usize = 4;
const ADDRESSES: usize = 12;
const ETHERNET: usize = 14;
/// EtherType of 802.1Q.
const TPID: [u8; 2] = [0x81, 0x00];

/// Which of a device's frames a port wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sieve {
    /// All.
    All,
    /// Those with this tag outside.
    Tagged(VlanId),
    /// Those without a tag of this range, both ends included.
    Except(u16, u16),
}

impl Sieve {
    /// Whether the port wants a frame with this tag outside.
    pub fn wants(self, tag: Option<u16>) -> bool {
        match self {
            Self::All => true,
            Self::Tagged(vlan) => tag == Some(vlan.get()),
            Self::Except(first, last) => !tag.is_some_and(|tag| (first..=last).contains(&tag)),
        }
    }
}

/// Ports of a card.
#[derive(Clone, Debug)]
pub(crate) struct SriovPorts {
    card: Arc<Inner>,
    vf: SriovVf,
}

/// Where a port's frames are.
struct Way {
    link: Link,
    sieve: Sieve,
    mtu: Mtu,
}

impl SriovPorts {
    pub(crate) fn new(card: Arc<Inner>, vf: SriovVf) -> Self {
        Self { card, vf }
    }

    async fn blocking<T: Send + 'static>(
        &self,
        operation: &'static str,
        work: impl FnOnce(&Self) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let ports = self.clone();
        let done = tokio::task::spawn_blocking(move || work(&ports)).await;
        done.unwrap_or_else(|failed| {
            Err(error(ErrorKind::Fault, operation, "the call broke off").source(failed))
        })
    }

    fn observe(&self) -> Result<Vec<PortInfo>> {
        const LIST: &str = "ports.list";
        drop(self.card.look(LIST)?);
        let vfs = self.vf.observe().map_err(|mut failed| {
            failed.operation = LIST.into();
            failed
        })?;
        let change = self.card.look(LIST)?;
        let mut ports = Vec::new();
        for pf in (0..self.card.pfs.len()).filter_map(|pf| u16::try_from(pf).ok()) {
            let way = uplink(&change, pf)?;
            ports.push(told(PortRef::Uplink(pf), &way, way.link.mac.map(MacAddr)));
        }
        for state in vfs {
            // One that went between the two looks is not there.
            let Ok(way) = vf_way(&change, state.port) else {
                continue;
            };
            ports.push(told(state.port, &way, Some(state.effective_mac)));
        }
        ports.sort_by_key(|info| info.port);
        Ok(ports)
    }

    fn attach(&self, fence: Fence, port: PortRef) -> Result<Box<dyn PortIo>> {
        let change = self.card.fenced(OPEN, fence)?;
        let there = match port {
            PortRef::Uplink(pf) => usize::from(pf) < self.card.pfs.len(),
            PortRef::Vf { .. } => change.vf(port).is_some(),
            _ => false,
        };
        if !there {
            return Err(change
                .refuse(ErrorKind::NotFound, "there is no such port")
                .object(port));
        }
        let way = match port {
            PortRef::Uplink(pf) => uplink(&change, pf)?,
            _ => {
                check_lease(&change, port)?;
                vf_way(&change, port)?
            }
        };
        let claim = self
            .card
            .journal
            .try_claim(&format!("{port}.port"))
            .map_err(|failed| journal_error(OPEN, failed))?
            .ok_or_else(|| {
                change
                    .refuse(ErrorKind::Busy, "the port is open already")
                    .object(port)
            })?;
        let device = self
            .card
            .kernel
            .open_frames(port, &way.link, way.mtu, way.sieve)
            .map_err(|failed| failed.backend(NAME).object(port))?;
        let gate = change.register(port);
        Ok(Box::new(CardPort {
            device: match way.sieve {
                Sieve::All => device,
                sieve => Box::new(TrunkPort { device, sieve }),
            },
            gate,
            _claim: claim,
        }))
    }
}

#[async_trait]
impl Ports for SriovPorts {
    async fn list(&self) -> Result<Vec<PortInfo>> {
        self.blocking("ports.list", Self::observe).await
    }

    async fn open(&self, fence: Fence, port: PortRef) -> Result<Box<dyn PortIo>> {
        self.blocking(OPEN, move |ports| ports.attach(fence, port)).await
    }
}

/// What the ports of a card are able to do; the kernel finishes what is left open. `ports` of them can exist.
pub(crate) fn capabilities(ports: u32) -> PortCapabilities {
    let mut able = PortCapabilities::default();
    if ports == 0 {
        return able;
    }
    (able.open, able.checksum_offload, able.tso, able.uso) = (ports, true, true, true);
    able
}

fn told(port: PortRef, way: &Way, mac: Option<MacAddr>) -> PortInfo {
    let mut info = PortInfo::new(port, way.mtu);
    info.mac = mac;
    info.link_up = way.link.up && way.link.carrier;
    info.netdev = Some(way.link.name.clone());
    info
}

fn uplink(change: &Change<'_>, pf: u16) -> Result<Way> {
    let link = change.pf_link(PfIndex(pf))?.clone();
    let sieve = match (isolation::owns_vlans(change), change.inner.options.vlans) {
        (true, Some((first, last))) => Sieve::Except(first, last),
        _ => Sieve::All,
    };
    let mtu = crate::vf::mtu_of(link.mtu);
    Ok(Way { link, sieve, mtu })
}

fn vf_way(change: &Change<'_>, port: PortRef) -> Result<Way> {
    let (pf, _) = indices(port).unwrap_or((PfIndex(0), 0));
    let (link, sieve) = if change.record.abilities.isolation == Isolation::Switchdev {
        let all = eswitch::representors(change)?;
        let own = all.into_iter().find(|representor| representor.port == port);
        let own = own.and_then(|own| change.links().iter().find(|link| link.index == own.link));
        let link = own.ok_or_else(|| {
            let message = "its representor is not there";
            change.refuse(ErrorKind::DeviceLost, message).object(port)
        })?;
        (link.clone(), Sieve::All)
    } else {
        let vlan = isolation::vlan_of(change, port)?.and_then(|id| VlanId::try_from(id).ok());
        let vlan = vlan.ok_or_else(|| {
            let message = "the host does not see the frames of this card's VFs";
            change.refuse(ErrorKind::Unsupported, message).object(port)
        })?;
        (change.pf_link(pf)?.clone(), Sieve::Tagged(vlan))
    };
    let function = change.function(port)?;
    let own = change.locate(port, &function)?.link().map(|link| link.mtu);
    let mtu = crate::vf::mtu_of(own.unwrap_or(link.mtu).min(link.mtu));
    Ok(Way { link, sieve, mtu })
}

/// Host and SoC must hold the same lease; a side that is not the host knows its own half only.
fn check_lease(change: &Change<'_>, port: PortRef) -> Result<()> {
    if lease_of(change, port).is_some() {
        return Ok(());
    }
    let message = "its lease was not admitted, or is not the host's any more";
    Err(change.refuse(ErrorKind::Denied, message).object(port))
}

fn lease_of(change: &Change<'_>, port: PortRef) -> Option<LeaseId> {
    let function = change.record.functions.get(&port)?;
    let admitted = function.admitted.as_ref()?;
    let held = function.held.as_ref().map(|held| &held.lease);
    let same = held == Some(admitted) || (held.is_none() && !change.inner.options.role.is_host());
    same.then_some(admitted.id)
}

/// Closes an open port from outside.
#[derive(Debug)]
pub(crate) struct Gate {
    port: PortRef,
    epoch: Epoch,
    /// By which a VF's port was opened.
    lease: Option<LeaseId>,
    closed: AtomicBool,
}

impl Change<'_> {
    fn register(&self, port: PortRef) -> Arc<Gate> {
        let gate = Arc::new(Gate {
            port,
            epoch: self.record.epoch,
            lease: lease_of(self, port),
            closed: AtomicBool::new(false),
        });
        let mut gates = self.inner.gates.lock().unwrap_or_else(PoisonError::into_inner);
        gates.push(Arc::downgrade(&gate));
        gate
    }

    /// Closes what must not be open any more by the record as it is now.
    pub(crate) fn close_ports(&self) {
        let mut gates = self.inner.gates.lock().unwrap_or_else(PoisonError::into_inner);
        gates.retain(|gate| Weak::strong_count(gate) > 0);
        for gate in gates.iter().filter_map(Weak::upgrade) {
            let holds = !self.record.away
                && gate.epoch == self.record.epoch
                && (gate.lease.is_none() || gate.lease == lease_of(self, gate.port));
            if !holds {
                gate.closed.store(true, Ordering::Release);
            }
        }
    }
}

/// An open port of the card.
#[derive(Debug)]
struct CardPort {
    // Closed before the claim is given up: fields are dropped in this order.
    device: Box<dyn PortIo>,
    gate: Arc<Gate>,
    _claim: Guard,
}

impl CardPort {
    fn check(&self, operation: &'static str) -> Result<()> {
        if self.gate.closed.load(Ordering::Acquire) {
            let message = "its lease ended, or the card was lost";
            return Err(error(ErrorKind::DeviceLost, operation, message).object(self.device.port()));
        }
        Ok(())
    }
}

fn ours(failed: Error) -> Error {
    failed.backend(NAME)
}

impl PortIo for CardPort {
    fn port(&self) -> PortRef {
        self.device.port()
    }

    fn limits(&self) -> PortIoLimits {
        self.device.limits()
    }

    fn receive(&mut self, frames: &mut [Frame]) -> Result<usize> {
        self.check("port.receive")?;
        self.device.receive(frames).map_err(ours)
    }

    fn transmit(&mut self, frames: &mut [Frame]) -> Result<usize> {
        self.check("port.transmit")?;
        self.device.transmit(frames).map_err(ours)
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        self.device.poll_fd()
    }

    fn refused(&self) -> u64 {
        self.device.refused()
    }
}

/// The part of a device's frames that a sieve wants. A tag that says whose they are is not part of the frames.
///
/// A frame at the device's MTU that has a tag of its own does not fit with a second one, and is refused and counted.
#[derive(Debug)]
struct TrunkPort {
    device: Box<dyn PortIo>,
    sieve: Sieve,
}

impl TrunkPort {
    /// Closes gaps in the first `count` frames; returns how many are left.
    fn sort(&self, frames: &mut [Frame], count: usize) -> usize {
        let mut kept = 0;
        for index in 0..count {
            let mine = self.sieve.wants(tag_of(&frames[index]));
            if mine && (!matches!(self.sieve, Sieve::Tagged(_)) || take_off(&mut frames[index])) {
                frames.swap(kept, index);
                kept += 1;
            }
        }
        kept
    }
}

impl PortIo for TrunkPort {
    fn port(&self) -> PortRef {
        self.device.port()
    }

    fn limits(&self) -> PortIoLimits {
        self.device.limits()
    }

    fn receive(&mut self, frames: &mut [Frame]) -> Result<usize> {
        loop {
            let count = self.device.receive(frames)?;
            let kept = self.sort(frames, count);
            // Others' frames that came before the socket had its filter may stand in front of ours.
            if kept > 0 || count < frames.len() || frames.is_empty() {
                return Ok(kept);
            }
        }
    }

    fn transmit(&mut self, frames: &mut [Frame]) -> Result<usize> {
        let Sieve::Tagged(vlan) = self.sieve else {
            // With a VF's tag it would reach that VF: an empty frame is refused by the device, and counted.
            for frame in frames.iter_mut().filter(|frame| !self.sieve.wants(tag_of(frame))) {
                frame.set_len(0);
            }
            return self.device.transmit(frames);
        };
        // A shorter one is refused by the device as it is.
        for frame in frames.iter_mut().filter(|frame| frame.len() >= ETHERNET) {
            put_on(frame, vlan);
        }
        let sent = self.device.transmit(frames);
        let taken = *sent.as_ref().unwrap_or(&0);
        for frame in frames[taken..].iter_mut().filter(|frame| frame.len() >= ETHERNET) {
            take_off(frame);
        }
        sent
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        self.device.poll_fd()
    }

    fn refused(&self) -> u64 {
        self.device.refused()
    }
}

/// The outermost 802.1Q tag's VLAN.
fn tag_of(frame: &Frame) -> Option<u16> {
    let tag = frame.octets().get(ADDRESSES..ADDRESSES + TAG)?;
    (tag[..2] == TPID).then(|| u16::from_be_bytes([tag[2], tag[3]]) & 0xfff)
}

/// Takes the outermost tag off. False, and no change, when an open checksum would lose its start.
fn take_off(frame: &mut Frame) -> bool {
    let mut addresses = [0; ADDRESSES];
    addresses.copy_from_slice(&frame.octets()[..ADDRESSES]);
    if !frame.pull_front(TAG) {
        return false;
    }
    frame.octets_mut()[..ADDRESSES].copy_from_slice(&addresses);
    if let Some(gso) = &mut frame.gso {
        gso.header_len = gso.header_len.saturating_sub(TAG as u16);
    }
    true
}

/// Puts a tag on; a frame without room in front gets a new place.
fn put_on(frame: &mut Frame, vlan: VlanId) {
    if frame.push_front(TAG).is_none() {
        let mut roomy = Frame::with_capacity(HEADROOM, frame.len());
        roomy.fill(frame.octets());
        (roomy.checksum, roomy.gso, roomy.mark) = (frame.checksum, frame.gso, frame.mark);
        *frame = roomy;
        frame.push_front(TAG);
    }
    let octets = frame.octets_mut();
    octets.copy_within(TAG..TAG + ADDRESSES, 0);
    octets[ADDRESSES..ADDRESSES + 2].copy_from_slice(&TPID);
    octets[ADDRESSES + 2..ADDRESSES + TAG].copy_from_slice(&vlan.get().to_be_bytes());
    if let Some(gso) = &mut frame.gso {
        gso.header_len = gso.header_len.saturating_add(TAG as u16);
    }
}

#[cfg(test)]
mod tests {
    use dpumesh_core::vf::{ResetLevel, VfRequest};
    use dpumesh_core::{Backend, BackendExt, Checksum};
    use dpumesh_hw::netlink::EswitchMode;
    use proptest::prelude::*;

    use super::*;
    use crate::fake::{FakeMachine, Model};
    use crate::kernel::Kernel;
    use crate::{Card, Options, Parts, Protect, discover};

    fn open(machine: &FakeMachine, protect: Protect) -> Arc<Card> {
        let mut options = Options::new(machine.device(), "dpu0", machine.directory());
        options.vlans = Some((3000, 3999));
        options.protect = protect;
        Card::open_on(options, Arc::new(machine.clone()), Parts::default()).expect("opened")
    }

    async fn admitted(card: &Card, owner: &str) -> dpumesh_core::vf::VfLease {
        let vf = card.require_vf().expect("VFs");
        let lease = vf.lease(card.fence(), &VfRequest::new(owner)).await;
        let lease = lease.expect("leased");
        vf.admit(card.fence(), &lease).await.expect("admitted");
        lease
    }

    async fn port(card: &Card, port: PortRef) -> Box<dyn PortIo> {
        let ports = card.require_ports().expect("ports");
        ports.open(card.fence(), port).await.expect("opened")
    }

    fn octets(mark: u8, tag: Option<u16>) -> Vec<u8> {
        let mut octets = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
        if let Some(tag) = tag {
            octets.extend(TPID);
            octets.extend(tag.to_be_bytes());
        }
        octets.extend([0x88, 0xb5, mark]);
        octets.resize(64, 0);
        octets
    }

    fn received(port: &mut Box<dyn PortIo>) -> Vec<Vec<u8>> {
        let mut frames: Vec<Frame> = (0..4).map(|_| Frame::new()).collect();
        let mut all = Vec::new();
        while let count @ 1.. = port.receive(&mut frames).expect("received") {
            all.extend(frames[..count].iter().map(|frame| frame.octets().to_vec()));
        }
        all
    }

    #[tokio::test]
    async fn a_vf_is_known_by_the_tag_that_the_card_puts_on() {
        let machine = FakeMachine::new(Model::igb()).expect("a machine");
        let card = open(&machine, Protect::Required);
        let vf = card.require_vf().expect("VFs");
        vf.set_vf_count(card.fence(), PfIndex(0), 2).await.expect("made");
        let (one, two) = (admitted(&card, "one").await, admitted(&card, "two").await);
        let mut first = port(&card, one.port).await;
        let mut second = port(&card, two.port).await;
        let mut uplink = port(&card, PortRef::Uplink(0)).await;
        for _ in 0..9 {
            machine.send(two.port, &octets(2, None));
        }
        machine.send(one.port, &octets(1, None));
        // It claims to be the other one.
        machine.send(one.port, &octets(3, Some(3001)));
        assert_eq!(received(&mut first), [octets(1, None), octets(3, Some(3001))]);
        assert_eq!(received(&mut second).len(), 9);
        assert_eq!(received(&mut uplink), Vec::<Vec<u8>>::new());
        let mut frames = [Frame::copy_of(&octets(4, None)), Frame::copy_of(&[0; 13])];
        assert_eq!(first.transmit(&mut frames).expect("sent"), 2);
        assert_eq!(first.refused(), 1, "one was too short");
        // The uplink sends no frame to a VF, whatever its tag.
        let mut frames = [
            Frame::copy_of(&octets(5, Some(3000))),
            Frame::copy_of(&octets(6, Some(7))),
        ];
        assert_eq!(uplink.transmit(&mut frames).expect("sent"), 2);
        assert_eq!(uplink.refused(), 1);
        let sent: Vec<Vec<u8>> = machine
            .take_sent()
            .into_iter()
            .map(|(_, octets)| octets)
            .map(|mut octets| {
                octets.truncate(64);
                octets
            })
            .collect();
        assert_eq!(sent, [octets(4, Some(3000)), octets(6, Some(7))]);
    }

    #[tokio::test]
    async fn a_port_ends_with_its_lease_and_with_the_cards_life() {
        let machine = FakeMachine::new(Model::igb()).expect("a machine");
        let card = open(&machine, Protect::Required);
        let vf = card.require_vf().expect("VFs");
        vf.set_vf_count(card.fence(), PfIndex(0), 2).await.expect("made");
        let lease = admitted(&card, "pod").await;
        let mut frames = [Frame::new()];
        let mut kind = |port: &mut Box<dyn PortIo>| port.receive(&mut frames).map_err(|failed| failed.kind);
        let mut released = port(&card, lease.port).await;
        assert_eq!(kind(&mut released), Ok(0));
        vf.release(card.fence(), &lease, ResetLevel::Config)
            .await
            .expect("released");
        assert_eq!(kind(&mut released), Err(ErrorKind::DeviceLost));
        let mut uplink = port(&card, PortRef::Uplink(0)).await;
        assert_eq!(kind(&mut uplink), Ok(0));
        machine.lose();
        card.look();
        assert_eq!(kind(&mut uplink), Err(ErrorKind::DeviceLost));
        machine.bring_back();
        card.look();
        assert_eq!(
            kind(&mut uplink),
            Err(ErrorKind::DeviceLost),
            "it is of a former life"
        );
    }

    #[tokio::test]
    async fn a_card_that_goes_while_it_is_read_keeps_its_parts() {
        let machine = FakeMachine::new(Model::igb()).expect("a machine");
        let card = open(&machine, Protect::Required);
        let before = card.capabilities();
        let function = Kernel::sysfs(&machine).join(discover::directory(machine.device()));
        std::fs::remove_dir_all(function).expect("its network device is still there");
        card.look();
        assert_eq!(card.capabilities(), before);
        machine.lose();
        card.look();
        let listed = card.require_ports().expect("ports").list().await;
        assert_eq!(listed.expect_err("away").kind, ErrorKind::DeviceLost);
    }

    #[tokio::test]
    async fn in_switchdev_mode_a_vfs_frames_are_its_representors() {
        let machine = FakeMachine::new(Model::mlx5()).expect("a machine");
        let card = open(&machine, Protect::Required);
        card.set_eswitch_mode(card.fence(), EswitchMode::Switchdev)
            .expect("switched");
        let vf = card.require_vf().expect("VFs");
        vf.set_vf_count(card.fence(), PfIndex(0), 2).await.expect("made");
        let lease = admitted(&card, "pod").await;
        let mut own = port(&card, lease.port).await;
        machine.send(lease.port, &octets(1, Some(3001)));
        machine.send(PortRef::vf(1), &octets(2, None));
        assert_eq!(received(&mut own), [octets(1, Some(3001))]);
        let representors = card.representors().expect("listed");
        let mut frames = [Frame::copy_of(&octets(3, None))];
        own.transmit(&mut frames).expect("sent");
        let link = representors
            .iter()
            .find(|representor| representor.port == lease.port);
        let link = link.expect("there").link;
        assert_eq!(machine.take_sent(), [(link, octets(3, None))]);
    }

    #[tokio::test]
    async fn where_the_host_does_not_see_frames_there_are_no_ports() {
        for (model, protect) in [
            (Model::igb(), Protect::Waived),
            (Model::bare(), Protect::Required),
        ] {
            let machine = FakeMachine::new(model).expect("a machine");
            let card = open(&machine, protect);
            assert!(card.ports().is_none());
            assert_eq!(card.capabilities().ports, PortCapabilities::default());
        }
    }

    proptest! {
        /// Putting a tag on and taking it off changes nothing, and every other tag is another's.
        #[test]
        fn a_tag_goes_on_and_off(payload in prop::collection::vec(any::<u8>(), 14..200), room in 0_usize..8, id in 1_u16..4095, other in 1_u16..4095) {
            let vlan = VlanId::try_from(id).expect("a VLAN");
            let mut frame = Frame::with_capacity(room, payload.len());
            frame.receive_area().copy_from_slice(&payload);
            prop_assert!(frame.set_len(payload.len()));
            frame.checksum = Checksum::Partial { start: 14, offset: 0 };
            let before = (frame.octets().to_vec(), frame.checksum);
            put_on(&mut frame, vlan);
            prop_assert_eq!(frame.len(), payload.len() + TAG);
            prop_assert_eq!(tag_of(&frame), Some(id));
            prop_assert_eq!(frame.checksum, Checksum::Partial { start: 18, offset: 0 });
            let wanted = Sieve::Tagged(VlanId::try_from(other).expect("a VLAN")).wants(tag_of(&frame));
            prop_assert_eq!(wanted, id == other);
            prop_assert_eq!(Sieve::Except(other, other).wants(tag_of(&frame)), id != other);
            prop_assert!(take_off(&mut frame));
            prop_assert_eq!((frame.octets().to_vec(), frame.checksum), before);
        }
    }
}
