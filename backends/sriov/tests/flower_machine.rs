//! Real tc flower: the kit's steering cases and probe frames against [`dpumesh_sriov::flower`] on a kernel that has it.
//!
//! TAPs stand for representors: what is written into one arrives on its netdev's ingress as what a VF sends, what a rule redirects to one can
//! be read from it as what a VF receives. The VFs' leases are the memory backend's. `tests/qemu/flower` runs this file in the virtual
//! machine; on a kernel without tc flower it says so and ends.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use dpumesh_core::offload::Program;
use dpumesh_core::steering::{
    Action, Batch, Change, Cookie, Encapsulation, Group, IpMatch, IpProtocol, MeterId, MissPolicy, Owner,
    Pattern, Placement, Priority, SteeringRule, TunnelKind,
};
use dpumesh_core::{
    Backend, BackendInfo, Capabilities, Epoch, Error, ErrorKind, EventStream, Fence, FlowSteering,
    FlowSteeringExt, Frame, Mtu, NpOffload, PortIo, PortRef, Ports, Result, ShmTransport, VfAllocator,
    VfAttributes,
};
use dpumesh_hw::conformance::{
    Clock, Crash, Expectations, Fixture, Namespaces, Probe, Reset, Rig, Sabotage, run,
};
use dpumesh_hw::memory::{MemoryBackend, MemoryCard};
use dpumesh_hw::netlink::{Address, LinkChange, Neighbour, Netlink};
use dpumesh_hw::netns::Namespace;
use dpumesh_sriov::flower::{Kernel, Life, Meter, Options, Request, Socket, Steering};
use dpumesh_tap::device::{TapPort, create_tap};

const BLOCK: u32 = 77;
const VFS: u16 = 4;
/// Small enough that the kit fills the table.
const RULES: u64 = 200;

/// A card of TAPs in a namespace of its own.
#[derive(Debug)]
struct Yard {
    namespace: Namespace,
    links: BTreeMap<PortRef, u32>,
    ends: Mutex<BTreeMap<PortRef, TapPort>>,
}

impl Yard {
    fn new() -> Result<Self> {
        let namespace = Namespace::create().map_err(fault)?;
        let quiet = namespace.run(|| {
            std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1")?;
            std::fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1")
        });
        quiet.map_err(fault)?.map_err(fault)?;
        let mut netlink = Netlink::open_in(&namespace).map_err(fault)?;
        let (mut links, mut ends) = (BTreeMap::new(), BTreeMap::new());
        let ports = (0..VFS)
            .map(PortRef::vf)
            .chain([PortRef::Uplink(0), PortRef::Stack(0)]);
        for (index, port) in ports.enumerate() {
            let name = format!("rep{index}");
            create_tap(&namespace, &name)?;
            let link = netlink.link(&name).map_err(fault)?.index;
            netlink
                .change_link(link, &LinkChange::new().up())
                .map_err(fault)?;
            let mut end = TapPort::attach(port, &namespace, &name, Mtu::ETHERNET)?;
            end.withdraw_offloads()?;
            links.insert(port, link.0);
            ends.insert(port, end);
        }
        Ok(Self {
            namespace,
            links,
            ends: Mutex::new(ends),
        })
    }

    fn steering(&self, life: &Arc<Life>) -> Result<Steering> {
        let socket = self.namespace.run(Socket::open).map_err(fault)?.map_err(fault)?;
        let mut options = Options::new("flower", BLOCK, self.links.clone());
        options.rules = RULES;
        options.meters = BTreeMap::from([(
            0,
            Meter {
                rate: 125_000,
                burst: 3000,
            },
        )]);
        Steering::open(Box::new(socket), options, Arc::clone(life))
    }

    fn send(&self, port: PortRef, octets: &[u8]) -> Result<()> {
        let mut ends = self.ends.lock().unwrap_or_else(PoisonError::into_inner);
        let end = ends.get_mut(&port).ok_or_else(|| fault("no such port"))?;
        match end.transmit(&mut [Frame::copy_of(octets)])? {
            1 => Ok(()),
            _ => Err(fault("the TAP took no frame")),
        }
    }

