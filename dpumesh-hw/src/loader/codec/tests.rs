//! What is put is got again, whatever the memory backend makes of it; sizes of version 1.0 are kept.

use std::net::IpAddr;

use dpumesh_core::offload::{Connection, ConnectionKind, ConnectionLeg};
use dpumesh_core::steering::{
    Action, Conntrack, Cookie, Counters, CtStates, CtZone, DscpMatch, Encapsulation, EtherType,
    FragmentMatch, Group, IpMatch, IpProtocol, Masked, MeterId, Owner, Pattern, PlacementRequest, Priority,
    RewriteField, SteeringRule, TcpFlags, TunnelKind, VlanMatch,
};
use dpumesh_core::{Effect, Error, ErrorKind, Event, MacAddr, Retry, VlanId, Vni};
use proptest::prelude::*;

use super::*;
use crate::loader::arena::{Arena, Reader, Sized32, blank_error, terminate, terminated};

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn every_action() -> Vec<Action> {
    let vni = Vni::try_from(77).expect("a VNI");
    let encapsulation = Encapsulation {
        kind: TunnelKind::Geneve,
        vni,
        local: ip("2001:db8::1"),
        remote: ip("2001:db8::2"),
        eth_src: MacAddr([2, 0, 0, 0, 0, 1]),
        eth_dst: MacAddr([2, 0, 0, 0, 0, 2]),
    };
    vec![
        Action::Encapsulate(encapsulation),
        Action::Decapsulate(TunnelKind::Vxlan),
        Action::Rewrite(RewriteField::EthSrc(MacAddr([2; 6]))),
        Action::Rewrite(RewriteField::EthDst(MacAddr([4; 6]))),
        Action::Rewrite(RewriteField::IpSrc(ip("10.0.0.1"))),
        Action::Rewrite(RewriteField::IpDst(ip("2001:db8::9"))),
        Action::Rewrite(RewriteField::L4Src(80)),
        Action::Rewrite(RewriteField::L4Dst(65_535)),
        Action::Rewrite(RewriteField::Dscp(46)),
        Action::DecrementTtl,
        Action::PushVlan(VlanId::try_from(9).expect("a tag")),
        Action::PopVlan,
        Action::Mark(u32::MAX),
        Action::Count,
        Action::Mirror(PortRef::Uplink(1)),
        Action::Meter(MeterId(5)),
        Action::Conntrack(Conntrack {
            zone: CtZone(3),
            commit: true,
        }),
        Action::Drop,
        Action::Forward(PortRef::vf(3)),
        Action::Punt,
        Action::ToKernel,
        Action::Queue(7),
        Action::Rss(vec![1, 2, 3]),
        Action::Jump(Group(4)),
    ]
}

fn every_field() -> Pattern {
    let masked = |value, mask| Some(Masked { value, mask });
    Pattern {
        port: Some(PortRef::Stack(2)),
        eth_src: Some(Masked {
            value: MacAddr([1; 6]),
            mask: MacAddr([255; 6]),
        }),
        eth_dst: Some(Masked {
            value: MacAddr([2; 6]),
            mask: MacAddr([0xf0; 6]),
        }),
        ethertype: Some(EtherType::IPV6),
        vlan: Some(VlanMatch::Untagged),
        vni: Vni::try_from(1).ok(),
        ip_src: Some(IpMatch::Prefix("10.1.0.0/16".parse().expect("a prefix"))),
        ip_dst: Some(IpMatch::Masked(Masked {
            value: ip("2001:db8::1"),
            mask: ip("ffff::ffff"),
        })),
        ip_proto: Some(IpProtocol::SCTP),
        dscp: Some(DscpMatch(63)),
        fragment: Some(FragmentMatch::Later),
        l4_src: Some(80.into()),
        l4_dst: Some(dpumesh_core::steering::PortRange { first: 1, last: 9 }),
        tcp_flags: Some(Masked {
            value: TcpFlags::SYN,
            mask: TcpFlags::all(),
        }),
        mark: masked(1, 3),
        ct_state: Some(Masked {
            value: CtStates::NEW,
            mask: CtStates::all(),
        }),
    }
}

