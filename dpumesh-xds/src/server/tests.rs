use super::session::Session;
use super::*;
use crate::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Status};
use ResourceType::{Binding, Cluster, Endpoints, Listener, Peer, Route, Secret};

fn snapshot(resources: &[(ResourceType, &str, &str)]) -> Arc<Snapshot> {
    let mut snapshot = Snapshot::default();
    for (kind, name, body) in resources {
        snapshot.insert(*kind, *name, body.as_bytes().to_vec());
    }
    Arc::new(snapshot)
}

fn ask(kind: ResourceType, names: &[&str]) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        node: Some(Node {
            id: "proxy".into(),
            ..Node::default()
        }),
        type_url: kind.url().into(),
        resource_names_subscribe: names.iter().map(|n| (*n).to_owned()).collect(),
        ..DeltaDiscoveryRequest::default()
    }
}

fn ack(response: &DeltaDiscoveryResponse) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: response.type_url.clone(),
        response_nonce: response.nonce.clone(),
        ..DeltaDiscoveryRequest::default()
    }
}

fn nack(response: &DeltaDiscoveryResponse, why: &str) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        error_detail: Some(Status {
            code: 3,
            message: why.into(),
        }),
        ..ack(response)
    }
}

/// `+name` for what came, `-name` for what went, by type.
fn shown(responses: &[DeltaDiscoveryResponse]) -> Vec<String> {
    let one = |r: &DeltaDiscoveryResponse| {
        let mut text = ResourceType::from_url(&r.type_url).unwrap().word().to_owned();
        r.resources
            .iter()
            .for_each(|r| text.push_str(&format!(" +{}", r.name)));
        r.removed_resources
            .iter()
            .for_each(|name| text.push_str(&format!(" -{name}")));
        text
    };
    responses.iter().map(one).collect()
}

fn settle(session: &mut Session) -> Vec<String> {
    let mut all = Vec::new();
    loop {
        let responses = session.responses();
        if responses.is_empty() {
            return all;
        }
        all.extend(shown(&responses));
        for response in &responses {
            session.request(ack(response)).unwrap();
        }
    }
}

fn started(first: &Arc<Snapshot>) -> Session {
    let mut session = Session::default();
    session.publish(1, Arc::clone(first));
    for request in [
        ask(Listener, &[]),
        ask(Cluster, &[]),
        ask(Endpoints, &["a"]),
        ask(Route, &["80"]),
    ] {
        session.request(request).unwrap();
    }
    session
}

fn first() -> Arc<Snapshot> {
    snapshot(&[
        (Listener, "l", "to a"),
        (Cluster, "a", "1"),
        (Endpoints, "a", "x"),
        (Endpoints, "other", "x"),
        (Route, "80", "to a"),
    ])
}

#[test]
fn the_first_answers_come_in_the_order_in_which_things_refer() {
    let mut session = started(&first());
    assert_eq!(
        settle(&mut session),
        ["cluster +a", "endpoints +a", "listener +l", "route +80"]
    );
    assert_eq!(
        session
            .events
            .iter()
            .filter(|e| e.outcome == Outcome::Ack)
            .count(),
        4
    );
    assert_eq!(settle(&mut session), Vec::<String>::new());
}

#[test]
fn only_what_changed_travels_and_removals_come_last() {
    let mut session = started(&first());
    settle(&mut session);
    session.request(ask(Endpoints, &["b"])).unwrap();
    assert_eq!(settle(&mut session), ["endpoints -b"]);
    session.publish(
        2,
        snapshot(&[
            (Listener, "l", "to b"),
            (Cluster, "b", "1"),
            (Endpoints, "b", "x"),
            (Route, "80", "to a"),
        ]),
    );
    assert_eq!(
        settle(&mut session),
        [
            "cluster +b",
            "endpoints +b",
            "listener +l",
            "cluster -a",
            "endpoints -a"
        ]
    );
}

