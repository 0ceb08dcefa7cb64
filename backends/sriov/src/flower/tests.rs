//! Octets against those of iproute2 and against themselves, and steering on a kernel in memory.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use dpumesh_core::steering::{
    Action, Atomicity, Batch, Change, Conntrack, Cookie, CtStates, CtZone, DscpMatch, EtherType,
    FragmentMatch, Group, IpMatch, IpProtocol, Masked, MissPolicy, Operation, Owner, Pattern, Placement,
    PlacementRequest, PortRange, Priority, RewriteField, SteeringRule, TcpFlags, Undone, Verdict, VlanMatch,
};
use dpumesh_core::{Epoch, ErrorKind, Fence, FlowSteering, FlowSteeringExt, MacAddr, PortRef, VlanId, Vni};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use proptest::prelude::*;

use super::fake::{BLOCK, FakeKernel};
use super::filter::{Filter, Handle, Skip, prio_of, priority_of};
use super::key::Keys;
use super::octets::{Writer, attributes, find};
use super::parts::{self, Seat, parts};
use super::step::{self, Edit, Step};
use super::translate::Names;
use super::{Life, Meter, Options, Steering};

const COOKIE: u128 = 0x0001_0203_0405_0607_0809_0a0b_0c0d_0e0f;

/// Options of each message that tc sent.
fn recorded() -> Vec<(String, Vec<u8>)> {
    let text = include_str!("recorded/tc-6.1.txt");
    let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    let octets = |hex: &str| -> Vec<u8> {
        let digits = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).expect("hex");
        (0..hex.len()).step_by(2).map(digits).collect()
    };
    lines
        .chunks(2)
        .map(|pair| (pair[0].to_owned(), octets(pair[1])))
        .collect()
}

fn expected() -> Vec<(Pattern, Vec<Step>)> {
    let none = Pattern::default;
    let ip4 = || Pattern {
        ethertype: Some(EtherType::IPV4),
        ..none()
    };
    let ip6 = || Pattern {
        ethertype: Some(EtherType::IPV6),
        ..none()
    };
    let tcp = || Pattern {
        ip_proto: Some(IpProtocol::TCP),
        ..ip4()
    };
    let prefix = |text: &str| Some(IpMatch::from(text.parse::<IpNet>().expect("prefix")));
    let mac = MacAddr([2, 0, 0, 0, 0, 9]);
    let both = CtStates::TRACKED | CtStates::ESTABLISHED;
    let udp = Pattern {
        ip_proto: Some(IpProtocol::UDP),
        l4_src: Some(PortRange {
            first: 1001,
            last: 1006,
        }),
        eth_dst: Some(Masked {
            value: MacAddr([2, 0, 0, 0, 0, 1]),
            mask: MacAddr([0xff, 0xff, 0xff, 0, 0, 0]),
        }),
        dscp: Some(DscpMatch(10)),
        fragment: Some(FragmentMatch::First),
        ..ip4()
    };
    let flags = Masked {
        value: TcpFlags::SYN,
        mask: TcpFlags::SYN | TcpFlags::RST,
    };
    let six = Pattern {
        ip_src: prefix("fd00:1::/32"),
        ip_proto: Some(IpProtocol::TCP),
        tcp_flags: Some(flags),
        ..ip6()
    };
    let vlan = Pattern {
        vlan: Some(VlanMatch::Id(VlanId::try_from(7).expect("a VLAN"))),
        ip_dst: prefix("10.0.0.1/32"),
        ..ip4()
    };
    let edit = |edit| vec![Step::Edit(edit), Step::Checksums, Step::Drop];
    let vni = Vni::try_from(7).expect("a VNI");
    let (local, remote) = (IpAddr::from([192, 0, 2, 1]), IpAddr::from([192, 0, 2, 2]));
    vec![
        (
            Pattern {
                ip_dst: prefix("10.1.0.0/16"),
                l4_dst: Some(80.into()),
                ..tcp()
            },
            vec![Step::Drop],
        ),
        (udp, vec![Step::Mirror(1), Step::Redirect(1)]),
        (six, vec![Step::PushVlan(7), Step::Goto(5)]),
        (vlan, vec![Step::PopVlan, Step::Pass]),
        (
            Pattern {
                ct_state: Some(Masked {
                    value: both,
                    mask: both,
                }),
                ..tcp()
            },
            edit(Edit::Ip4Dst([192, 0, 2, 9].into())),
        ),
        (tcp(), edit(Edit::TcpDst(8080))),
        (ip4(), vec![Step::Edit(Edit::EthDst(mac)), Step::Drop]),
        (ip4(), vec![Step::Edit(Edit::EthSrc(mac)), Step::Drop]),
        (ip4(), edit(Edit::Ttl4)),
        (ip6(), edit(Edit::Ip6Src("fd00::9".parse().expect("an address")))),
        (
            none(),
            vec![
                Step::Tunnel {
                    vni,
                    local,
                    remote,
                    port: 4789,
                },
                Step::Redirect(1),
            ],
        ),
        (
            Pattern {
                vni: Some(vni),
                ..none()
            },
            vec![Step::Untunnel, Step::Drop],
        ),
        (
            none(),
            vec![
                Step::Conntrack {
                    zone: 5,
                    commit: true,
                },
                Step::Drop,
            ],
        ),
        (
            none(),
            vec![
                Step::Police {
                    index: 0x6470_0000,
                    rate: 125_000,
                    burst: 3000,
                },
                Step::Drop,
            ],
        ),
    ]
}

