//! The channel between agent and dataplane, over loopback: everything that the agent does, who is refused and with
//! which words, and what a restart looks like from the other side.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::{Buf, BufMut};
use dpumesh_core::steering::{
    Action, Atomicity, Batch, Change, Cookie, MissPolicy, Operation, Owner, Pattern, Priority, SteeringRule,
    Undone,
};
use dpumesh_core::vf::{VfLease, VfRequest};
use dpumesh_core::{
    Backend, BackendExt, BackendInfo, Capabilities, DpuId, Effect, Epoch, Error, ErrorKind, Event,
    EventStream, Fence, FlowSteering, FlowSteeringExt, MacAddr, PortRef, Result, Retry,
};
use dpumesh_hw::channel::trust::{Authority, Credentials, Party, TrustError};
use dpumesh_hw::channel::{Attachment, ConnectError, Dataplane, DataplaneClient, ServeError, VERSION, serve};
use dpumesh_hw::dataplane::{
    Engine, EngineConfig, EngineHandle, EngineStats, PortPolicy, SoftSteering, software_capabilities,
};
use dpumesh_hw::events::EventHub;
use dpumesh_hw::memory::{MemoryBackend, MemoryCard};
use dpumesh_hw::stream::IngressPort;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair};
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Code, Request, Status};

fn dpu() -> DpuId {
    DpuId("dpu0".to_owned())
}

/// A card in memory whose frames would go through a software engine.
#[derive(Debug)]
struct Node {
    card: Arc<MemoryBackend>,
    engine: EngineHandle,
    steering: SoftSteering,
    events: Arc<EventHub>,
    epoch: Epoch,
}

impl Node {
    fn new(card: Arc<MemoryBackend>, epoch: Epoch) -> Self {
        let (worker, engine) = Engine::new(&EngineConfig::new(1)).expect("an engine");
        std::thread::spawn(move || worker.run());
        let events = Arc::new(EventHub::default());
        let limits = software_capabilities(8);
        let steering = SoftSteering::new("soft", engine.clone(), limits, epoch, Arc::clone(&events));
        Self {
            card,
            engine,
            steering,
            events,
            epoch,
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.engine.stop();
    }
}

#[async_trait]
impl Dataplane for Node {
    fn info(&self) -> BackendInfo {
        self.card.info()
    }

    fn capabilities(&self) -> Capabilities {
        self.card.capabilities()
    }

    fn epoch(&self) -> Epoch {
        self.epoch
    }

    fn steering(&self) -> &dyn FlowSteering {
        &self.steering
    }

    async fn attach(&self, fence: Fence, attachment: &Attachment) -> Result<()> {
        self.card.require_vf()?.admit(fence, &attachment.lease).await?;
        let policy = PortPolicy::Vf {
            mac: attachment.mac,
            addresses: attachment.addresses.clone(),
            gateway: attachment.gateway,
            ingress: IngressPort::new(attachment.ingress).expect("not 0"),
        };
        let admitted = self
            .engine
            .set_policy(attachment.lease.port, Some(policy))
            .await
            .expect("engine");
        if admitted {
            return Ok(());
        }
        Err(
            Error::new(ErrorKind::Conflict, "channel.attach", "an address is taken")
                .object(attachment.lease.port),
        )
    }

    async fn detach(&self, fence: Fence, lease: &VfLease) -> Result<()> {
        self.engine.set_policy(lease.port, None).await.expect("engine");
        self.card.require_vf()?.revoke(fence, lease).await
    }

    async fn stats(&self) -> Result<EngineStats> {
        Ok(self.engine.stats().await.expect("engine"))
    }

    fn events(&self) -> Box<dyn EventStream> {
        Box::new(self.events.subscribe())
    }
}

/// A dataplane that is served, and the authority of its card.
struct Served {
    address: SocketAddr,
    authority: Authority,
    card: MemoryCard,
    node: Arc<Node>,
    shutdown: Option<oneshot::Sender<()>>,
    server: JoinHandle<std::result::Result<(), ServeError>>,
}

impl Served {
    async fn start() -> Self {
        let authority = Authority::new(dpu()).expect("a name");
        let credentials = authority.issue(Party::Dataplane).expect("issued");
        Self::with(authority, credentials).await
    }