#[test]
fn removals_wait_while_something_is_refused() {
    let mut session = started(&first());
    settle(&mut session);
    session.events.clear();
    session.publish(2, snapshot(&[(Listener, "l", "bad"), (Route, "80", "to a")]));
    let sent = session.responses();
    assert_eq!(shown(&sent), ["listener +l"]);
    session.request(nack(&sent[0], "filter_chains: bad")).unwrap();
    assert_eq!(
        settle(&mut session),
        Vec::<String>::new(),
        "the refused one is not sent again, and its cluster stays"
    );
    assert_eq!(
        session.events,
        [Event {
            node: "proxy".into(),
            kind: Listener,
            names: vec!["l".into()],
            generation: 2,
            outcome: Outcome::Nack("filter_chains: bad".into()),
        }]
    );
    session.publish(2, snapshot(&[(Listener, "l", "good"), (Route, "80", "to a")]));
    assert_eq!(
        settle(&mut session),
        ["listener +l", "cluster -a", "endpoints -a"]
    );
}

#[test]
fn a_new_cluster_gets_endpoints_that_were_told_for_another() {
    let mut session = started(&first());
    settle(&mut session);
    let mut next = (*first()).clone();
    // eds_cluster_config { service_name: "a" }
    next.insert(Cluster, "a@p", b"\x1a\x03\x12\x01a".to_vec());
    session.publish(2, Arc::new(next));
    assert_eq!(settle(&mut session), ["cluster +a@p", "endpoints +a"]);
}

#[test]
fn after_a_refusal_the_next_snapshot_starts_from_what_may_have_been_taken() {
    let mut session = started(&first());
    settle(&mut session);
    let with = |more: &[(ResourceType, &str, &str)]| {
        let mut all = vec![
            (Listener, "l", "to a"),
            (Cluster, "a", "1"),
            (Endpoints, "a", "x"),
            (Route, "80", "to a"),
        ];
        all.extend(more);
        snapshot(&all)
    };
    session.publish(2, with(&[(Cluster, "bad", "1"), (Cluster, "good", "1")]));
    let sent = session.responses();
    assert_eq!(shown(&sent), ["cluster +bad +good"]);
    session.request(nack(&sent[0], "bad: no")).unwrap();
    assert_eq!(settle(&mut session), Vec::<String>::new());
    session.events.clear();
    session.publish(3, with(&[(Cluster, "good", "1")]));
    assert_eq!(settle(&mut session), ["cluster +good", "cluster -bad"]);
    let last = session.events.last().unwrap();
    assert_eq!((last.generation, &last.outcome), (3, &Outcome::InStep));
}

#[test]
fn what_stands_alone_goes_although_something_else_is_refused() {
    let mut session = Session::default();
    session.publish(
        1,
        snapshot(&[
            (Binding, "shop/a", "1"),
            (Binding, "shop/b", "1"),
            (Peer, "n2", "1"),
        ]),
    );
    for kind in [Binding, Peer] {
        session.request(ask(kind, &[])).unwrap();
    }
    let sent = session.responses();
    assert_eq!(shown(&sent), ["binding +shop/a +shop/b", "peer +n2"]);
    session.publish(2, snapshot(&[(Binding, "shop/a", "1")]));
    assert_eq!(
        shown(&session.responses()),
        Vec::<String>::new(),
        "both are under way"
    );
    session.request(nack(&sent[0], "shop/a: bad")).unwrap();
    assert_eq!(shown(&session.responses()), ["binding -shop/b"]);
    session.request(ack(&sent[1])).unwrap();
    assert_eq!(shown(&session.responses()), ["peer -n2"]);
}