#[test]
fn what_tc_sends_is_read_as_it_was_meant() {
    let (recorded, expected) = (recorded(), expected());
    assert_eq!(recorded.len(), expected.len());
    for ((command, body), (pattern, steps)) in recorded.into_iter().zip(expected) {
        let options = find(&body[20..], 2).expect("options");
        let keys = Keys::read(attributes(options)).expect("known keys");
        assert_eq!(keys.pattern(true), Some(pattern), "{command}");
        let (found, cookie, _) = step::decode(find(options, 3).expect("actions")).expect("known actions");
        assert_eq!((found, cookie), (steps, COOKIE), "{command}");
    }
}

/// Each option of each action that tc sends is in ours with the same octets, but for what tc leaves open.
#[test]
fn actions_are_written_as_tc_writes_them() {
    for ((command, body), (_, steps)) in recorded().into_iter().zip(expected()) {
        let options = find(&body[20..], 2).expect("options");
        let theirs = find(options, 3).expect("actions");
        let ours = step::encode(&steps, COOKIE);
        for ((order, theirs), (_, ours)) in attributes(theirs).zip(attributes(&ours)) {
            assert_eq!(
                find(theirs, 1),
                find(ours, 1),
                "{command}: kind of action {order}"
            );
            let (theirs, ours) = (find(theirs, 2).expect("options"), find(ours, 2).expect("options"));
            for (kind, value) in attributes(theirs) {
                // tc writes out what is the default, and a rate table that the kernel does not read.
                let police = command.contains("police") && order == 1;
                if (police && kind <= 2) || (command.contains("tunnel_key") && matches!(kind, 10)) {
                    continue;
                }
                let mine = find(ours, kind);
                assert_eq!(mine, Some(value), "{command}: option {kind} of action {order}");
            }
        }
    }
}

#[test]
fn no_truncation_and_no_flipped_octet_panics() {
    let rule = some_rule(1);
    let names = names();
    let mut bodies: Vec<Vec<u8>> = recorded().into_iter().map(|(_, body)| body).collect();
    bodies.extend(
        filters_of(&rule, &names)
            .iter()
            .map(|filter| filter.add(BLOCK).body),
    );
    for body in bodies {
        for length in 0..body.len() {
            let _ = Filter::read(&body[..length], BLOCK);
        }
        for at in 0..body.len() {
            let mut changed = body.clone();
            changed[at] ^= 0xff;
            if let Some(shown) = Filter::read(&changed, BLOCK) {
                let _ = parts::rule_of(&[&shown.filter], |_| Some(Owner::Agent), &names);
            }
        }
    }
}