    /// With any credentials, in the first life of the card.
    async fn with(authority: Authority, credentials: Credentials) -> Self {
        let card = MemoryCard::default();
        let node = Arc::new(Node::new(card.both(), card.both().epoch()));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let (shutdown, server) = serving(listener, credentials, Arc::clone(&node));
        Self {
            address,
            authority,
            card,
            node,
            shutdown: Some(shutdown),
            server,
        }
    }

    fn agent(&self) -> Credentials {
        self.authority.issue(Party::Agent).expect("issued")
    }

    async fn client(&self) -> DataplaneClient {
        DataplaneClient::connect(&self.address.to_string(), &dpu(), &self.agent())
            .await
            .expect("admitted")
    }

    /// Stops the server and waits until it has ended.
    async fn stop(&mut self) {
        let _ = self.shutdown.take().expect("running").send(()); // fails only if the server has ended
        let ended = tokio::time::timeout(Duration::from_secs(10), &mut self.server).await;
        ended.expect("it ends").expect("no panic").expect("no error");
    }

    /// Begins another life on the same address.
    async fn start_again(&mut self, epoch: Epoch) {
        self.node = Arc::new(Node::new(self.card.both(), epoch));
        let listener = TcpListener::bind(self.address)
            .await
            .expect("the port is free again");
        let credentials = self.authority.issue(Party::Dataplane).expect("issued");
        let (shutdown, server) = serving(listener, credentials, Arc::clone(&self.node));
        (self.shutdown, self.server) = (Some(shutdown), server);
    }
}

type Serving = (
    oneshot::Sender<()>,
    JoinHandle<std::result::Result<(), ServeError>>,
);

fn serving(listener: TcpListener, credentials: Credentials, node: Arc<Node>) -> Serving {
    let (shutdown, stopped) = oneshot::channel::<()>();
    let server = tokio::spawn(async move {
        let stopped = async move {
            let _ = stopped.await; // dropped without a word: the test is over
        };
        serve(listener, &credentials, node, stopped).await
    });
    (shutdown, server)
}

fn rule(cookie: u128, priority: u32) -> SteeringRule {
    let actions = vec![Action::Count, Action::Forward(PortRef::vf(1))];
    SteeringRule::new(
        Cookie(cookie),
        Owner::Agent,
        Priority(priority),
        Pattern::default(),
        actions,
    )
}

fn add(rule: SteeringRule) -> Operation {
    Operation::Add(rule)
}

#[tokio::test]
async fn the_agent_does_everything_as_if_the_dataplane_were_here() {
    let served = Served::start().await;
    let client = served.client().await;
    let (local, fence) = (&served.node.steering, Fence(served.node.epoch));
    assert_eq!(
        (client.info(), client.epoch()),
        (served.node.info(), served.node.epoch)
    );
    assert_eq!(client.capabilities(), served.node.capabilities());

    let rules = [rule(1, 1), rule(2, 70_000)];
    let verdicts = client.steering().validate(&rules).await.expect("judged");
    assert_eq!(verdicts, local.validate(&rules).await.expect("judged"));
    let batch = Batch::new(vec![add(rule(1, 1)), add(rule(3, 2))]).with(Atomicity::Atomic);
    let outcome = client.steering().apply(fence, &batch).await.expect("carried out");
    assert!(matches!(
        outcome.results[..],
        [Ok(Change::Added(_)), Ok(Change::Added(_))]
    ));
    let list = client.steering().list(Owner::Agent).await.expect("listed");
    assert_eq!(list, local.list(Owner::Agent).await.expect("listed"));
    assert_eq!(list.len(), 2);
    let counters = client
        .steering()
        .counters(Owner::Agent, &[Cookie(1), Cookie(9)])
        .await
        .expect("read");
    assert_eq!(
        (counters[0].map(|counters| counters.packets), counters[1]),
        (Some(0), None)
    );
    let occupancy = client.steering().occupancy().await.expect("read");
    assert_eq!(occupancy, local.occupancy().await.expect("read"));
    assert_eq!(client.steering().flush(fence, Owner::Agent).await, Ok(2));
    assert!(local.list(Owner::Agent).await.expect("listed").is_empty());

    let vf = served.card.both();
    let lease = vf
        .require_vf()
        .expect("VFs")
        .lease(fence, &VfRequest::new("pod-1"))
        .await
        .expect("a free VF");
    let attachment = Attachment {
        lease: lease.clone(),
        mac: MacAddr([2, 0, 0, 0, 0, 1]),
        addresses: vec![
            "10.0.0.1".parse().expect("address"),
            "fd00::1".parse().expect("address"),
        ],
        gateway: MacAddr([2, 0, 0, 0, 0, 0xfe]),
        ingress: 1,
    };
    client.attach(fence, &attachment).await.expect("attached");
    client.attach(fence, &attachment).await.expect("the same again");
    client
        .steering()
        .set_miss_policy(fence, lease.port, MissPolicy::Drop)
        .await
        .expect("set");
    let stats = client.stats().await.expect("read");
    assert_eq!(stats, served.node.stats().await.expect("read"));
    assert!(stats.ports.contains_key(&lease.port));
    client
        .steering()
        .set_miss_policy(fence, lease.port, MissPolicy::Drop)
        .await
        .expect("set");
    client.detach(fence, &lease).await.expect("detached");
    client.detach(fence, &lease).await.expect("idempotent");
}

#[tokio::test]
async fn errors_travel_whole() {
    let served = Served::start().await;
    let client = served.client().await;
    let (local, fence) = (&served.node.steering, Fence(served.node.epoch));
    let here = local
        .set_miss_policy(fence, PortRef::vf(3), MissPolicy::Software)
        .await
        .expect_err("unsupported");
    let there = client
        .set_miss_policy(fence, PortRef::vf(3), MissPolicy::Software)
        .await
        .expect_err("unsupported");
    assert_eq!(there, here);
    assert_eq!(
        there.object.as_ref().map(|object| object.field.as_ref()),
        Some("policy")
    );
    let stale = client
        .flush(Fence(Epoch(99)), Owner::Agent)
        .await
        .expect_err("another life");
    assert_eq!(
        stale,
        local
            .flush(Fence(Epoch(99)), Owner::Agent)
            .await
            .expect_err("another life")
    );
    assert_eq!(
        (stale.kind, stale.effect, stale.retry),
        (ErrorKind::Stale, Effect::None, Retry::Never)
    );

    // Per operation, and for a batch that was undone.
    let mut contradiction = rule(2, 1);
    contradiction.actions = vec![Action::Drop];
    let full = (10..20).map(|cookie| add(rule(cookie, cookie as u32)));
    let operations: Vec<Operation> = [add(rule(1, 1)), add(contradiction)]
        .into_iter()
        .chain(full)
        .collect();
    for atomicity in [Atomicity::Rollback, Atomicity::Continue] {
        let batch = Batch::new(operations.clone()).with(atomicity);
        let there = client.apply(fence, &batch).await.expect("an outcome");
        client.flush(fence, Owner::Agent).await.expect("flushed");
        let here = local.apply(fence, &batch).await.expect("an outcome");
        assert_eq!(there, here);
        assert_eq!(there.undone == Undone::All, atomicity == Atomicity::Rollback);
        let conflict = there.results[1].as_ref().expect_err("contradicts");
        assert_eq!(conflict.kind, ErrorKind::Conflict);
        local.flush(fence, Owner::Agent).await.expect("flushed");
    }
    let there = client
        .apply(fence, &Batch::new(operations))
        .await
        .expect("an outcome");
    let last = there
        .results
        .last()
        .expect("one each")
        .as_ref()
        .expect_err("full");
    assert_eq!(
        (last.kind, last.retry),
        (ErrorKind::CapacityExceeded, Retry::AfterFree)
    );
}

#[tokio::test]
async fn events_arrive_in_order_and_end_with_the_server() {
    let mut served = Served::start().await;
    let client = served.client().await;
    let mut events = client.subscribe().await.expect("subscribed");
    let raised = [
        Event::Link {
            port: PortRef::Uplink(0),
            up: false,
        },
        Event::Health(Some(
            Error::new(ErrorKind::Fault, "card", "hot").effect(Effect::Unknown),
        )),
        Event::Aged {
            owner: Owner::User(3),
            rules: vec![(Cookie(5), None)],
        },
    ];
    for event in &raised {
        served.node.events.raise(event);
    }
    for event in &raised {
        assert_eq!(events.next().await.as_ref(), Some(event));
    }
    // A full table is told as well, through the trait.
    let mut events = client.events();
    let waiting = tokio::spawn(async move { events.next().await });
    let started = Instant::now();
    while !waiting.is_finished() {
        let rules = (1..=8).map(|cookie| add(rule(cookie, cookie as u32)));
        client
            .apply(Fence(client.epoch()), &Batch::new(rules.collect()))
            .await
            .expect("room");
        client
            .flush(Fence(client.epoch()), Owner::Agent)
            .await
            .expect("flushed");
        // High water is raised once per crossing, seen by a batch that finds the table low again.
        client.add(Fence(client.epoch()), rule(1, 1)).await.expect("room");
        client
            .flush(Fence(client.epoch()), Owner::Agent)
            .await
            .expect("flushed");
        assert!(started.elapsed() < Duration::from_secs(10), "no event");
    }
    let event = waiting.await.expect("no panic");
    assert!(
        matches!(&event, Some(Event::HighWater { resource, .. }) if resource == "steering.rules"),
        "{event:?}"
    );
    let mut events = client.subscribe().await.expect("subscribed");
    served.stop().await; // though somebody is still subscribed
    assert_eq!(events.next().await, None);
}

#[tokio::test]
async fn a_restarted_dataplane_is_another_life_to_the_same_client() {
    let mut served = Served::start().await;
    let client = served.client().await;
    let first = client.epoch();
    client.add(Fence(first), rule(1, 1)).await.expect("room");
    served.stop().await;
    let lost = client.list(Owner::Agent).await.expect_err("nobody is there");
    assert_eq!((lost.kind, lost.effect), (ErrorKind::DeviceLost, Effect::Unknown));

    served.start_again(Epoch(first.0 + 1)).await;
    let started = Instant::now();
    let rules = loop {
        match client.list(Owner::Agent).await {
            Ok(rules) => break rules,
            Err(error) => assert_eq!(error.kind, ErrorKind::DeviceLost),
        }
        assert!(
            started.elapsed() < Duration::from_secs(10),
            "the client does not come back"
        );
    };
    assert!(rules.is_empty());
    assert_eq!(client.epoch(), first, "nothing told it yet");
    let stale = client
        .add(Fence(first), rule(1, 1))
        .await
        .expect_err("the old life's fence");
    assert_eq!(stale.kind, ErrorKind::Stale);
    assert_eq!(client.epoch(), Epoch(first.0 + 1), "learned from the refusal");
    assert_eq!(client.refresh().await, Ok(Epoch(first.0 + 1)));
    client
        .add(Fence(client.epoch()), rule(1, 1))
        .await
        .expect("replayed");
    served.stop().await;
}

/// The words with which a client is refused. When it is the dataplane that refuses, nothing took effect.
async fn refusal(served: &Served, credentials: &Credentials) -> String {
    let refused = DataplaneClient::connect(&served.address.to_string(), &dpu(), credentials).await;
    let refused = refused.expect_err("must be refused");
    if let ConnectError::Refused { error, .. } = &refused {
        assert_eq!(
            (error.kind, error.effect),
            (ErrorKind::Denied, Effect::None),
            "{error}"
        );
    }
    refused.to_string()
}

#[tokio::test]
async fn whoever_has_no_certificate_of_this_authority_is_refused_in_the_handshake() {
    let served = Served::start().await;
    let stranger = Authority::new(dpu())
        .expect("a name")
        .issue(Party::Agent)
        .expect("issued");
    // It trusts the dataplane, so that the refusal is the dataplane's.
    let stranger = Credentials {
        authority: served.agent().authority,
        ..stranger
    };
    let words = refusal(&served, &stranger).await;
    assert!(
        words.contains("refused") && words.contains("DecryptError"),
        "{words}"
    );
    // The other way round, the agent refuses a dataplane of another authority.
    let other = Authority::new(dpu())
        .expect("a name")
        .issue(Party::Agent)
        .expect("issued");
    let words = refusal(&served, &other).await;
    assert!(words.contains("invalid peer certificate"), "{words}");

    let no_certificate = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(&served.agent().authority))
        .domain_name(Party::Dataplane.name(&dpu()));
    let words = match channel(&served, no_certificate).await {
        Ok(channel) => words_of(
            &ask(&channel, Some("1"), HELLO, b"{}".to_vec())
                .await
                .expect_err("refused"),
        ),
        Err(words) => words,
    };
    assert!(words.contains("CertificateRequired"), "{words}");
}