fn rule() -> SteeringRule {
    let mut rule = SteeringRule::new(
        Cookie(u128::MAX - 5),
        Owner::User(9),
        Priority(3),
        every_field(),
        every_action(),
    );
    rule.placement = PlacementRequest::Software;
    rule.idle_timeout_ms = Some(1000);
    rule.in_group(Group(1))
}

#[test]
fn every_field_and_action_of_a_rule_crosses() {
    let mut arena = Arena::growing();
    let raw = put_rule(&rule(), &mut arena);
    assert_eq!(get_rule(&raw, &Reader::trusting()), Ok(rule()));
}

#[test]
fn senseless_timeouts_cross_so_that_the_backend_can_refuse_them() {
    for timeout in [None, Some(0), Some(1), Some(u32::MAX - 1)] {
        let rule = SteeringRule {
            idle_timeout_ms: timeout,
            ..rule()
        };
        let raw = put_rule(&rule, &mut Arena::growing());
        let mut arena = Arena::growing();
        let again = put_rule(&rule, &mut arena);
        assert_eq!(raw.idle_timeout_ms, again.idle_timeout_ms);
        assert_eq!(
            get_rule(&again, &Reader::trusting()).map(|rule| rule.idle_timeout_ms),
            Ok(timeout)
        );
    }
}

#[test]
fn numbers_that_mean_nothing_are_named() {
    let mut arena = Arena::growing();
    let mut raw = put_rule(&rule(), &mut arena);
    raw.placement = 9;
    assert_eq!(
        get_rule(&raw, &Reader::trusting()).expect_err("no such placement"),
        "rule.placement is 9, which means nothing"
    );
    let mut pattern = dm_pattern::empty();
    pattern.fields = 1 << 30;
    raw.pattern = &raw const pattern;
    assert!(
        get_rule(&raw, &Reader::trusting())
            .expect_err("a field")
            .contains("pattern.fields has bits")
    );
    assert!(get_port(NO_PORT, "port").is_err());
}

#[test]
fn what_points_elsewhere_is_refused() {
    let mut arena = Arena::growing();
    let raw = put_rule(&rule(), &mut arena);
    let room = [0_u8; 64];
    let error = get_rule(&raw, &Reader::within(room.as_ptr(), room.len())).expect_err("outside");
    assert!(error.contains("points outside of the call's arena"), "{error}");
    let mut raw = raw;
    raw.pattern = std::ptr::null();
    assert_eq!(
        get_rule(&raw, &Reader::trusting()).expect_err("null"),
        "rule.pattern is null"
    );
}

#[test]
fn a_shorter_struct_is_filled_up_and_a_longer_one_cut() {
    #[repr(C)]
    struct Longer {
        known: dm_slot,
        later: u64,
    }
    let mut longer = Longer {
        known: dm_slot::empty(),
        later: 7,
    };
    longer.known.slot = 3;
    longer.known.size = size_of::<Longer>() as u32;
    let read = Reader::trusting()
        .one(&raw const longer.known, "slot")
        .expect("known part");
    assert_eq!((read.slot, longer.later), (3, 7));
    longer.known.size = 4;
    let error = Reader::trusting()
        .one(&raw const longer.known, "slot")
        .expect_err("too short");
    assert_eq!(error, "slot: dm_slot of size 4, it has at least 8 octets");
}

#[test]
fn an_error_crosses_with_all_it_tells() {
    let error = Error::new(ErrorKind::CapacityExceeded, "steering.apply", "full")
        .object("steering.rules")
        .field("group")
        .index(7)
        .effect(Effect::Partial)
        .retry(Retry::AfterReset)
        .vendor_code(-22)
        .backend("vendor")
        .source(std::io::Error::other("the SDK said -22"));
    let got = get_error(&put_error(&error), "steering.apply", "vendor").expect("an error");
    assert_eq!(got, error);
    let source = std::error::Error::source(&got).map(ToString::to_string);
    assert_eq!(source.as_deref(), Some("the SDK said -22"));
}