fn names() -> Names {
    let ports = [
        (PortRef::vf(0), 1),
        (PortRef::vf(1), 2),
        (PortRef::Uplink(0), 3),
        (PortRef::Stack(0), 4),
    ];
    Names {
        ports: ports.into(),
        links: (1..=4).map(|link| (link, format!("rep{link}"))).collect(),
        tunnels: BTreeMap::new(),
        meters: BTreeMap::from([(
            0,
            Meter {
                rate: 125_000,
                burst: 3000,
            },
        )]),
    }
}

fn filters_of(rule: &SteeringRule, names: &Names) -> Vec<Filter> {
    let skip = match rule.placement {
        PlacementRequest::Hardware => Skip::Software,
        PlacementRequest::Software => Skip::Hardware,
        PlacementRequest::Any => Skip::Nothing,
    };
    let seat = Seat {
        owner: 0,
        number: 9,
        skip,
        copy: 3,
    };
    let parts = parts(rule, names).unwrap_or_default();
    parts
        .into_iter()
        .map(|part| parts::filter(rule, part, seat))
        .collect()
}

fn some_rule(cookie: u128) -> SteeringRule {
    let [.., c, d] = cookie.to_be_bytes();
    let pattern = Pattern {
        ip_dst: Some(IpMatch::from(IpAddr::from([10, 0, c, d]))),
        ..Pattern::default()
    };
    SteeringRule::new(
        Cookie(cookie),
        Owner::Agent,
        Priority(0),
        pattern,
        vec![Action::Forward(PortRef::vf(1))],
    )
}

fn ports() -> BTreeMap<PortRef, u32> {
    names().ports
}

fn open(kernel: &FakeKernel) -> Steering {
    let options = Options::new("flower", BLOCK, ports());
    Steering::open(Box::new(kernel.clone()), options, Arc::new(Life::new(Epoch(1)))).expect("opens")
}

const FENCE: Fence = Fence(Epoch(1));

fn add(cookie: u128) -> Operation {
    Operation::Add(some_rule(cookie))
}

fn remove(cookie: u128) -> Operation {
    Operation::Remove {
        owner: Owner::Agent,
        cookie: Cookie(cookie),
    }
}

async fn cookies(steering: &Steering) -> Vec<u128> {
    let rules = steering.list(Owner::Agent).await.expect("listed");
    rules.iter().map(|there| there.rule.cookie.0).collect()
}

#[tokio::test]
async fn placement_is_what_the_driver_says() {
    let kernel = FakeKernel::new(4, Some(1000));
    let steering = open(&kernel);
    assert!(steering.capabilities().hardware_rules > 0);
    let mut rule = some_rule(1);
    rule.placement = PlacementRequest::Hardware;
    assert_eq!(
        steering.validate(&[rule.clone()]).await.expect("judged"),
        [Verdict::Hardware]
    );
    assert_eq!(
        steering.add(FENCE, rule).await,
        Ok(Change::Added(Placement::Hardware))
    );
    kernel.with(|state| state.hardware = Some(0));
    let change = steering.add(FENCE, some_rule(2)).await.expect("in software");
    assert_eq!(
        change,
        Change::Added(Placement::Software("the driver did not take it".into()))
    );
    let again = steering.add(FENCE, some_rule(2)).await.expect("there");
    assert!(
        matches!(again, Change::Present(Placement::Software(_))),
        "{again:?}"
    );
    let mut rule = some_rule(3);
    rule.placement = PlacementRequest::Hardware;
    let error = steering.add(FENCE, rule).await.expect_err("no room");
    assert_eq!(error.kind, ErrorKind::CapacityExceeded, "{error}");
    assert_eq!(cookies(&steering).await, [1, 2]);
    let mut rule = some_rule(4);
    rule.placement = PlacementRequest::Software;
    assert!(matches!(
        steering.add(FENCE, rule).await,
        Ok(Change::Added(Placement::Software(_)))
    ));
}

/// A rule of two families of which the driver takes one filter.
#[tokio::test]
async fn half_a_rule_in_hardware_is_partial() {
    let kernel = FakeKernel::new(4, Some(1000));
    let steering = open(&kernel);
    let used = kernel.with(|state| state.filters.len());
    kernel.with(|state| state.hardware = Some(used + 1));
    let mut rule = some_rule(1);
    rule.pattern = Pattern {
        ip_proto: Some(IpProtocol::TCP),
        ..Pattern::default()
    };
    let change = steering.add(FENCE, rule).await.expect("added");
    assert_eq!(
        change,
        Change::Added(Placement::Partial("the driver took 1 of 2 filters".into()))
    );
}