#[tokio::test]
async fn a_dataplanes_certificate_is_no_agents_and_an_agents_no_dataplanes() {
    let served = Served::start().await;
    let words = refusal(
        &served,
        &served.authority.issue(Party::Dataplane).expect("issued"),
    )
    .await;
    assert!(words.contains("UnsupportedCertificate"), "{words}");

    let authority = Authority::new(dpu()).expect("a name");
    let agent = authority.issue(Party::Agent).expect("issued");
    let impostor = Served::with(authority, agent).await;
    let words = refusal(&impostor, &impostor.agent()).await;
    assert!(
        words.contains("does not allow extended key usage for server authentication"),
        "{words}"
    );
}

#[tokio::test]
async fn another_cards_agent_is_refused_by_name_even_under_one_authority() {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key")).expect("signed");
    let issue = |name: &str, purpose| {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(vec![name.to_owned()]).expect("a name");
        params.extended_key_usages = vec![purpose];
        let certificate = params.signed_by(&key, &issuer).expect("signed").pem();
        Credentials {
            authority: issuer.pem(),
            certificate,
            key: key.serialize_pem(),
        }
    };
    let dataplane = issue("dpu0.dataplane.dpumesh", ExtendedKeyUsagePurpose::ServerAuth);
    let served = Served::with(Authority::new(dpu()).expect("a name"), dataplane).await;
    let words = refusal(
        &served,
        &issue("dpu1.agent.dpumesh", ExtendedKeyUsagePurpose::ClientAuth),
    )
    .await;
    assert!(
        words.contains("the certificate is for dpu1.agent.dpumesh, not for dpu0.agent.dpumesh"),
        "{words}"
    );
    let agent = issue("dpu0.agent.dpumesh", ExtendedKeyUsagePurpose::ClientAuth);
    assert!(
        DataplaneClient::connect(&served.address.to_string(), &dpu(), &agent)
            .await
            .is_ok()
    );
    // A client that wants another card's dataplane does not take this one.
    let other = DpuId("dpu1".to_owned());
    let refused = DataplaneClient::connect(&served.address.to_string(), &other, &agent).await;
    let words = refused.expect_err("another card").to_string();
    assert!(
        words.contains("not valid for name \"dpu1.dataplane.dpumesh\""),
        "{words}"
    );
}

