//! What an answering end says to every wrong offer, and an offering one to a refusal.

use super::{
    super::{Refusal, region::page, sealed_memory, socket},
    *,
};

const SHORT: Duration = Duration::from_millis(200);

/// Lets `answer` face what `peer` sends, and returns its error and the refusal the peer got, if any.
fn answered(peer: impl FnOnce(&Socket)) -> (ShmError, Option<Refusal>) {
    let (near, far) = socket::pair().unwrap();
    let (near, far) = (Socket::adopt(near).unwrap(), Socket::adopt(far).unwrap());
    peer(&far);
    let error = answer(near, &Limits::default(), SHORT).unwrap_err();
    let mut refusal = None;
    for _ in 0..2 {
        if let Err(ShmError::Refused(reason)) =
            Message::expect(&far, "refuse", Instant::now() + Duration::from_millis(1))
        {
            refusal = Some(reason);
        }
    }
    (error, refusal)
}

fn hello() -> Message {
    Message::hello(&Limits::default())
}

fn plan() -> Plan {
    Plan::draw(Mode::Stream, 4096)
}

/// An honest offer's region and bells.
fn descriptors(plan: &Plan) -> [OwnedFd; 3] {
    let memory = sealed_memory("test", plan.region_bytes()).unwrap();
    let region = Region::map(&memory, plan.region_bytes()).unwrap();
    plan.rings().iter().for_each(|ring| ring.format(&region).unwrap());
    let bell = || Doorbell::new().unwrap().as_fd().try_clone_to_owned().unwrap();
    [memory, bell(), bell()]
}

fn send_offer(socket: &Socket, message: &Message, descriptors: &[OwnedFd]) {
    hello().send(socket, &[]).unwrap();
    let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    message.send(socket, &borrowed).unwrap();
}

#[test]
fn an_honest_offer_is_answered() {
    let (near, far) = socket::pair().unwrap();
    let far = Socket::adopt(far).unwrap();
    let plan = plan();
    send_offer(&far, &Message::offer(1, &plan), &descriptors(&plan));
    answer(Socket::adopt(near).unwrap(), &Limits::default(), SHORT).unwrap();
}

#[test]
fn a_peer_of_another_version_is_refused_with_both_ranges() {
    for theirs in [(2u16, 9u16), (0, 0), (5, 1)] {
        let (error, refusal) = answered(|peer| {
            let mut message = hello();
            message.put(16, &theirs.0.to_le_bytes());
            message.put(18, &theirs.1.to_le_bytes());
            message.send(peer, &[]).unwrap();
        });
        assert!(
            matches!(error, ShmError::WrongVersion { ours: VERSIONS, theirs: seen } if seen == theirs),
            "{error}"
        );
        assert_eq!(refusal, Some(Refusal::Version));
    }
    let (error, _) = answered(|peer| send_offer(peer, &Message::offer(2, &plan()), &[]));
    assert!(
        matches!(
            error,
            ShmError::Malformed {
                what: "offer",
                field: "version",
                value: 2
            }
        ),
        "{error}"
    );
}

#[test]
fn a_hello_or_offer_of_any_other_length_is_refused() {
    for len in (1..MESSAGE_BYTES).chain([MESSAGE_BYTES + 1, 4096]) {
        let mut octets = hello().octets.to_vec();
        octets.resize(len, 0);
        let (error, refusal) = answered(|peer| peer.send(&octets, &[]).unwrap());
        assert!(
            matches!(error, ShmError::Truncated { what: "hello", got, .. } if got == len),
            "{error}"
        );
        assert_eq!(refusal, Some(Refusal::Malformed));
        let (error, _) = answered(|peer| {
            hello().send(peer, &[]).unwrap();
            peer.send(&octets, &[]).unwrap();
        });
        assert!(
            matches!(error, ShmError::Truncated { what: "offer", .. }),
            "{error}"
        );
    }
}