#[tokio::test]
async fn what_the_kernel_refuses_is_not_there_and_the_others_are() {
    let kernel = FakeKernel::new(4, None);
    let steering = open(&kernel);
    kernel.with(|state| state.refuse.insert(2, libc::EINVAL));
    let batch = Batch::new(vec![add(1), add(2), add(2), remove(2), add(3)]);
    let outcome = steering.apply(FENCE, &batch).await.expect("applied");
    let kinds: Vec<String> = outcome
        .results
        .iter()
        .map(|result| match result {
            Ok(change) => format!("{change:?}")
                .split('(')
                .next()
                .unwrap_or_default()
                .to_owned(),
            Err(error) => format!("{:?}", error.kind),
        })
        .collect();
    assert_eq!(kinds[0], "Added");
    assert_eq!(kinds[1], "Unsupported");
    assert_eq!(kinds[3..], ["Absent", "Added"]);
    assert_eq!(cookies(&steering).await, [1, 3]);
    kernel.with(|state| state.refuse.clear());
    assert!(matches!(
        steering.add(FENCE, some_rule(2)).await,
        Ok(Change::Added(_))
    ));
    assert_eq!(cookies(&steering).await, [1, 2, 3]);
}

#[tokio::test]
async fn a_refusal_undoes_a_batch_that_is_all_or_nothing() {
    let kernel = FakeKernel::new(4, None);
    let steering = open(&kernel);
    steering.add(FENCE, some_rule(7)).await.expect("added");
    let before = kernel.with(|state| state.filters.clone());
    kernel.with(|state| state.refuse.insert(2, libc::ENOSPC));
    let batch = Batch::new(vec![add(1), remove(7), add(2), add(3)]).with(Atomicity::Rollback);
    let outcome = steering.apply(FENCE, &batch).await.expect("applied");
    assert_eq!(outcome.undone, Undone::All);
    assert_eq!(
        outcome.results[2].as_ref().expect_err("refused").kind,
        ErrorKind::CapacityExceeded
    );
    assert_eq!(outcome.results[0], Ok(Change::Skipped));
    assert_eq!(kernel.with(|state| state.filters.clone()), before);
    assert_eq!(cookies(&steering).await, [7]);
    // So does one that tc has no words for.
    let mut misfit = some_rule(9);
    misfit.actions = vec![Action::Forward(PortRef::vf(99))];
    let batch = Batch::new(vec![remove(7), Operation::Add(misfit), add(1)]).with(Atomicity::Rollback);
    let outcome = steering.apply(FENCE, &batch).await.expect("applied");
    let error = outcome.results[1].as_ref().expect_err("refused");
    assert_eq!(
        error.object.as_ref().map(|object| &*object.field),
        Some("actions[0]"),
        "{error}"
    );
    assert_eq!((outcome.undone, cookies(&steering).await), (Undone::All, vec![7]));
}

#[tokio::test]
async fn a_broken_link_says_that_the_effect_is_unknown() {
    let kernel = FakeKernel::new(4, None);
    let steering = open(&kernel);
    kernel.with(|state| state.broken = true);
    let error = steering
        .apply(FENCE, &Batch::new(vec![add(1)]))
        .await
        .expect_err("broken");
    assert_eq!(
        (error.kind, error.effect),
        (ErrorKind::Io, dpumesh_core::Effect::Unknown)
    );
    kernel.with(|state| state.broken = false);
    assert!(cookies(&steering).await.is_empty());
    assert!(matches!(
        steering.add(FENCE, some_rule(1)).await,
        Ok(Change::Added(_))
    ));
}