#[tokio::test]
async fn silent_strangers_are_closed_and_do_not_keep_the_agent_out() {
    let served = Served::start().await;
    let before = served.client().await; // known: it stays whoever comes
    let mut strangers = Vec::new();
    for _ in 0..40 {
        strangers.push(TcpStream::connect(served.address).await.expect("let in"));
    }
    let started = Instant::now();
    let client = served.client().await;
    client.refresh().await.expect("answered");
    before.refresh().await.expect("answered");
    // Forty are more than may stay: the oldest are closed at once, the others when their handshake is overdue.
    for (index, stranger) in strangers.iter_mut().enumerate() {
        let closed = tokio::time::timeout(Duration::from_secs(10), stranger.read(&mut [0; 64])).await;
        let read = closed.expect("closed in time");
        assert!(
            matches!(read, Ok(0) | Err(_)),
            "stranger {index} was told something"
        );
        if index == 7 {
            assert!(
                started.elapsed() < Duration::from_secs(4),
                "{:?}",
                started.elapsed()
            );
        }
    }
    client.refresh().await.expect("still there");
}

/// A wire to a dataplane that goes dead when `cut` changes: connections stay open and nothing passes any more.
async fn wire_to(served: &Served, cut: watch::Receiver<bool>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let (address, far) = (listener.local_addr().expect("bound"), served.address);
    tokio::spawn(async move {
        while let Ok((mut near, _)) = listener.accept().await {
            let mut cut = cut.clone();
            tokio::spawn(async move {
                let mut far = TcpStream::connect(far).await.expect("connected");
                let mut alone = cut.clone();
                tokio::select! {
                    _ = tokio::io::copy_bidirectional(&mut near, &mut far) => return,
                    _ = cut.wait_for(|cut| *cut) => {}
                }
                let _ = alone.wait_for(|cut| !*cut).await; // held until the test is over
            });
        }
    });
    address
}