#[test]
fn a_strange_message_is_refused_by_field() {
    let (error, _) = answered(|peer| peer.send(&[0; MESSAGE_BYTES], &[]).unwrap());
    assert!(
        matches!(
            error,
            ShmError::Malformed {
                field: "magic",
                value: 0,
                ..
            }
        ),
        "{error}"
    );
    let (error, _) = answered(|peer| Message::ready(1).send(peer, &[]).unwrap());
    assert!(
        matches!(
            error,
            ShmError::Malformed {
                what: "hello",
                field: "kind",
                value: 3
            }
        ),
        "{error}"
    );
    let (error, _) = answered(|peer| {
        let mut message = hello();
        message.put(8, &77u32.to_le_bytes());
        message.send(peer, &[]).unwrap();
    });
    assert!(
        matches!(
            error,
            ShmError::Malformed {
                field: "kind",
                value: 77,
                ..
            }
        ),
        "{error}"
    );
    let (error, _) = answered(|peer| {
        let mut message = Message::offer(1, &plan());
        message.put(32, &3u32.to_le_bytes());
        send_offer(peer, &message, &descriptors(&plan()));
    });
    assert!(
        matches!(
            error,
            ShmError::Malformed {
                what: "offer",
                field: "mode",
                value: 3
            }
        ),
        "{error}"
    );
}

#[test]
fn missing_extra_and_unexpected_descriptors_are_refused() {
    for count in [0, 1, 2, 4, 6] {
        let plan = plan();
        let mut sent: Vec<OwnedFd> = descriptors(&plan).into();
        sent.extend(descriptors(&plan));
        sent.truncate(count);
        let (error, refusal) = answered(|peer| send_offer(peer, &Message::offer(1, &plan), &sent));
        assert!(
            matches!(error, ShmError::WrongDescriptors { what: "offer", got, expected: 3 } if got == count),
            "{error}"
        );
        assert_eq!(refusal, Some(Refusal::Descriptors));
    }
    let bell = Doorbell::new().unwrap();
    let (error, _) = answered(|peer| hello().send(peer, &[bell.as_fd()]).unwrap());
    assert!(
        matches!(
            error,
            ShmError::WrongDescriptors {
                what: "hello",
                got: 1,
                expected: 0
            }
        ),
        "{error}"
    );
}

#[test]
fn descriptors_of_another_kind_are_refused() {
    let plan = plan();
    let null = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
    for swapped in 0..3 {
        let mut sent = descriptors(&plan);
        sent[swapped] = null();
        let (error, refusal) = answered(|peer| send_offer(peer, &Message::offer(1, &plan), &sent));
        assert!(matches!(error, ShmError::WrongKind { .. }), "{error}");
        assert_eq!(
            refusal,
            Some(if swapped == 0 {
                Refusal::Region
            } else {
                Refusal::Descriptors
            })
        );
    }
}

#[test]
fn a_region_that_is_unsealed_or_of_another_size_is_refused() {
    use nix::sys::memfd::{MFdFlags, memfd_create};
    let plan = plan();
    let mut sent = descriptors(&plan);
    sent[0] = memfd_create(c"foreign", MFdFlags::MFD_ALLOW_SEALING).unwrap();
    nix::unistd::ftruncate(&sent[0], plan.region_bytes() as i64).unwrap();
    let (error, refusal) = answered(|peer| send_offer(peer, &Message::offer(1, &plan), &sent));
    assert!(matches!(error, ShmError::NotSealed { .. }), "{error}");
    assert_eq!(refusal, Some(Refusal::Region));

    sent[0] = sealed_memory("test", page()).unwrap();
    let (error, refusal) = answered(|peer| send_offer(peer, &Message::offer(1, &plan), &sent));
    assert!(matches!(error, ShmError::WrongSize { .. }), "{error}");
    assert_eq!(refusal, Some(Refusal::Region));

    let mut message = Message::offer(1, &plan);
    message.put(48, &1u64.to_le_bytes());
    let (error, _) = answered(|peer| send_offer(peer, &message, &descriptors(&plan)));
    assert!(
        matches!(error, ShmError::WrongSize { announced: 1, .. }),
        "{error}"
    );
}