#[tokio::test]
async fn the_next_process_finds_rules_and_leaves_strangers_alone() {
    let kernel = FakeKernel::new(4, None);
    let steering = open(&kernel);
    let mut theirs = some_rule(5);
    theirs.owner = Owner::User(4711);
    steering.add(FENCE, some_rule(1)).await.expect("added");
    steering.add(FENCE, theirs.clone()).await.expect("added");
    steering
        .set_miss_policy(FENCE, PortRef::vf(0), MissPolicy::Software)
        .await
        .expect("open");
    drop(steering);
    // A stranger's filter: made by tc, of another protocol.
    let (_, stranger) = recorded().swap_remove(0);
    let place = super::filter::Place {
        chain: 3,
        prio: 25,
        handle: 4,
    };
    kernel.with(|state| state.filters.insert(place, stranger.clone()));
    let steering = open(&kernel);
    assert_eq!(cookies(&steering).await, [1]);
    let listed = steering.list(Owner::User(4711)).await.expect("listed");
    assert_eq!(listed.len(), 1);
    assert_eq!(listed[0].rule, theirs);
    assert!(matches!(
        steering.add(FENCE, theirs).await,
        Ok(Change::Present(_))
    ));
    assert_eq!(steering.flush(FENCE, Owner::Agent).await, Ok(1));
    assert_eq!(steering.flush(FENCE, Owner::User(4711)).await, Ok(1));
    assert_eq!(
        kernel.with(|state| state.filters.get(&place).cloned()),
        Some(stranger)
    );
    steering.remove().await.expect("removed");
}

#[tokio::test]
async fn a_foreign_qdisc_is_refused_by_name() {
    let kernel = FakeKernel::new(4, None);
    kernel.with(|state| state.taken.insert(2));
    let options = Options::new("flower", BLOCK, ports());
    let error = Steering::open(Box::new(kernel), options, Arc::default()).expect_err("taken");
    assert_eq!(error.kind, ErrorKind::Busy);
    assert!(error.message.contains("rep2"), "{error}");
}

#[tokio::test]
async fn ports_come_and_go() {
    let kernel = FakeKernel::new(5, None);
    let steering = open(&kernel);
    let mut more = ports();
    more.insert(PortRef::vf(2), 5);
    let mut rule = some_rule(1);
    rule.actions = vec![Action::Forward(PortRef::vf(2))];
    assert!(steering.add(FENCE, rule.clone()).await.is_err());
    steering.set_ports(more).await.expect("bound");
    assert!(matches!(steering.add(FENCE, rule).await, Ok(Change::Added(_))));
    let mut gone = ports();
    gone.insert(PortRef::vf(3), 9);
    let error = steering.set_ports(gone).await.expect_err("no such netdev");
    assert_eq!(error.kind, ErrorKind::NotFound, "{error}");
}

#[tokio::test]
async fn a_lost_card_and_an_old_fence_change_nothing() {
    let kernel = FakeKernel::new(4, None);
    let life = Arc::new(Life::new(Epoch(1)));
    let options = Options::new("flower", BLOCK, ports());
    let steering = Steering::open(Box::new(kernel.clone()), options, Arc::clone(&life)).expect("opens");
    let before = kernel.with(|state| state.filters.len());
    let error = steering
        .add(Fence(Epoch(0)), some_rule(1))
        .await
        .expect_err("stale");
    assert_eq!(error.kind, ErrorKind::Stale);
    life.lose();
    assert_eq!(
        steering.list(Owner::Agent).await.expect_err("away").kind,
        ErrorKind::DeviceLost
    );
    steering.renew(Epoch(2), ports()).await.expect("renewed");
    life.return_with(Epoch(2));
    assert!(matches!(
        steering.add(Fence(Epoch(2)), some_rule(1)).await,
        Ok(Change::Added(_))
    ));
    assert_eq!(kernel.with(|state| state.filters.len()), before + 1);
}