#[tokio::test]
async fn a_soc_that_falls_silent_is_noticed_though_nothing_is_asked() {
    let served = Served::start().await;
    let (cut, is_cut) = watch::channel(false);
    let address = wire_to(&served, is_cut).await;
    let client = DataplaneClient::connect(&address.to_string(), &dpu(), &served.agent())
        .await
        .expect("admitted");
    let mut events = client.subscribe().await.expect("subscribed");
    cut.send(true).expect("the wire is there");
    let next = tokio::time::timeout(Duration::from_secs(20), events.next()).await;
    assert_eq!(next.expect("noticed"), None, "the stream ends");
}

#[tokio::test]
async fn a_subscription_through_the_trait_begins_at_once() {
    let mut served = Served::start().await;
    let client = served.client().await;
    let mut events = client.events();
    // One that was asked for later has begun: so has the first, for requests of one connection are served in order.
    let mut later = client.subscribe().await.expect("subscribed");
    let event = |up| Event::Link {
        port: PortRef::Uplink(0),
        up,
    };
    let started = Instant::now();
    let mut raised = 0;
    // Nobody waits on `events` yet; what is raised is kept.
    while raised < 100 {
        served.node.events.raise(&event(raised % 2 == 0));
        assert_eq!(later.next().await, Some(event(raised % 2 == 0)));
        raised += 1;
        assert!(started.elapsed() < Duration::from_secs(10));
    }
    for index in 0..raised {
        assert_eq!(events.next().await, Some(event(index % 2 == 0)));
    }
    served.stop().await;
    assert_eq!(events.next().await, None);
    // Nobody is there to subscribe to: a stream that has ended.
    assert_eq!(client.events().next().await, None);
}

