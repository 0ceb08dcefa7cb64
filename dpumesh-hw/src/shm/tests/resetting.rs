//! Resets: what is lost is said, crossing ones are one, nothing of an old generation is ever delivered.

use super::*;

#[test]
fn a_reset_empties_both_directions_and_says_what_is_lost() {
    let (mut near, mut far) = pair();
    near.send(&[b"gone", b"gone"]).unwrap();
    far.send(&[b"lost"]).unwrap();
    assert_eq!(
        near.reset().unwrap(),
        InFlight {
            messages: 2,
            bytes: 8
        }
    );
    assert!(near.is_resetting().unwrap());
    assert_eq!(near.send(&[b"too early"]).unwrap(), 0);
    assert!(recv_one(&mut near).unwrap().is_none());
    assert!(!far.want_notify(Interest::READABLE).unwrap());
    let lost = InFlight {
        messages: 1,
        bytes: 4,
    };
    assert!(matches!(recv_one(&mut far), Err(ShmError::Reset { generation: 2, lost: said }) if said == lost));
    assert_eq!(far.send(&[b"new"]).unwrap(), 1);
    assert!(!near.is_resetting().unwrap());
    assert_eq!(next(&mut near).unwrap(), b"new");
    assert_eq!(near.send(&[b"new"]).unwrap(), 1);
    assert_eq!(next(&mut far).unwrap(), b"new");
    assert_eq!((near.generation(), far.generation()), (2, 2));
}

#[test]
fn resets_that_cross_are_one() {
    let (mut near, mut far) = pair();
    near.reset().unwrap();
    far.reset().unwrap();
    assert!(!near.is_resetting().unwrap());
    assert_eq!(near.send(&[b"early"]).unwrap(), 1);
    assert!(!far.is_resetting().unwrap());
    assert_eq!(next(&mut far).unwrap(), b"early");
    assert_eq!((near.generation(), far.generation()), (2, 2));
}

#[test]
fn a_reset_and_then_the_end_are_both_said() {
    let (mut near, mut far) = pair();
    far.send(&[b"lost"]).unwrap();
    near.reset().unwrap();
    drop(near);
    assert!(far.is_peer_alive().unwrap(), "its reset has to be said first");
    assert!(matches!(
        end_of(&mut far),
        ShmError::Reset {
            lost: InFlight { messages: 1, .. },
            ..
        }
    ));
    assert!(matches!(end_of(&mut far), ShmError::PeerGone { .. }));
    let (mut near, far) = pair();
    near.send(&[b"lost"]).unwrap();
    drop(far);
    assert!(matches!(
        near.reset(),
        Err(ShmError::PeerGone {
            in_flight: InFlight { messages: 1, .. }
        })
    ));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]
    #[test]
    fn within_a_generation_nothing_is_lost_or_late(steps in proptest::collection::vec((any::<bool>(), 0u8..12), 1..150)) {
        let (near, far) = pair();
        let mut ends = [Numbered::new(near), Numbered::new(far)];
        for (which, step) in steps {
            let end = &mut ends[usize::from(which)];
            let outcome = match step {
                0 => end.channel.reset().map(drop),
                1 => end.channel.is_resetting().map(drop),
                2..=6 => end.send(),
                _ => end.recv(),
            };
            prop_assert!(matches!(outcome, Ok(()) | Err(ShmError::Reset { .. })), "{:?}", outcome);
        }
    }
}

/// An end whose messages say their generation and their number in it.
struct Numbered {
    channel: Channel,
    generation: u32,
    sent: u32,
    received: u32,
}

impl Numbered {
    fn new(channel: Channel) -> Self {
        Self {
            channel,
            generation: 1,
            sent: 0,
            received: 0,
        }
    }

    fn send(&mut self) -> Result<(), ShmError> {
        self.channel.is_resetting()?;
        self.follow();
        let message = [self.generation.to_le_bytes(), self.sent.to_le_bytes()].concat();
        self.sent += self.channel.send(&[&message])? as u32;
        Ok(())
    }

    fn recv(&mut self) -> Result<(), ShmError> {
        let received = recv_one(&mut self.channel)?;
        self.follow();
        if let Some(message) = received {
            assert_eq!(
                message,
                [self.generation.to_le_bytes(), self.received.to_le_bytes()].concat()
            );
            self.received += 1;
        }
        Ok(())
    }

    /// Numbers start again with each generation.
    fn follow(&mut self) {
        if self.generation != self.channel.generation() {
            (self.sent, self.received) = (0, 0);
            self.generation = self.channel.generation();
        }
    }
}