#[test]
fn what_does_not_fit_tc_is_named() {
    let names = names();
    let field = |change: fn(&mut SteeringRule)| {
        let mut rule = some_rule(1);
        change(&mut rule);
        parts(&rule, &names).expect_err("a misfit").0
    };
    assert_eq!(
        field(|rule| rule.pattern.ethertype = Some(EtherType::ARP)),
        "pattern.ethertype"
    );
    assert_eq!(
        field(|rule| rule.pattern.port = Some(PortRef::vf(9))),
        "pattern.port"
    );
    assert_eq!(
        field(|rule| rule.actions = vec![Action::Forward(PortRef::Stack(0))]),
        "actions[0]"
    );
    let six = |rule: &mut SteeringRule| {
        rule.actions.insert(
            0,
            Action::Rewrite(RewriteField::IpDst("fd00::1".parse().expect("an address"))),
        );
    };
    assert_eq!(field(six), "actions[0]");
    assert_eq!(
        field(|rule| rule.actions.insert(0, Action::Rewrite(RewriteField::L4Dst(80)))),
        "pattern.ip_proto"
    );
    let open_family = |rule: &mut SteeringRule| {
        rule.pattern = Pattern {
            ip_proto: Some(IpProtocol::TCP),
            ..Pattern::default()
        };
        rule.actions
            .insert(0, Action::Rewrite(RewriteField::IpDst([192, 0, 2, 1].into())));
    };
    assert_eq!(field(open_family), "pattern.ethertype");
    assert_eq!(
        field(|rule| rule
            .actions
            .splice(0..0, [Action::Count, Action::Count])
            .for_each(drop)),
        "actions[1]"
    );
}

fn edits() -> impl Strategy<Value = Edit> {
    let mac = any::<[u8; 6]>().prop_map(MacAddr);
    prop_oneof![
        mac.clone().prop_map(Edit::EthSrc),
        mac.prop_map(Edit::EthDst),
        any::<[u8; 4]>().prop_map(|a| Edit::Ip4Src(a.into())),
        any::<[u8; 4]>().prop_map(|a| Edit::Ip4Dst(a.into())),
        any::<[u8; 16]>().prop_map(|a| Edit::Ip6Src(a.into())),
        any::<[u8; 16]>().prop_map(|a| Edit::Ip6Dst(a.into())),
        any::<u16>().prop_map(Edit::TcpSrc),
        any::<u16>().prop_map(Edit::TcpDst),
        any::<u16>().prop_map(Edit::UdpSrc),
        any::<u16>().prop_map(Edit::UdpDst),
        (0..64_u8).prop_map(Edit::Dscp4),
        (0..64_u8).prop_map(Edit::Dscp6),
        Just(Edit::Ttl4),
        Just(Edit::Ttl6),
    ]
}

fn steps() -> impl Strategy<Value = Step> {
    let tunnel = |(vni, local, remote, port): (u32, [u8; 4], [u8; 4], u16)| Step::Tunnel {
        vni: Vni::try_from(vni).expect("24 bits"),
        local: local.into(),
        remote: remote.into(),
        port,
    };
    let tunnel6 = |(vni, local, remote, port): (u32, [u8; 16], [u8; 16], u16)| Step::Tunnel {
        vni: Vni::try_from(vni).expect("24 bits"),
        local: local.into(),
        remote: remote.into(),
        port,
    };
    prop_oneof![
        Just(Step::Drop),
        Just(Step::Pass),
        Just(Step::Note),
        (0..1_u32 << 28).prop_map(Step::Goto),
        any::<u32>().prop_map(Step::Redirect),
        any::<u32>().prop_map(Step::Mirror),
        (0..4095_u16).prop_map(Step::PushVlan),
        Just(Step::PopVlan),
        edits().prop_map(Step::Edit),
        Just(Step::Checksums),
        (0..1_u32 << 24, any::<[u8; 4]>(), any::<[u8; 4]>(), any::<u16>()).prop_map(tunnel),
        (0..1_u32 << 24, any::<[u8; 16]>(), any::<[u8; 16]>(), any::<u16>()).prop_map(tunnel6),
        Just(Step::Untunnel),
        (any::<u16>(), any::<bool>()).prop_map(|(zone, commit)| Step::Conntrack { zone, commit }),
    ]
}

fn masked<T: Clone + std::fmt::Debug>(
    value: impl Strategy<Value = (T, T)>,
) -> impl Strategy<Value = Option<Masked<T>>> {
    prop::option::weighted(0.3, value.prop_map(|(value, mask)| Masked { value, mask }))
}

