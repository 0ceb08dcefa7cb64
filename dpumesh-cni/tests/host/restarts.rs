//! What is killed, and when; what must still be true.

use std::thread;
use std::time::Duration;

use crate::world::{Pod, World, address, eventually, ping, talk};

pub(crate) fn a_dataplane_that_restarts_is_told_everything_again() {
    let mut world = World::new();
    let runtime = world.runtime("1.0.0");
    let (a, b) = (Pod::new("a"), Pod::new("b"));
    a.add(&runtime).expect("added");
    let to = address(&b.add(&runtime).expect("added"));
    assert!(ping(&a, to));
    world.dataplane.take().expect("runs").kill();
    assert!(!ping(&a, to), "a dataplane that is down means silence");
    // While it is away, pods are refused, not left half-made.
    let refused = thread::scope(|scope| {
        let add = scope.spawn(|| Pod::new("c").add(&runtime));
        add.join().expect("ended").expect_err("no dataplane")
    });
    assert_eq!(refused["code"], 11, "{refused}");
    world.start_dataplane();
    eventually("leases and rules are replayed", || ping(&a, to));
    talk(&a, &b, to);
    for pod in [&a, &b] {
        pod.del(&runtime, None).expect("deleted");
    }
    world.assert_empty();
}

pub(crate) fn an_agent_that_is_killed_keeps_its_pods() {
    let mut world = World::new();
    let runtime = world.runtime("1.1.0");
    let (a, b) = (Pod::new("a"), Pod::new("b"));
    let first = a.add(&runtime).expect("added");
    let second = b.add(&runtime).expect("added");
    let to = address(&second);
    let leases: Vec<_> = world
        .journal()
        .iter()
        .map(|record| record["lease"].clone())
        .collect();
    world.agent.take().expect("runs").kill();
    assert!(ping(&a, to), "nobody needs the agent for traffic");
    assert_eq!(Pod::new("c").add(&runtime).expect_err("no agent")["code"], 11);
    assert_eq!(runtime.status().expect_err("no agent")["code"], 50);
    world.start_agent(&[]);
    eventually("the agent is ready", || runtime.status().is_ok());
    let after: Vec<_> = world
        .journal()
        .iter()
        .map(|record| record["lease"].clone())
        .collect();
    assert_eq!(after, leases);
    runtime
        .check(a.sandbox(Some(&a.namespace.path())), &first)
        .expect("as it was made");
    assert!(ping(&a, to));
    talk(&a, &b, to);
    assert!(
        world.agent.take().expect("runs").end(),
        "SIGTERM is an orderly end"
    );
    assert!(!world.socket().exists());
    assert!(ping(&a, to), "pods keep what they have");
    world.start_agent(&[]);
    for pod in [&a, &b] {
        pod.del(&runtime, None).expect("deleted");
    }
    world.assert_empty();
}