#[test]
fn a_region_of_another_connection_is_refused_by_its_cookie() {
    let sent = descriptors(&plan());
    let (error, _) = answered(|peer| send_offer(peer, &Message::offer(1, &plan()), &sent));
    let lie = ShmError::Ring(crate::ring::RingError::PeerMisbehaved {
        field: "cookie",
        value: 0,
    });
    assert!(
        error.is_misbehaviour() && error.to_string().starts_with(&lie.to_string()[..28]),
        "{error}"
    );
}

#[test]
fn what_exceeds_a_limit_is_refused_with_the_limit() {
    let big = Plan::draw(Mode::Stream, 128 << 20);
    let (error, refusal) = answered(|peer| send_offer(peer, &Message::offer(1, &big), &[]));
    assert!(
        matches!(
            error,
            ShmError::OverLimit {
                field: "ring size",
                whose: "own",
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(refusal, Some(Refusal::Limits));
    let long = Plan::draw(Mode::Messages { max_len: 32 << 20 }, 64 << 20);
    let (error, _) = answered(|peer| send_offer(peer, &Message::offer(1, &long), &[]));
    assert!(
        matches!(
            error,
            ShmError::OverLimit {
                field: "message length",
                whose: "own",
                ..
            }
        ),
        "{error}"
    );
    let (error, _) = answered(|peer| {
        let mut message = hello();
        message.put(24, &1u32.to_le_bytes());
        message.send(peer, &[]).unwrap();
    });
    assert!(
        matches!(
            error,
            ShmError::OverLimit {
                field: "rings",
                whose: "peer's",
                ..
            }
        ),
        "{error}"
    );
    let odd = Plan::draw(Mode::Stream, 4095);
    let (error, _) = answered(|peer| {
        let memory = sealed_memory("test", odd.region_bytes()).unwrap();
        let bells = descriptors(&plan());
        let [_, one, two] = bells;
        send_offer(peer, &Message::offer(1, &odd), &[memory, one, two]);
    });
    assert!(error.to_string().contains("capacity"), "{error}");
}

#[test]
fn a_peer_that_hangs_up_or_says_nothing_is_named() {
    let (near, far) = socket::pair().unwrap();
    drop(far);
    let error = answer(Socket::adopt(near).unwrap(), &Limits::default(), SHORT).unwrap_err();
    assert!(matches!(error, ShmError::Closed("reader")), "{error}");
    let (near, _far) = socket::pair().unwrap();
    let error = answer(
        Socket::adopt(near).unwrap(),
        &Limits::default(),
        Duration::from_millis(5),
    )
    .unwrap_err();
    assert!(matches!(error, ShmError::Timeout("hello")), "{error}");
    let (error, _) = answered(|peer| hello().send(peer, &[]).unwrap());
    assert!(matches!(error, ShmError::Timeout("offer")), "{error}");
}

#[test]
fn the_offering_end_learns_why_it_was_refused() {
    let (near, far) = socket::pair().unwrap();
    let far = Socket::adopt(far).unwrap();
    hello().send(&far, &[]).unwrap();
    Message::refuse(Refusal::Region).send(&far, &[]).unwrap();
    let error = offer(Socket::adopt(near).unwrap(), &Options::default()).unwrap_err();
    assert!(matches!(error, ShmError::Refused(Refusal::Region)), "{error}");

    let (near, far) = socket::pair().unwrap();
    let far = Socket::adopt(far).unwrap();
    Message::hello(&Limits {
        max_ring_bytes: 4096,
        max_message: 64,
        ..Limits::default()
    })
    .send(&far, &[])
    .unwrap();
    let error = offer(Socket::adopt(near).unwrap(), &Options::default()).unwrap_err();
    assert!(
        matches!(
            error,
            ShmError::OverLimit {
                field: "ring size",
                whose: "peer's",
                limit: 4096,
                ..
            }
        ),
        "{error}"
    );
}