#[test]
fn a_slow_client_gets_the_newest_state_only() {
    let mut session = started(&first());
    settle(&mut session);
    session.publish(2, snapshot(&[(Cluster, "a", "2")]));
    let sent = session.responses();
    assert_eq!(
        shown(&sent),
        ["cluster +a", "endpoints -a"],
        "a changed cluster wants its endpoints again"
    );
    for version in ["3", "4", "5"] {
        session.publish(2, snapshot(&[(Cluster, "a", version), (Endpoints, "a", "x")]));
        assert_eq!(shown(&session.responses()), Vec::<String>::new());
    }
    session
        .request(ack(&DeltaDiscoveryResponse {
            nonce: "stale".into(),
            ..sent[0].clone()
        }))
        .unwrap();
    assert_eq!(
        shown(&session.responses()),
        Vec::<String>::new(),
        "a nonce nobody waits for acknowledges nothing"
    );
    session.request(ack(&sent[0])).unwrap();
    let newest = session.responses();
    assert_eq!(shown(&newest), ["cluster +a"]);
    assert_eq!(newest[0].resources[0].resource.as_ref().unwrap().value, b"5");
}

#[test]
fn in_step_is_who_asked_for_all_and_acknowledged_it() {
    let everything = snapshot(&[
        (Listener, "l", "to a"),
        (Cluster, "a", "1"),
        (Endpoints, "a", "x"),
        (Route, "80", "to a"),
    ]);
    let mut session = Session::default();
    session.publish(7, everything);
    for request in [ask(Cluster, &[]), ask(Endpoints, &["a"]), ask(Listener, &[])] {
        session.request(request).unwrap();
    }
    settle(&mut session);
    let in_step = |session: &mut Session| -> Vec<u64> {
        let events = session.events.drain(..);
        events
            .filter(|e| e.outcome == Outcome::InStep)
            .map(|e| e.generation)
            .collect()
    };
    assert_eq!(
        in_step(&mut session),
        Vec::<u64>::new(),
        "the route was not asked for yet"
    );
    session.request(ask(Route, &["80"])).unwrap();
    let route = session.responses();
    assert_eq!(in_step(&mut session), Vec::<u64>::new(), "nor acknowledged");
    session.request(ack(&route[0])).unwrap();
    settle(&mut session);
    assert_eq!(in_step(&mut session), [7]);
    settle(&mut session);
    assert_eq!(in_step(&mut session), Vec::<u64>::new(), "said once");
}

#[test]
fn who_comes_back_gets_the_difference() {
    let state = first();
    let mut session = Session::default();
    session.publish(1, Arc::clone(&state));
    let mut request = ask(Cluster, &[]);
    request.initial_resource_versions = [
        ("a".to_owned(), state.get(Cluster, "a").unwrap().version.clone()),
        ("gone".to_owned(), "old".to_owned()),
    ]
    .into();
    session.request(request).unwrap();
    assert_eq!(settle(&mut session), ["cluster", "cluster -gone"]);
}

#[test]
fn secrets_are_refused_by_name() {
    let mut session = started(&first());
    settle(&mut session);
    session.events.clear();
    session.request(ask(Secret, &["spiffe://x"])).unwrap();
    assert_eq!(shown(&session.responses()), ["secret -spiffe://x"]);
    assert_eq!(session.events[0].outcome, Outcome::Refused);
    assert_eq!(session.events[0].names, ["spiffe://x"]);
}

#[test]
fn a_stream_must_say_who_it_is() {
    let mut request = ask(Cluster, &[]);
    request.node = None;
    assert!(Session::default().request(request).is_err());
}

#[test]
fn what_is_asked_for_again_is_sent_again() {
    let mut session = started(&first());
    settle(&mut session);
    session.request(ask(Endpoints, &["a"])).unwrap();
    assert_eq!(settle(&mut session), ["endpoints +a"]);
    let mut leave = ask(Endpoints, &[]);
    leave.resource_names_unsubscribe = vec!["a".into()];
    session.request(leave).unwrap();
    session.publish(
        2,
        snapshot(&[
            (Listener, "l", "to a"),
            (Cluster, "a", "1"),
            (Endpoints, "a", "y"),
            (Route, "80", "to a"),
        ]),
    );
    assert_eq!(settle(&mut session), Vec::<String>::new());
}