    async fn receive(&self, port: PortRef, within: Duration) -> Result<Option<Vec<u8>>> {
        let begun = Instant::now();
        loop {
            let mut frames = [Frame::new()];
            let count = {
                let mut ends = self.ends.lock().unwrap_or_else(PoisonError::into_inner);
                let end = ends.get_mut(&port).ok_or_else(|| fault("no such port"))?;
                end.receive(&mut frames)?
            };
            if count == 1 {
                return Ok(Some(frames[0].octets().to_vec()));
            }
            if begun.elapsed() >= within {
                return Ok(None);
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

fn fault(error: impl ToString) -> Error {
    Error::new(ErrorKind::Fault, "rig", error.to_string())
}

/// Leases of the memory backend, rules of tc.
#[derive(Debug)]
struct FlowerBackend {
    vf: Arc<MemoryBackend>,
    steering: Steering,
}

impl Backend for FlowerBackend {
    fn info(&self) -> BackendInfo {
        let mut info = self.vf.info();
        info.name = "flower".into();
        info
    }

    fn capabilities(&self) -> Capabilities {
        let mut capabilities = Capabilities::default();
        capabilities.mode = "flower".into();
        capabilities.vf = self.vf.capabilities().vf;
        capabilities.steering = self.steering.capabilities();
        capabilities
    }

    fn epoch(&self) -> Epoch {
        self.vf.epoch()
    }

    fn vf(&self) -> Option<&dyn VfAllocator> {
        self.vf.vf()
    }

    fn steering(&self) -> Option<&dyn FlowSteering> {
        Some(&self.steering)
    }

    fn offload(&self) -> Option<&dyn NpOffload> {
        None
    }

    fn transport(&self) -> Option<&dyn ShmTransport> {
        None
    }

    fn ports(&self) -> Option<&dyn Ports> {
        None
    }

    fn events(&self) -> Box<dyn EventStream> {
        self.vf.events()
    }
}

#[derive(Debug)]
struct FlowerFixture;

#[async_trait]
impl Fixture for FlowerFixture {
    fn name(&self) -> String {
        "flower".into()
    }

    async fn open(&self) -> Result<Box<dyn Rig>> {
        let mut capabilities = dpumesh_hw::memory::capabilities();
        capabilities.vf.max_vfs = VFS;
        capabilities.vf.attributes.remove(VfAttributes::SPOOF_CHECK);
        let card = MemoryCard::with_capabilities(capabilities);
        let yard = Yard::new()?;
        let vf = card.both();
        let life = Arc::new(Life::new(vf.epoch()));
        let steering = yard.steering(&life)?;
        Ok(Box::new(FlowerRig {
            card,
            backend: Mutex::new(Arc::new(FlowerBackend { vf, steering })),
            life,
            yard,
        }))
    }

    fn expectations(&self) -> Expectations {
        let reason = "leases are the memory backend's, which does not know the TAPs";
        let of_leases = [
            "a_vf_that_only_the_host_leased_passes_no_frame",
            "a_revoked_vf_passes_no_frame",
        ];
        Expectations {
            failures: of_leases
                .into_iter()
                .map(|case| (case.to_owned(), reason.to_owned()))
                .collect(),
            ..Expectations::default()
        }
    }
}

#[derive(Debug)]
struct FlowerRig {
    backend: Mutex<Arc<FlowerBackend>>,
    life: Arc<Life>,
    card: MemoryCard,
    yard: Yard,
}

impl FlowerRig {
    fn backend(&self) -> Arc<FlowerBackend> {
        Arc::clone(&self.backend.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Rig for FlowerRig {
    fn host(&self) -> Arc<dyn Backend> {
        self.backend()
    }

    fn soc(&self) -> Arc<dyn Backend> {
        self.backend()
    }

    fn reset(&self) -> Option<&dyn Reset> {
        Some(self)
    }

    fn probe(&self) -> Option<&dyn Probe> {
        Some(self)
    }

    fn namespaces(&self) -> Option<&dyn Namespaces> {
        None
    }

    fn crash(&self) -> Option<&dyn Crash> {
        Some(self)
    }

    fn sabotage(&self) -> Option<&dyn Sabotage> {
        None
    }

    fn clock(&self) -> Option<&dyn Clock> {
        None
    }

    fn programs(&self) -> Vec<Program> {
        Vec::new()
    }
}

#[async_trait]
impl Reset for FlowerRig {
    async fn lose(&self) -> Result<()> {
        self.life.lose();
        self.card.lose();
        Ok(())
    }

    /// A reset takes the card's rules: the block is emptied by another hand.
    async fn bring_back(&self) -> Result<()> {
        let socket = self
            .yard
            .namespace
            .run(Socket::open)
            .map_err(fault)?
            .map_err(fault)?;
        let ports = self.yard.links.clone();
        let other = Steering::open(
            Box::new(socket),
            Options::new("other", BLOCK, ports.clone()),
            Arc::default(),
        )?;
        other.remove().await?;
        self.card.restore();
        let backend = self.backend();
        backend.steering.renew(backend.epoch(), ports).await?;
        self.life.return_with(backend.epoch());
        Ok(())
    }

    fn most_in_a_row(&self) -> u64 {
        50
    }
}

#[async_trait]
impl Crash for FlowerRig {
    async fn crash(&self) -> Result<()> {
        let steering = self.yard.steering(&self.life)?;
        let vf = self.card.both();
        *self.backend.lock().unwrap_or_else(PoisonError::into_inner) =
            Arc::new(FlowerBackend { vf, steering });
        Ok(())
    }
}

#[async_trait]
impl Probe for FlowerRig {
    async fn inject(&self, port: PortRef, octets: &[u8]) -> Result<()> {
        self.yard.send(port, octets)
    }

    async fn observed(&self, port: PortRef, within: Duration) -> Result<Option<Vec<u8>>> {
        self.yard.receive(port, within).await
    }
}

/// A UDP frame to an address, told apart by its tag.
fn udp(destination: [u8; 4], tag: u8) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 0x08, 0x00];
    let mut header = [0x45, 0, 0, 46, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 0, 0, 0, 0];
    header[16..20].copy_from_slice(&destination);
    let sum = header.chunks(2).fold(0_u32, |sum, pair| {
        sum + u32::from(u16::from_be_bytes([pair[0], pair[1]]))
    });
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    frame.extend(header);
    frame.extend([0x1b, 0x58, 0x1b, 0x59, 0, 26, 0, 0]);
    frame.extend([tag; 18]);
    frame
}

fn to(destination: [u8; 4]) -> Pattern {
    Pattern {
        ip_dst: Some(IpMatch::from(std::net::IpAddr::from(destination))),
        ..Pattern::default()
    }
}

const ARRIVAL: Duration = Duration::from_secs(5);
const A: PortRef = PortRef::vf(0);
const B: PortRef = PortRef::vf(1);

/// A yard with its steering.
struct Bed {
    yard: Yard,
    life: Arc<Life>,
    steering: Steering,
}

impl Bed {
    fn new() -> Self {
        let yard = Yard::new().expect("TAPs");
        let life = Arc::new(Life::new(Epoch(1)));
        let steering = yard.steering(&life).expect("steering");
        Self { yard, life, steering }
    }

    fn fence(&self) -> Fence {
        Fence(self.life.epoch())
    }

    async fn add(
        &self,
        cookie: u128,
        priority: u32,
        pattern: Pattern,
        actions: Vec<Action>,
    ) -> Result<Change> {
        let rule = SteeringRule::new(Cookie(cookie), Owner::Agent, Priority(priority), pattern, actions);
        self.steering.add(self.fence(), rule).await
    }

    async fn arrives(&self, port: PortRef, frame: &[u8]) {
        let found = self.yard.receive(port, ARRIVAL).await.expect("readable");
        assert_eq!(found.as_deref(), Some(frame), "at {port}");
    }

    async fn is_silent(&self, port: PortRef) {
        let found = self
            .yard
            .receive(port, Duration::from_millis(50))
            .await
            .expect("readable");
        assert_eq!(found, None, "at {port}");
    }
}

async fn rules_of_a_dead_process_are_found_again() {
    let Bed { yard, life, steering } = Bed::new();
    let fence = Fence(life.epoch());
    let rule = |cookie: u128, owner, pattern, actions| {
        SteeringRule::new(Cookie(cookie), owner, Priority(cookie as u32), pattern, actions)
    };
    let tcp = Pattern {
        ip_proto: Some(IpProtocol::TCP),
        l4_dst: Some(dpumesh_core::steering::PortRange { first: 80, last: 90 }),
        port: Some(A),
        ..Pattern::default()
    };
    let rules = [
        rule(
            1,
            Owner::Agent,
            to([10, 0, 0, 9]),
            vec![Action::Count, Action::DecrementTtl, Action::Forward(B)],
        ),
        rule(
            2,
            Owner::User(4711),
            tcp,
            vec![Action::Mirror(PortRef::Uplink(0)), Action::Count, Action::Punt],
        ),
        rule(3, Owner::Proxy, to([10, 0, 0, 8]), vec![Action::Jump(Group(5))]),
        rule(
            4,
            Owner::Agent,
            to([10, 0, 0, 7]),
            vec![Action::Meter(MeterId(0)), Action::ToKernel],
        ),
    ];
    let batch = Batch::new(
        rules
            .iter()
            .cloned()
            .map(dpumesh_core::steering::Operation::Add)
            .collect(),
    );
    steering
        .apply(fence, &batch)
        .await
        .expect("applied")
        .into_result()
        .expect("added");
    yard.send(A, &udp([10, 0, 0, 9], 1)).expect("sent");
    assert!(yard.receive(B, ARRIVAL).await.expect("readable").is_some());
    drop(steering);
    let steering = yard.steering(&life).expect("again");
    for rule in &rules {
        let listed = steering.list(rule.owner).await.expect("listed");
        assert!(
            listed.iter().any(|there| there.rule == *rule),
            "{rule:?} is not in {listed:?}"
        );
    }
    let counted = steering.counters(Owner::Agent, &[Cookie(1)]).await.expect("read");
    assert_eq!(
        counted[0].map(|counters| counters.packets),
        Some(1),
        "counting went on"
    );
    let again = steering
        .apply(fence, &batch)
        .await
        .expect("applied")
        .into_result()
        .expect("there");
    assert!(
        again.iter().all(|change| matches!(change, Change::Present(_))),
        "{again:?}"
    );
    steering.remove().await.expect("removed");
}

async fn what_others_put_into_the_block_stays_theirs() {
    let bed = Bed::new();
    bed.add(1, 0, to([10, 0, 0, 9]), vec![Action::Forward(B)])
        .await
        .expect("added");
    let life = Arc::new(Life::new(Epoch(1)));
    // Another process's steering adopts the rule; what it then removes is gone for the first one too.
    let other = bed.yard.steering(&life).expect("another");
    assert_eq!(other.list(Owner::Agent).await.expect("listed").len(), 1);
    assert_eq!(
        other.flush(Fence(Epoch(1)), Owner::Agent).await.expect("flushed"),
        1
    );
    assert!(
        bed.steering.list(Owner::Agent).await.expect("listed").is_empty(),
        "never what somebody once asked for"
    );
    bed.add(1, 0, to([10, 0, 0, 9]), vec![Action::Forward(B)])
        .await
        .expect("added again");
    bed.yard.send(A, &udp([10, 0, 0, 9], 1)).expect("sent");
    bed.arrives(B, &udp([10, 0, 0, 9], 1)).await;
}

async fn a_port_lets_its_misses_through_when_asked() {
    let bed = Bed::new();
    bed.add(1, 0, Pattern::default(), vec![Action::Jump(Group(1))])
        .await
        .expect("added");
    // Group 1 is empty: whatever comes there is dropped, also with an open port.
    bed.steering
        .set_miss_policy(bed.fence(), A, MissPolicy::Software)
        .await
        .expect("open");
    bed.yard.send(A, &udp([10, 0, 0, 9], 1)).expect("sent");
    bed.is_silent(B).await;
    bed.steering
        .set_miss_policy(bed.fence(), A, MissPolicy::Software)
        .await
        .expect("open already");
    bed.steering
        .set_miss_policy(bed.fence(), A, MissPolicy::Drop)
        .await
        .expect("closed");
    bed.steering
        .set_miss_policy(bed.fence(), A, MissPolicy::Drop)
        .await
        .expect("closed already");
}

async fn a_meter_drops_what_exceeds_it() {
    let bed = Bed::new();
    bed.add(
        1,
        0,
        to([10, 0, 0, 9]),
        vec![Action::Count, Action::Meter(MeterId(0)), Action::Forward(B)],
    )
    .await
    .expect("added");
    let mut arrived = 0;
    for tag in 0..200 {
        bed.yard.send(A, &udp([10, 0, 0, 9], tag)).expect("sent");
    }
    while bed
        .yard
        .receive(B, Duration::from_millis(50))
        .await
        .expect("readable")
        .is_some()
    {
        arrived += 1;
    }
    assert!(
        (40..200).contains(&arrived),
        "{arrived} of 200 frames of 46 octets passed a burst of 3000 octets"
    );
    let counted = bed
        .steering
        .counters(Owner::Agent, &[Cookie(1)])
        .await
        .expect("read");
    assert_eq!(
        counted[0].map(|counters| counters.packets),
        Some(200),
        "counted before the meter"
    );
}

async fn equal_rules_stand_beside_one_another() {
    let bed = Bed::new();
    for cookie in 1..=7 {
        bed.add(cookie, 0, to([10, 0, 0, 9]), vec![Action::Forward(B)])
            .await
            .expect("added");
    }
    let error = bed
        .add(8, 0, to([10, 0, 0, 9]), vec![Action::Forward(B)])
        .await
        .expect_err("no more");
    assert_eq!(error.kind, ErrorKind::CapacityExceeded, "{error}");
    assert_eq!(bed.steering.list(Owner::Agent).await.expect("listed").len(), 7);
    for cookie in 1..=6 {
        bed.steering.remove_rule(bed.fence(), cookie).await;
        bed.yard.send(A, &udp([10, 0, 0, 9], 1)).expect("sent");
        bed.arrives(B, &udp([10, 0, 0, 9], 1)).await;
    }
}

#[async_trait]
trait RemoveRule {
    async fn remove_rule(&self, fence: Fence, cookie: u128);
}

#[async_trait]
impl RemoveRule for Steering {
    async fn remove_rule(&self, fence: Fence, cookie: u128) {
        let remove = dpumesh_core::steering::Operation::Remove {
            owner: Owner::Agent,
            cookie: Cookie(cookie),
        };
        let outcome = self
            .apply(fence, &Batch::new(vec![remove]))
            .await
            .expect("applied");
        outcome.into_result().expect("removed");
    }
}

async fn a_netdev_with_a_foreign_qdisc_is_refused_by_name() {
    let bed = Bed::new();
    let socket = bed
        .yard
        .namespace
        .run(Socket::open)
        .expect("entered")
        .expect("opened");
    let options = Options::new("flower", BLOCK + 1, bed.yard.links.clone());
    let error = Steering::open(Box::new(socket), options, Arc::default()).expect_err("taken");
    assert_eq!(error.kind, ErrorKind::Busy, "{error}");
    assert!(error.message.contains("rep0"), "{error}");
}

async fn hardware_is_refused_where_there_is_none() {
    let bed = Bed::new();
    let mut rule = SteeringRule::new(
        Cookie(1),
        Owner::Agent,
        Priority(0),
        to([10, 0, 0, 9]),
        vec![Action::Drop],
    );
    rule.placement = dpumesh_core::steering::PlacementRequest::Hardware;
    let error = bed
        .steering
        .add(bed.fence(), rule.clone())
        .await
        .expect_err("no hardware");
    assert_eq!(error.kind, ErrorKind::Unsupported, "{error}");
    rule.placement = dpumesh_core::steering::PlacementRequest::Any;
    let change = bed.steering.add(bed.fence(), rule).await.expect("in software");
    assert!(
        matches!(change, Change::Added(Placement::Software(_))),
        "{change:?}"
    );
    assert_eq!(bed.steering.capabilities().hardware_rules, 0);
}

async fn a_thousand_rules_come_and_go() {
    let mut bed = Bed::new();
    drop(bed.steering);
    let socket = bed
        .yard
        .namespace
        .run(Socket::open)
        .expect("entered")
        .expect("opened");
    let options = Options::new("flower", BLOCK, bed.yard.links.clone());
    bed.steering = Steering::open(Box::new(socket), options, Arc::clone(&bed.life)).expect("opened");
    let rule = |i: u16| {
        let [high, low] = i.to_be_bytes();
        let actions = vec![Action::Count, Action::Forward(B)];
        SteeringRule::new(
            Cookie(i.into()),
            Owner::Agent,
            Priority(0),
            to([10, 1, high, low]),
            actions,
        )
    };
    let add = Batch::new(
        (0..1000)
            .map(|i| dpumesh_core::steering::Operation::Add(rule(i)))
            .collect(),
    );
    let begun = Instant::now();
    bed.steering
        .apply(bed.fence(), &add)
        .await
        .expect("applied")
        .into_result()
        .expect("added");
    let added = begun.elapsed();
    let cookies: Vec<Cookie> = (0..1000).map(Cookie).collect();
    let begun = Instant::now();
    let counted = bed.steering.counters(Owner::Agent, &cookies).await.expect("read");
    let read = begun.elapsed();
    assert!(counted.iter().all(Option::is_some));
    let begun = Instant::now();
    assert_eq!(
        bed.steering
            .flush(bed.fence(), Owner::Agent)
            .await
            .expect("flushed"),
        1000
    );
    let per_rule = |time: Duration| time.as_micros() / 1000;
    println!(
        "1,000 rules on this kernel: {} µs to add, {} µs to read, {} µs to remove, each",
        per_rule(added),
        per_rule(read),
        per_rule(begun.elapsed())
    );
}

/// A VF's frame leaves by one NIC, crosses the cable, comes in by the other and reaches the other VF: four rules on real drivers.
async fn frames_cross_the_cable_between_two_nics() {
    let bed = Bed::new();
    let mut outside = Netlink::open().expect("rtnetlink");
    let (Ok(near), Ok(far)) = (outside.link("eth0"), outside.link("eth1")) else {
        println!("frames_cross_the_cable_between_two_nics: SKIPPED, there are no two NICs");
        return;
    };
    let mut inside = Netlink::open_in(&bed.yard.namespace).expect("rtnetlink");
    let mut ports = bed.yard.links.clone();
    for (port, nic) in [(PortRef::Uplink(1), "eth0"), (PortRef::Uplink(2), "eth1")] {
        let link = if nic == "eth0" { near.index } else { far.index };
        outside
            .change_link(link, &LinkChange::new().namespace(&bed.yard.namespace))
            .expect("moved");
        let link = inside.link(nic).expect("there").index;
        inside.change_link(link, &LinkChange::new().up()).expect("up");
        ports.insert(port, link.0);
    }
    bed.steering.set_ports(ports).await.expect("bound");
    let from = |port| Pattern {
        port: Some(port),
        ..Pattern::default()
    };
    let mac = dpumesh_core::MacAddr(far.mac.expect("an Ethernet address"));
    let out = vec![
        Action::Rewrite(dpumesh_core::steering::RewriteField::EthDst(mac)),
        Action::Forward(PortRef::Uplink(1)),
    ];
    bed.add(1, 0, from(A), out).await.expect("added");
    bed.add(
        2,
        0,
        from(PortRef::Uplink(2)),
        vec![Action::Count, Action::Forward(B)],
    )
    .await
    .expect("added");
    let mut expected = udp([10, 0, 0, 9], 1);
    expected[..6].copy_from_slice(&mac.0);
    // The link comes up when the two NICs have found one another; until then frames are lost.
    let begun = Instant::now();
    let runs = |netlink: &mut Netlink, nic| netlink.link(nic).is_ok_and(|link| link.running);
    while !(runs(&mut inside, "eth0") && runs(&mut inside, "eth1"))
        && begun.elapsed() < Duration::from_secs(30)
    {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let found = loop {
        bed.yard.send(A, &udp([10, 0, 0, 9], 1)).expect("sent");
        let found = bed
            .yard
            .receive(B, Duration::from_millis(100))
            .await
            .expect("readable");
        if found.is_some() || begun.elapsed() > Duration::from_secs(60) {
            break found;
        }
    };
    let nics = ["eth0", "eth1"].map(|nic| {
        inside
            .link(nic)
            .map(|link| (link.carrier, link.running, link.statistics))
    });
    assert_eq!(
        found,
        Some(expected),
        "what came out of the other VF; the NICs: {nics:?}"
    );
    let counted = bed
        .steering
        .counters(Owner::Agent, &[Cookie(2)])
        .await
        .expect("read");
    assert!(
        counted[0].is_some_and(|counters| counters.packets > 0),
        "{counted:?}"
    );
}

/// An attribute.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut octets = ((value.len() + 4) as u16).to_ne_bytes().to_vec();
    octets.extend(kind.to_ne_bytes());
    octets.extend(value);
    octets.resize(octets.len().next_multiple_of(4), 0);
    octets
}

/// Makes a VXLAN netdev that takes its outer headers from tc, up.
fn make_tunnel(namespace: &Namespace, name: &str) -> u32 {
    const NEW_LINK: u16 = 16;
    const CREATE: u16 = 0x600;
    let data = [
        attribute(25, &[1]),
        attribute(15, &4789_u16.to_be_bytes()),
        attribute(7, &[0]),
    ]
    .concat();
    let info = [attribute(1, b"vxlan\0"), attribute(2, &data)].concat();
    let name_octets = [name.as_bytes(), &[0]].concat();
    let body = [vec![0; 16], attribute(3, &name_octets), attribute(18, &info)].concat();
    let mut socket = namespace.run(Socket::open).expect("entered").expect("opened");
    let request = Request {
        kind: NEW_LINK,
        flags: CREATE,
        body,
    };
    let answers = socket.exchange(&[request]).expect("answered");
    assert!(answers.iter().all(std::result::Result::is_ok), "{answers:?}");
    let mut netlink = Netlink::open_in(namespace).expect("rtnetlink");
    let link = netlink.link(name).expect("made").index;
    netlink.change_link(link, &LinkChange::new().up()).expect("up");
    link.0
}

/// Into a tunnel and out of it, with the kernel's VXLAN netdev between rule and wire.
async fn a_frame_goes_through_a_tunnel_and_back() {
    const UPLINK: PortRef = PortRef::Uplink(0);
    let mut bed = Bed::new();
    drop(bed.steering);
    let tunnel = make_tunnel(&bed.yard.namespace, "vx0");
    let mut netlink = Netlink::open_in(&bed.yard.namespace).expect("rtnetlink");
    let uplink = netlink
        .links()
        .expect("listed")
        .into_iter()
        .find(|link| link.index.0 == bed.yard.links[&UPLINK]);
    let uplink = uplink.expect("there");
    let net = "192.0.2.1/24".parse().expect("an address");
    netlink
        .add_address(&Address {
            link: uplink.index,
            net,
        })
        .expect("addressed");
    let remote_mac = [2, 0xee, 0, 0, 0, 2];
    let remote = std::net::IpAddr::from([192, 0, 2, 2]);
    netlink
        .set_neighbour(&Neighbour::permanent(uplink.index, remote, remote_mac))
        .expect("known");
    let socket = bed
        .yard
        .namespace
        .run(Socket::open)
        .expect("entered")
        .expect("opened");
    let mut options = Options::new("flower", BLOCK, bed.yard.links.clone());
    options.tunnels = vec![(TunnelKind::Vxlan, tunnel)];
    bed.steering = Steering::open(Box::new(socket), options, Arc::clone(&bed.life)).expect("opened");
    let claims = bed.steering.capabilities();
    assert!(
        claims.actions.contains(dpumesh_core::ActionKinds::VXLAN),
        "{:?}",
        claims.actions
    );
    let vni = dpumesh_core::Vni::try_from(0x0a_0b0c).expect("a VNI");
    let outer = Encapsulation {
        kind: TunnelKind::Vxlan,
        vni,
        local: [192, 0, 2, 1].into(),
        remote,
        eth_src: dpumesh_core::MacAddr([0; 6]),
        eth_dst: dpumesh_core::MacAddr([0; 6]),
    };
    let out = vec![Action::Encapsulate(outer), Action::Forward(UPLINK)];
    bed.add(1, 0, to([10, 0, 0, 9]), out).await.expect("added");
    let inward = Pattern {
        port: Some(UPLINK),
        vni: Some(vni),
        ..Pattern::default()
    };
    bed.add(
        2,
        1,
        inward,
        vec![Action::Decapsulate(TunnelKind::Vxlan), Action::Forward(B)],
    )
    .await
    .expect("added");
    // Tunnel packets go to the kernel, which takes them apart.
    bed.steering
        .set_miss_policy(bed.fence(), UPLINK, MissPolicy::Software)
        .await
        .expect("open");
    bed.yard.send(A, &udp([10, 0, 0, 9], 1)).expect("sent");
    let mut packet = bed
        .yard
        .receive(UPLINK, ARRIVAL)
        .await
        .expect("readable")
        .expect("a tunnel packet");
    assert_eq!(packet[..6], remote_mac, "outer destination MAC");
    assert_eq!(packet[26..34], [192, 0, 2, 1, 192, 0, 2, 2], "outer addresses");
    assert_eq!(packet[36..38], 4789_u16.to_be_bytes(), "outer destination port");
    assert_eq!(packet[46..49], [0x0a, 0x0b, 0x0c], "VNI");
    assert_eq!(packet[50..], udp([10, 0, 0, 9], 1), "the frame inside");
    // The same packet as the other side would send it: addresses swapped, which leaves the checksums right.
    packet[..6].copy_from_slice(&uplink.mac.expect("an Ethernet address"));
    packet[6..12].copy_from_slice(&remote_mac);
    packet[26..34].copy_from_slice(&[192, 0, 2, 2, 192, 0, 2, 1]);
    // To another address inside, so that the rule outwards does not see it come out of the tunnel.
    packet.truncate(50);
    packet.extend(udp([10, 0, 0, 8], 2));
    packet[40..42].fill(0);
    bed.yard.send(UPLINK, &packet).expect("sent");
    bed.arrives(B, &udp([10, 0, 0, 8], 2)).await;
    let listed = bed.steering.list(Owner::Agent).await.expect("listed");
    assert_eq!(listed.len(), 2);
}

type Running = std::pin::Pin<Box<dyn Future<Output = ()>>>;
type Case = (&'static str, fn() -> Running);

macro_rules! cases {
    ($($name:ident),* $(,)?) => { [$((stringify!($name), { fn run() -> Running { Box::pin($name()) } run as fn() -> Running })),*] };
}

fn main() -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    let filter = std::env::args()
        .skip(1)
        .find(|word| !word.starts_with('-'))
        .unwrap_or_default();
    let yard = Yard::new().map(|yard| yard.steering(&Arc::default()).map(drop));
    if let Err(error) | Ok(Err(error)) = yard
        && std::env::var_os("DPUMESH_MACHINE").is_none()
    {
        println!("SKIPPED flower_machine: {error}; tests/qemu/flower runs it on a kernel that can");
        return ExitCode::SUCCESS;
    }
    let own: [Case; 11] = cases![
        rules_of_a_dead_process_are_found_again,
        what_others_put_into_the_block_stays_theirs,
        a_port_lets_its_misses_through_when_asked,
        a_meter_drops_what_exceeds_it,
        equal_rules_stand_beside_one_another,
        a_netdev_with_a_foreign_qdisc_is_refused_by_name,
        hardware_is_refused_where_there_is_none,
        a_thousand_rules_come_and_go,
        frames_cross_the_cable_between_two_nics,
        a_frame_goes_through_a_tunnel_and_back,
        claims_are_told,
    ];
    let mut failed = 0;
    for (name, case) in own.into_iter().filter(|(name, _)| name.contains(&filter)) {
        let result = std::panic::catch_unwind(|| runtime.block_on(case()));
        println!("{name}: {}", if result.is_ok() { "ok" } else { "FAILED" });
        failed += usize::from(result.is_err());
    }
    for part in ["steering", "limits", "traffic", "lifecycle"] {
        if !part.contains(&filter) && !filter.starts_with("kit:") {
            continue;
        }
        let part = filter.strip_prefix("kit:").unwrap_or(part);
        let report = runtime.block_on(run(Arc::new(FlowerFixture), part, Duration::from_secs(60)));
        println!("{report}");
        failed += report.counts().failed;
        if filter.starts_with("kit:") {
            break;
        }
    }
    println!("{failed} failed");
    if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

async fn claims_are_told() {
    let bed = Bed::new();
    println!("{:#?}", bed.steering.capabilities());
}