#[test]
fn certificates_begin_a_day_ago_and_end() {
    let validity = |pem: &str| {
        let (_, pem) = x509_parser::pem::parse_x509_pem(pem.as_bytes()).expect("PEM");
        let validity = pem.parse_x509().expect("a certificate").validity().clone();
        (validity.not_before.timestamp(), validity.not_after.timestamp())
    };
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .expect("after 1970")
        .as_secs() as i64;
    let day = 24 * 60 * 60;
    let about = |(from, until): (i64, i64), days: i64| {
        let late = [from - (now - day), until - (now + days * day)];
        assert!(
            late.iter().all(|seconds| (0..60).contains(seconds)),
            "{late:?} s late"
        );
    };
    let authority = Authority::new(dpu()).expect("a name");
    let agent = authority.issue(Party::Agent).expect("issued");
    about(validity(&agent.authority), 3653);
    about(validity(&agent.certificate), 365);
    let week = Duration::from_secs(7 * 24 * 60 * 60);
    let short = Authority::lasting(dpu(), week).expect("a name");
    about(
        validity(&short.issue(Party::Agent).expect("issued").certificate),
        7,
    );
    let shorter = short.issue_lasting(Party::Agent, week / 7).expect("issued");
    about(validity(&shorter.certificate), 1);
    for lifetime in [Duration::ZERO, Duration::MAX] {
        let refused = short.issue_lasting(Party::Agent, lifetime).expect_err("refused");
        assert!(matches!(refused, TrustError::Lifetime(_)), "{refused}");
        assert!(Authority::lasting(dpu(), lifetime).is_err());
    }
}

#[test]
fn a_key_that_others_may_read_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let authority = Authority::new(dpu()).expect("a name");
    let credentials = authority.issue(Party::Agent).expect("issued");
    credentials.write(folder.path()).expect("written");
    let key = folder.path().join("key.pem");
    for (mode, good) in [
        (0o640, false),
        (0o604, false),
        (0o620, false),
        (0o400, true),
        (0o600, true),
    ] {
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(mode)).expect("changed");
        match Credentials::read(folder.path()) {
            Ok(_) => assert!(good, "{mode:o}"),
            Err(error) => {
                let words = error.to_string();
                assert!(!good && words.contains("key.pem"), "{words}");
                assert!(
                    words.contains(&format!("{mode:04o}")) && words.contains("chmod 600"),
                    "{words}"
                );
            }
        }
    }
}

const HELLO: &str = "/dpumesh.channel.v1.Dataplane/Hello";
const APPLY: &str = "/dpumesh.channel.v1.Dataplane/Apply";
const LIST: &str = "/dpumesh.channel.v1.Dataplane/List";

/// Octets as they are.
#[derive(Debug, Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, item: Vec<u8>, buffer: &mut EncodeBuf<'_>) -> std::result::Result<(), Status> {
        buffer.put_slice(&item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> std::result::Result<Option<Vec<u8>>, Status> {
        Ok(Some(buffer.copy_to_bytes(buffer.remaining()).to_vec()))
    }
}

async fn channel(served: &Served, tls: ClientTlsConfig) -> std::result::Result<Channel, String> {
    let endpoint = Endpoint::from_shared(format!("https://{}", served.address)).expect("an address");
    endpoint
        .tls_config(tls)
        .expect("usable")
        .connect()
        .await
        .map_err(|error| words_of(&error))
}

