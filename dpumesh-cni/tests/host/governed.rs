//! Attached means closed: an agent as a library, with a governor that a test can open.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use dpumesh_cni::agent::{
    AgentSocket, DataplaneAddress, GovernedPod, Governor, GovernorError, Journal, LocalNetwork, Node,
    NodeOptions, Peers, Ungoverned, keep_connected,
};
use dpumesh_core::{BackendExt, DpuId, PfIndex, Vni};
use tokio::runtime::Runtime;
use tokio::sync::watch;

use crate::world::{Pod, World, address, eventually, ping};

/// Bounds of an ADD's wait for the program.
const SHORT: Duration = Duration::from_millis(300);
const LONG: Duration = Duration::from_secs(40);

/// Governs every pod from the moment it is opened.
#[derive(Debug)]
struct Gate {
    open: watch::Receiver<bool>,
}

#[async_trait]
impl Governor for Gate {
    async fn governed(&self, pod: &GovernedPod) -> Result<(), GovernorError> {
        assert_eq!((pod.pod.namespace.as_str(), pod.addresses.len()), ("shop", 1));
        let mut open = self.open.clone();
        let opened = open.wait_for(|open| *open).await;
        opened
            .map(drop)
            .map_err(|_| GovernorError("the gate is gone".to_owned()))
    }

    async fn resume(&self, _: &GovernedPod) {}

    async fn forget(&self, _: &GovernedPod) {}
}

pub(crate) fn a_pod_is_closed_until_it_is_governed() {
    let world = World::without_agent(1);
    let runtime = world.runtime("1.0.0");
    let (gate, open) = watch::channel(false);
    {
        let _agent = agent(&world, open.clone(), Ungoverned::Refuse, SHORT);
        let pod = Pod::new("a");
        let error = pod.add(&runtime).expect_err("not governed");
        assert_eq!(error["code"], 11);
        assert!(
            error["msg"].as_str().expect("a text").contains("shop/pod-a"),
            "{error}"
        );
        assert_eq!(pod.links(), ["lo"]);
        world.assert_empty();
    }
    let _agent = agent(&world, open, Ungoverned::Closed, SHORT);
    let (a, b) = (Pod::new("a"), Pod::new("b"));
    let from = address(&a.add(&runtime).expect("added, closed"));
    let to = address(&b.add(&runtime).expect("added, closed"));
    assert!(!ping(&a, to) && !ping(&b, from), "closed");
    gate.send_replace(true);
    eventually("the gate is open", || ping(&a, to) && ping(&b, from));
    for pod in [&a, &b] {
        pod.del(&runtime, None).expect("deleted");
    }
    world.assert_empty();
}

pub(crate) fn a_plugin_killed_while_it_waits_is_not_waited_for() {
    let world = World::without_agent(1);
    let runtime = world.runtime("1.0.0");
    let (_gate, open) = watch::channel(false);
    let _agent = agent(&world, open, Ungoverned::Refuse, LONG);
    let pod = Pod::new("a");
    // When the plugin is killed, IPAM has ended and the agent waits for the program.
    world.hook(r#"(sleep 1; kill -9 $PPID) </dev/null >/dev/null 2>&1 &"#);
    let started = Instant::now();
    assert!(pod.add(&runtime).expect_err("killed").is_null());
    eventually("the agent undoes what nobody waits for", || world.leased() == 0);
    assert!(
        started.elapsed() < LONG / 2,
        "the bound had nothing to do with it"
    );
    assert_eq!(pod.links(), ["lo"]);
    pod.del(&runtime, None).expect("deleted");
    world.assert_empty();
}

/// An agent in this process; its connections leave from the host's namespace.
fn agent(world: &World, open: watch::Receiver<bool>, ungoverned: Ungoverned, within: Duration) -> Runtime {
    let runtime = world.host_runtime();
    let card = Arc::new(world.card());
    let options = NodeOptions {
        network: LocalNetwork::Overlay {
            vtep: world.vtep(),
            vni: Vni::try_from(42).expect("24 bits"),
        },
        govern_within: within,
        ungoverned,
        dataplane_within: Duration::from_secs(8),
    };
    let journal = Journal::open(&world.path("state")).expect("a journal");
    let node = Arc::new(Node::new(
        Arc::<dpumesh_tap::TapBackend>::clone(&card) as _,
        Arc::new(Gate { open }),
        journal,
        Peers::default(),
        options,
    ));
    let address = DataplaneAddress {
        address: world.channel(),
        dpu: DpuId(world.dpu()),
        credentials: world.credentials(),
    };
    let path = world.socket();
    let (served, ready) = std::sync::mpsc::channel();
    runtime.spawn(async move {
        let vf = card.require_vf().expect("VFs");
        vf.set_vf_count(card.fence(), PfIndex(0), 4).await.expect("VFs");
        node.recover().await.expect("recovered");
        tokio::spawn(keep_connected(Arc::clone(&node), address));
        let socket = AgentSocket::bind(&path).expect("a socket");
        served.send(()).expect("the test waits");
        socket.serve(node, std::future::pending()).await;
    });
    ready
        .recv_timeout(Duration::from_secs(20))
        .expect("the agent serves");
    runtime
}