#[test]
fn long_texts_are_cut_at_a_character() {
    let error = Error::new(ErrorKind::Io, "x", "ä".repeat(1000));
    let got = get_error(&put_error(&error), "x", "").expect("an error");
    assert_eq!(got.message, "ä".repeat(159));
    let mut octets = [1; 4];
    assert!(
        terminated(&octets, "text")
            .expect_err("no end")
            .contains("does not end within its 4 octets")
    );
    terminate(&mut octets, "abcdef");
    assert_eq!(terminated(&octets, "text"), Ok("abc".to_owned()));
}

#[test]
fn events_cross() {
    let counters = Counters {
        packets: 1,
        octets: 2,
        epoch: dpumesh_core::Epoch(3),
        idle_ms: None,
    };
    let ailment = Error::new(ErrorKind::Fault, "backend.health", "too hot").backend("vendor");
    for event in [
        Event::Link {
            port: PortRef::Uplink(0),
            up: true,
        },
        Event::Health(None),
        Event::Health(Some(ailment)),
        Event::HighWater {
            resource: "steering.rules".to_owned(),
            used: 9,
            limit: 10,
        },
        Event::Aged {
            owner: Owner::Proxy,
            rules: vec![(Cookie(1), None), (Cookie(2), Some(counters))],
        },
        Event::VfAdded(PortRef::vf(1)),
        Event::VfRemoved(PortRef::vf(2)),
        Event::Overflowed(17),
    ] {
        let (mut arena, mut error) = (Arena::growing(), blank_error());
        let raw = put_event(&event, &raw mut *error, &mut arena).expect("sayable");
        assert_eq!(get_event(&raw, &error, "vendor", &Reader::trusting()), Ok(event));
    }
}

#[test]
fn connections_cross() {
    let leg = |local: &str, remote: &str| ConnectionLeg {
        port: PortRef::vf(1),
        local: local.parse().expect("an address"),
        remote: remote.parse().expect("an address"),
        send_next: u32::MAX,
        receive_next: 1,
    };
    let connection = Connection {
        downstream: leg("10.0.0.1:80", "10.0.0.2:40000"),
        upstream: leg("[fe80::1%5]:15006", "[2001:db8::2]:443"),
        kind: ConnectionKind::TlsRecords,
    };
    let got = get_connection(&put_connection(&connection)).expect("a connection");
    assert_eq!(got.connection, connection);
}

/// These sizes are what libraries in the field send: appending to a struct does not change its `LEAST`.
#[test]
fn version_one_has_these_sizes() {
    fn told<T: Sized32>() -> (usize, usize) {
        (T::LEAST, size_of::<T>())
    }
    let sizes = [
        told::<dm_ops>(),
        told::<dm_error>(),
        told::<dm_call>(),
        told::<dm_info>(),
        told::<dm_capabilities>(),
        told::<dm_rule>(),
        told::<dm_pattern>(),
        told::<dm_action>(),
        told::<dm_outcome>(),
        told::<dm_event>(),
    ];
    assert_eq!(DM_ABI_MINOR, 0, "with the first addition this test compares `<=`");
    assert!(sizes.iter().all(|(least, now)| least == now), "{sizes:?}");
}

proptest! {
    /// Whatever a library writes into a rule, reading it is an answer or an error, never anything else.
    #[test]
    fn no_rule_of_a_library_does_harm(octets in prop::collection::vec(any::<u8>(), 4096), cut in 0..4096_usize) {
        let words: Vec<u128> = octets.chunks(16).map(|c| u128::from_le_bytes(c.try_into().expect("16"))).collect();
        let base: *const u8 = words.as_ptr().cast();
        let reader = Reader::within(base, cut);
        let at = base.wrapping_add(cut % 64 * 16).cast::<dm_rule>();
        if let Ok(mut raw) = reader.one(at, "rule") {
            raw.actions.len %= 64;
            let _ = get_rule(&raw, &reader);
        }
    }
}