/// A channel of the agent's, to say on it whatever one likes.
async fn agents_channel(served: &Served) -> Channel {
    let agent = served.agent();
    let tls = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(&agent.authority))
        .identity(Identity::from_pem(&agent.certificate, &agent.key))
        .domain_name(Party::Dataplane.name(&dpu()));
    channel(served, tls).await.expect("admitted")
}

async fn ask(
    channel: &Channel,
    version: Option<&str>,
    call: &'static str,
    message: Vec<u8>,
) -> std::result::Result<Vec<u8>, Status> {
    let mut grpc = tonic::client::Grpc::new(channel.clone());
    grpc.ready()
        .await
        .map_err(|error| Status::unavailable(words_of(&error)))?;
    let mut request = Request::new(message);
    if let Some(version) = version {
        request
            .metadata_mut()
            .insert("dpumesh-channel-version", version.parse().expect("a header"));
    }
    let path = http::uri::PathAndQuery::from_static(call);
    grpc.unary(request, path, Raw)
        .await
        .map(tonic::Response::into_inner)
}

fn words_of(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |error| error.source());
    causes.fold(error.to_string(), |words, cause| format!("{words}: {cause}"))
}

#[tokio::test]
async fn a_version_that_is_not_spoken_is_refused_with_those_that_are() {
    let served = Served::start().await;
    let channel = agents_channel(&served).await;
    ask(&channel, Some("1"), HELLO, b"{}".to_vec())
        .await
        .expect("spoken");
    let cases = [
        (Some("0"), "the peer speaks channel version 0"),
        (Some("99"), "the peer speaks channel version 99"),
        (None, "the peer names no channel version"),
        (Some("one"), "the peer names no channel version"),
        (Some("-1"), "the peer names no channel version"),
    ];
    for (version, words) in cases {
        for call in [HELLO, APPLY] {
            let status = ask(&channel, version, call, b"{}".to_vec())
                .await
                .expect_err("refused");
            assert_eq!(status.code(), Code::FailedPrecondition);
            assert!(status.message().starts_with(words), "{}", status.message());
            assert!(
                status
                    .message()
                    .ends_with(&format!("versions 1 to {VERSION} are spoken here"))
            );
        }
    }
    let status = ask(
        &channel,
        Some("1"),
        "/dpumesh.channel.v1.Dataplane/Fly",
        b"{}".to_vec(),
    )
    .await;
    let status = status.expect_err("no such call");
    assert_eq!(status.code(), Code::Unimplemented);
    assert!(status.message().contains("/Fly"), "{}", status.message());
}