/// Patterns in the form in which they are read back: no bits outside of masks, prefixes as prefixes.
fn patterns() -> impl Strategy<Value = Pattern> {
    let mac = || {
        masked(prop::sample::select(vec![
            (MacAddr([2, 0, 0, 0, 0, 1]), MacAddr::BROADCAST),
            (MacAddr([2, 3, 0, 0, 0, 0]), MacAddr([0xff, 0xff, 0, 0, 0, 0])),
        ]))
    };
    let four = (any::<u32>(), 1..=32_u8).prop_map(|(bits, length)| {
        IpMatch::from(IpNet::from(Ipv4Net::new(bits.into(), length).expect("a length")))
    });
    let six = (any::<u128>(), 1..=128_u8).prop_map(|(bits, length)| {
        IpMatch::from(IpNet::from(Ipv6Net::new(bits.into(), length).expect("a length")))
    });
    let odd = IpMatch::Masked(Masked {
        value: [10, 0, 8, 0].into(),
        mask: [255, 0, 255, 0].into(),
    });
    let pair = prop_oneof![
        2 => Just((None, None)),
        2 => (prop::option::of(four.clone()), prop::option::of(four)),
        2 => (prop::option::of(six.clone()), prop::option::of(six)),
        1 => Just((Some(odd), None)),
    ];
    let range = || {
        prop::option::weighted(
            0.4,
            (any::<u16>(), any::<u16>()).prop_map(|(a, b)| PortRange {
                first: a.min(b),
                last: a.max(b),
            }),
        )
    };
    let protocols = prop::option::of(prop::sample::select(vec![
        IpProtocol::TCP,
        IpProtocol::UDP,
        IpProtocol::SCTP,
        IpProtocol(99),
    ]));
    let fragments = prop::option::weighted(
        0.2,
        prop::sample::select(vec![
            FragmentMatch::Whole,
            FragmentMatch::Any,
            FragmentMatch::First,
            FragmentMatch::Later,
        ]),
    );
    let vlan = prop::option::weighted(
        0.3,
        prop_oneof![
            Just(VlanMatch::Untagged),
            (1..4095_u16).prop_map(|id| VlanMatch::Id(VlanId::try_from(id).expect("a VLAN"))),
        ],
    );
    let port = prop::option::of(prop::sample::select(vec![
        PortRef::vf(0),
        PortRef::vf(1),
        PortRef::Uplink(0),
    ]));
    let dscp = prop::option::weighted(0.2, (0..64_u8).prop_map(DscpMatch));
    let ct = masked(prop::sample::select(vec![
        (CtStates::TRACKED, CtStates::TRACKED | CtStates::NEW),
        (CtStates::TRACKED | CtStates::REPLY, CtStates::all()),
    ]));
    let flags = masked(any::<(u8, u8)>().prop_map(|(value, mask)| {
        (
            TcpFlags::from_bits_retain(value & mask),
            TcpFlags::from_bits_retain(mask),
        )
    }));
    let ethertype = prop::option::weighted(
        0.3,
        prop::sample::select(vec![EtherType::IPV4, EtherType::IPV6, EtherType::ARP]),
    );
    let first = (port, mac(), mac(), vlan, pair, protocols, fragments);
    let second = (range(), range(), dscp, ct, flags, ethertype);
    (first, second).prop_map(
        |((port, eth_src, eth_dst, vlan, (ip_src, ip_dst), ip_proto, fragment), second)| {
            let (l4_src, l4_dst, dscp, ct_state, tcp_flags, ethertype) = second;
            let has_ports =
                ip_proto.is_some_and(IpProtocol::has_ports) && fragment != Some(FragmentMatch::Later);
            Pattern {
                port,
                eth_src,
                eth_dst,
                ethertype,
                vlan,
                vni: None,
                ip_src,
                ip_dst,
                ip_proto,
                dscp,
                fragment,
                l4_src: l4_src.filter(|_| has_ports),
                l4_dst: l4_dst.filter(|_| has_ports),
                tcp_flags: tcp_flags.filter(|_| ip_proto == Some(IpProtocol::TCP)),
                mark: None,
                ct_state,
            }
        },
    )
}