pub(crate) fn an_agent_killed_in_the_middle_of_an_add_leaks_nothing() {
    let mut world = World::new();
    let runtime = world.runtime("1.0.0");
    let pod = Pod::new("a");
    // IPAM runs when the VF is in the pod and nothing else is done.
    world.hook(r#"kill -9 "$(cat "$NODE_DIR/agent.pid")""#);
    let error = pod.add(&runtime).expect_err("the agent is dead");
    assert_eq!(error["code"], 11, "{error}");
    assert_eq!(world.given_addresses(), 0, "the address is given back");
    assert_eq!(world.leased(), 1, "nobody could free it");
    world.start_agent(&[]);
    world.assert_empty();
    assert_eq!(pod.links(), ["lo"]);
    // The same pod again, as a runtime would after its DEL.
    pod.del(&runtime, None).expect("deleted");
    pod.add(&runtime).expect("added");
    pod.del(&runtime, None).expect("deleted");
    world.assert_empty();
}

pub(crate) fn a_plugin_killed_in_the_middle_of_an_add_leaks_nothing() {
    let world = World::new();
    let runtime = world.runtime("1.0.0");
    let pod = Pod::new("a");
    world.hook(r#"kill -9 $PPID"#);
    assert!(pod.add(&runtime).expect_err("killed").is_null());
    eventually("the agent undoes what was not finished", || world.leased() == 0);
    assert_eq!(pod.links(), ["lo"]);
    pod.del(&runtime, None).expect("deleted");
    world.assert_empty();
}

pub(crate) fn pods_end_while_agent_and_dataplane_are_away() {
    let mut world = World::new();
    let runtime = world.runtime("1.0.0");
    let (a, b, c) = (Pod::new("a"), Pod::new("b"), Pod::new("c"));
    for pod in [&a, &b, &c] {
        pod.add(&runtime).expect("added");
    }
    world.dataplane.take().expect("runs").kill();
    a.del(&runtime, None).expect("deleted without a dataplane");
    assert_eq!(a.links(), ["lo"]);
    assert_eq!(
        world.leased(),
        3,
        "the VF stays leased until the dataplane has closed its port"
    );
    world.agent.take().expect("runs").kill();
    b.del(&runtime, None).expect("deleted without an agent");
    b.del(&runtime, None).expect("deleted again");
    world.start_agent(&[]);
    eventually("the note is read", || b.links() == ["lo"]);
    world.start_dataplane();
    eventually("both VFs are free", || world.leased() == 1);
    let d = Pod::new("d");
    let to = address(&d.add(&runtime).expect("added"));
    eventually("the pod that stayed is back", || ping(&c, to));
    for pod in [&c, &d] {
        pod.del(&runtime, None).expect("deleted");
    }
    world.assert_empty();
}

pub(crate) fn whenever_an_agent_is_killed_nothing_leaks() {
    const MOMENTS: u64 = 10;
    let mut world = World::new();
    let runtime = world.runtime("1.0.0");
    let mut outcomes = [0, 0];
    for moment in 0..MOMENTS {
        let pod = Pod::new(&format!("m{moment}"));
        let agent = world.agent.take().expect("runs");
        let added = thread::scope(|scope| {
            let add = scope.spawn(|| pod.add(&runtime));
            // The moments are what is tested: from before the first word to after the last.
            thread::sleep(Duration::from_millis(moment * 50));
            agent.kill();
            add.join().expect("ended")
        });
        outcomes[usize::from(added.is_ok())] += 1;
        world.start_agent(&[]);
        pod.del(&runtime, added.as_ref().ok()).expect("deleted");
        assert_eq!(pod.links(), ["lo"], "killed at moment {moment}");
        world.assert_empty();
    }
    eprintln!("{} ADDs broke off, {} had succeeded", outcomes[0], outcomes[1]);
    assert!(outcomes[0] > 0, "the moments are all too late");
}

pub(crate) fn a_card_that_is_reset_loses_its_pods_and_serves_new_ones() {
    let mut world = World::new();
    let runtime = world.runtime("1.0.0");
    let lost = Pod::new("lost");
    let result = lost.add(&runtime).expect("added");
    world.card().card().reset().expect("reset");
    // A dataplane ends with its card; whoever supervises it starts it again.
    assert!(
        !world.dataplane.take().expect("runs").wait(),
        "it says that its card is lost"
    );
    world.start_dataplane();
    eventually("the agent takes back what the card has lost", || {
        world.journal().is_empty()
    });
    let netns = lost.namespace.path();
    assert_eq!(
        runtime
            .check(lost.sandbox(Some(&netns)), &result)
            .expect_err("lost")["code"],
        101
    );
    lost.del(&runtime, Some(&result)).expect("deleted");
    let (a, b) = (Pod::new("a"), Pod::new("b"));
    a.add(&runtime).expect("added");
    let to = address(&b.add(&runtime).expect("added"));
    assert!(ping(&a, to));
    for pod in [&a, &b] {
        pod.del(&runtime, None).expect("deleted");
    }
    world.assert_empty();
}