#[tokio::test]
async fn a_message_that_is_not_understood_is_refused_with_the_field_and_changes_nothing() {
    let served = Served::start().await;
    let channel = agents_channel(&served).await;
    let cases: [(&str, &[u8], &str); 7] = [
        (LIST, br#"{"owner":"agent","moon":1}"#, "unknown field `moon`"),
        (LIST, br#"{"owner":"martian"}"#, "unknown variant `martian`"),
        (LIST, br"{}", "missing field `owner`"),
        (LIST, br#"{"owner":"agent"}{}"#, "trailing characters"),
        (LIST, b"\xff\x00", "expected value"),
        (HELLO, br#"{"sun":1}"#, "unknown field `sun`"),
        (
            APPLY,
            br#"{"fence":0,"batch":{"operations":[{"remove":{"owner":"agent","cookie":"1","hard":true}}],"atomicity":"atomic"}}"#,
            "unknown field `hard`",
        ),
    ];
    for (call, message, words) in cases {
        let status = ask(&channel, Some("1"), call, message.to_vec())
            .await
            .expect_err("refused");
        assert_eq!(status.code(), Code::InvalidArgument, "{}", status.message());
        assert!(status.message().contains(words), "{}", status.message());
    }
    // A name as long as it pleases does not come back whole.
    let long = format!(r#"{{"owner":"agent","{}":1}}"#, "x".repeat(1 << 20));
    let status = ask(&channel, Some("1"), LIST, long.into_bytes())
        .await
        .expect_err("refused");
    assert!(
        status.code() == Code::InvalidArgument && status.message().len() < 2000,
        "{status:?}"
    );
    assert!(
        served
            .node
            .steering
            .list(Owner::Agent)
            .await
            .expect("listed")
            .is_empty()
    );
}

#[tokio::test]
async fn an_oversized_message_is_refused_with_the_limit() {
    let served = Served::start().await;
    let channel = agents_channel(&served).await;
    let status = ask(&channel, Some("1"), APPLY, vec![b' '; (64 << 20) + 1])
        .await
        .expect_err("refused");
    assert!(status.message().contains("67108864"), "{status:?}");
    ask(&channel, Some("1"), HELLO, b"{}".to_vec())
        .await
        .expect("the channel still works");
}

#[tokio::test]
async fn a_list_longer_than_four_mebibytes_comes_through() {
    let served = Served::start().await;
    let client = served.client().await;
    let rules: Vec<SteeringRule> = (0..40_000).map(|cookie| rule(cookie, 1)).collect();
    let verdicts = client.steering().validate(&rules).await.expect("judged");
    assert_eq!(verdicts.len(), rules.len());
}

#[test]
fn credentials_are_written_for_their_owner_only_and_read_back() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("new").join("channel");
    let credentials = Authority::new(dpu())
        .expect("a name")
        .issue(Party::Agent)
        .expect("issued");
    credentials.write(&path).expect("written");
    let mode = |file: &str| {
        std::fs::metadata(path.join(file))
            .expect("there")
            .permissions()
            .mode()
            & 0o777
    };
    let files = ["authority.pem", "certificate.pem", "key.pem"];
    assert_eq!(files.map(mode), [0o600; 3]);
    // Also over files that everybody could read.
    for file in files {
        std::fs::set_permissions(path.join(file), std::fs::Permissions::from_mode(0o644)).expect("changed");
    }
    credentials.write(&path).expect("written again");
    assert_eq!(files.map(mode), [0o600; 3]);
    let read = Credentials::read(&path).expect("read back");
    assert_eq!(
        (&read.authority, &read.certificate, &read.key),
        (&credentials.authority, &credentials.certificate, &credentials.key)
    );
    assert!(
        !format!("{credentials:?}").contains(&credentials.key),
        "a key is not for logs"
    );
}

#[tokio::test]
async fn broken_credentials_are_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let authority = Authority::new(dpu()).expect("a name");
    let good = authority.issue(Party::Agent).expect("issued");
    let other = authority.issue(Party::Agent).expect("issued");
    let cut = |text: &str| text[..text.len() / 2].to_owned();
    let cases = [
        (
            "authority.pem",
            Credentials {
                authority: cut(&good.authority),
                ..good.clone()
            },
        ),
        (
            "certificate.pem",
            Credentials {
                certificate: String::new(),
                ..good.clone()
            },
        ),
        (
            "certificate.pem",
            Credentials {
                certificate: good.key.clone(),
                ..good.clone()
            },
        ),
        (
            "key.pem",
            Credentials {
                key: good.certificate.clone(),
                ..good.clone()
            },
        ),
        (
            "key.pem",
            Credentials {
                key: other.key,
                ..good.clone()
            },
        ),
    ];
    for (file, broken) in &cases {
        broken.write(folder.path()).expect("written");
        let error = Credentials::read(folder.path()).expect_err("broken");
        assert!(
            matches!(&error, TrustError::Pem { name, .. } if name.ends_with(file)),
            "{file}: {error}"
        );
        let refused = DataplaneClient::connect("127.0.0.1:1", &dpu(), broken)
            .await
            .expect_err("broken");
        assert!(matches!(refused, ConnectError::Credentials { .. }), "{refused}");
        assert!(
            refused.to_string().contains(file.trim_end_matches(".pem")),
            "{refused}"
        );
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let card = MemoryCard::default();
        let node = Arc::new(Node::new(card.both(), Epoch(1)));
        let refused = serve(listener, broken, node, async {}).await.expect_err("broken");
        assert!(matches!(refused, ServeError::Credentials(_)), "{refused}");
    }
    std::fs::remove_file(folder.path().join("key.pem")).expect("removed");
    let error = Credentials::read(folder.path()).expect_err("missing");
    assert!(
        matches!(&error, TrustError::File { path, .. } if path.ends_with("key.pem")),
        "{error}"
    );
    for name in ["", "-a", "a-", "a b", "ä", &"x".repeat(64)] {
        assert!(
            matches!(Authority::new(DpuId(name.to_owned())), Err(TrustError::Name(_))),
            "{name}"
        );
    }
}