fn actions() -> impl Strategy<Value = Vec<Action>> {
    let step = prop_oneof![
        Just(Action::PopVlan),
        (1..4095_u16).prop_map(|id| Action::PushVlan(VlanId::try_from(id).expect("a VLAN"))),
        Just(Action::Mirror(PortRef::Uplink(0))),
        Just(Action::DecrementTtl),
        any::<[u8; 6]>().prop_map(|mac| Action::Rewrite(RewriteField::EthDst(MacAddr(mac)))),
        any::<[u8; 4]>().prop_map(|address| Action::Rewrite(RewriteField::IpSrc(address.into()))),
        any::<[u8; 16]>().prop_map(|address| Action::Rewrite(RewriteField::IpDst(address.into()))),
        any::<u16>().prop_map(|port| Action::Rewrite(RewriteField::L4Dst(port))),
        (0..64_u8).prop_map(|dscp| Action::Rewrite(RewriteField::Dscp(dscp))),
        any::<u16>().prop_map(|zone| Action::Conntrack(Conntrack {
            zone: CtZone(zone),
            commit: true
        })),
        Just(Action::Meter(dpumesh_core::steering::MeterId(0))),
        Just(Action::Count),
    ];
    let end = prop_oneof![
        Just(Action::Drop),
        Just(Action::ToKernel),
        Just(Action::Punt),
        Just(Action::Forward(PortRef::vf(1))),
        (1..9_u32).prop_map(|group| Action::Jump(Group(group))),
    ];
    (prop::collection::vec(step, 0..4), end).prop_map(|(mut steps, end)| {
        steps.push(end);
        steps
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn actions_are_read_as_they_were_written(all in prop::collection::vec(steps(), 1..8), cookie in any::<u128>()) {
        let (found, found_cookie, _) = step::decode(&step::encode(&all, cookie)).expect("readable");
        prop_assert_eq!((found, found_cookie), (all, cookie));
    }

    #[test]
    fn a_rule_is_read_from_its_filters_as_it_was_given(
        pattern in patterns(),
        actions in actions(),
        priority in 0..8000_u32,
        placement in prop::sample::select(vec![PlacementRequest::Any, PlacementRequest::Hardware, PlacementRequest::Software]),
    ) {
        let mut rule = SteeringRule::new(Cookie(COOKIE), Owner::Agent, Priority(priority), pattern, actions);
        rule.placement = placement;
        let names = names();
        prop_assume!(rule.check().is_ok());
        let filters = filters_of(&rule, &names);
        prop_assume!(!filters.is_empty()); // it does not fit, and says so
        let read: Vec<Filter> = filters
            .iter()
            .map(|filter| Filter::read(&filter.add(BLOCK).body, BLOCK).expect("readable").filter)
            .collect();
        prop_assert_eq!(&read, &filters);
        let read: Vec<&Filter> = read.iter().collect();
        let found = parts::rule_of(&read, |_| Some(Owner::Agent), &names);
        prop_assert_eq!(found, Some(rule));
    }

    #[test]
    fn a_handle_is_unpacked_as_it_was_packed(
        part in 0..4_u8,
        count in prop::option::of(0..15_usize),
        explicit in any::<bool>(),
        asked in any::<bool>(),
        owner in 0..64_u8,
        number in 1..1_u32 << 18,
    ) {
        let handle = Handle { part, count, explicit, asked, owner, number };
        prop_assert_eq!(Handle::unpack(handle.pack()), handle);
    }

    #[test]
    fn priorities_keep_their_order(a in 0..8189_u32, b in 0..8189_u32, slots in (0..8_u8, 0..8_u8)) {
        prop_assert_eq!(priority_of(prio_of(a, slots.0)), Some((a, slots.0)));
        if a < b {
            prop_assert!(prio_of(a, slots.0) < prio_of(b, slots.1));
        }
    }

    #[test]
    fn no_answer_of_the_kernel_panics(octets in prop::collection::vec(any::<u8>(), 0..200)) {
        let head: Vec<u8> = [0, u32::MAX, 1, BLOCK, 0x0001_0300].iter().flat_map(|word: &u32| word.to_ne_bytes()).collect();
        let body = Writer::behind(head).text(1, "flower").put(2, &octets).finish();
        let _ = Filter::read(&body, BLOCK);
        let _ = step::decode(&octets);
    }
}
