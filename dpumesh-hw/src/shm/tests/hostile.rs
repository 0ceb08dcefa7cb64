//! Peers that write anything anywhere, in memory and on the socket: clean errors, no hang.

use super::*;

/// An honest end, and everything a peer has in its hands.
fn victim() -> (Channel, Agreed) {
    victim_of(&options())
}

fn victim_of(options: &Options) -> (Channel, Agreed) {
    let (near, far) = socket::pair().unwrap();
    std::thread::scope(|scope| {
        let peer = scope.spawn(|| handshake::offer(Socket::adopt(far).unwrap(), options).unwrap());
        (
            Channel::answer(near, &options.limits, PATIENCE).unwrap(),
            peer.join().unwrap(),
        )
    })
}

/// Clean: what a peer can cause, and nothing else.
fn is_clean(error: &ShmError) -> bool {
    matches!(error, ShmError::Ring(RingError::PeerMisbehaved { .. }))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]
    #[test]
    fn a_peer_that_scribbles_over_everything_gets_a_clean_error(
        seed in 1u64..,
        stream in any::<bool>(),
        // Everything; only data, where lengths lie; only flags; only the indices.
        area in 0usize..4,
    ) {
        let mode = if stream { Mode::Stream } else { options().mode };
        let (mut channel, peer) = victim_of(&Options { mode, ..options() });
        let memory = Arc::clone(peer.tx.memory());
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| scribble(&*memory, seed, area, &stop));
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| bother(&mut channel, mode)));
            stop.store(true, Ordering::Relaxed);
            match outcome {
                Ok(Some(error)) => prop_assert!(is_clean(&error), "{error}"),
                Ok(None) => {}
                Err(panic) => std::panic::resume_unwind(panic),
            }
            Ok(())
        })?;
    }
}

fn scribble(memory: &impl Memory, mut seed: u64, area: usize, stop: &AtomicBool) {
    let ring = layout::CONTROL_BYTES + options().ring_bytes as usize;
    let mut draw = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    while !stop.load(Ordering::Relaxed) {
        let (place, value) = (draw() as usize, draw());
        let base = (place & 1) * ring;
        let at = match area {
            0 => (place >> 1) % (memory.len() / 8) * 8,
            1 => base + layout::CONTROL_BYTES + (place >> 1) % 512 * 8,
            2 => base + [layout::WANT_DATA, layout::WANT_SPACE][(place >> 1) % 2],
            _ => base + [layout::TAIL, layout::HEAD][(place >> 1) % 2],
        };
        // Some values small and some near the real indices, so that they get past the first check.
        let value = match value % 4 {
            0 => value >> 2,
            1 => (value >> 2) % 300,
            2 => layout::pack(1, layout::START.wrapping_add((value >> 2) as u32 % 4096 / 8 * 8)),
            _ => 0,
        };
        memory.store(at, value, Ordering::Relaxed);
    }
}

/// Uses the channel for a bounded number of calls, or until it fails.
fn bother(channel: &mut Channel, mode: Mode) -> Option<ShmError> {
    let (mut slots, mut octets) = (vec![Vec::new(); 8], [0; 700]);
    for call in 0..3000 {
        let outcome = match (mode, call % 6) {
            (_, 0) => channel.in_flight().map(drop),
            (_, 1) => channel
                .want_notify(Interest {
                    readable: true,
                    writable: Some(200),
                })
                .map(drop),
            (Mode::Stream, 2 | 3) => channel.write(&[&[1; 300], &[2; 300]]).map(drop),
            (Mode::Stream, _) => channel.read(&mut octets).map(drop),
            (_, 2 | 3) => channel.send(&[&[1; 100], &[], &[2; 256]]).map(drop),
            (_, 4) => channel.recv_packed(&mut octets, &mut [0; 8]).map(drop),
            (_, _) => channel
                .recv(&mut slots)
                .map(|count| assert!(slots[..count].iter().all(|slot| slot.len() <= 256))),
        };
        if let Err(error) = outcome {
            let again = channel.send(&[b"x"]).unwrap_err();
            assert_eq!(
                again.to_string(),
                error.to_string(),
                "a poisoned channel stays poisoned"
            );
            return Some(error);
        }
    }
    None
}

#[test]
fn rubbish_on_the_socket_poisons_the_channel() {
    let rubbish: [&[u8]; 4] = [b"x", &[0; 64], &[0xff; 64], &[0; 300]];
    for message in rubbish {
        let (mut channel, peer) = victim();
        peer.socket.send(message, &[]).unwrap();
        assert!(is_clean(&channel.is_peer_alive().unwrap_err()));
        assert!(is_clean(&recv_one(&mut channel).unwrap_err()));
        assert!(is_clean(&channel.want_notify(Interest::READABLE).unwrap_err()));
        assert!(is_clean(&channel.reset().unwrap_err()));
    }
    let (mut channel, peer) = victim();
    let gift = peer.own_bell.as_fd();
    handshake::Message::reset(handshake::Kind::Reset, 2)
        .send(&peer.socket, &[gift])
        .unwrap();
    assert!(
        is_clean(&channel.is_peer_alive().unwrap_err()),
        "descriptors are no part of a reset"
    );
}

#[test]
fn a_reset_that_makes_no_sense_poisons_the_channel() {
    use handshake::{Kind, Message};
    for (kind, generation) in [
        (Kind::Reset, 1),
        (Kind::Reset, 3),
        (Kind::ResetDone, 2),
        (Kind::Hello, 2),
    ] {
        let (mut channel, peer) = victim();
        Message::reset(kind, generation).send(&peer.socket, &[]).unwrap();
        let error = channel.is_peer_alive().unwrap_err();
        assert!(is_clean(&error), "{error}");
    }
}

#[test]
fn a_peer_that_never_reads_its_socket_cannot_hold_us() {
    let (mut channel, mut peer) = victim();
    let mut generation = 1;
    let started = Instant::now();
    let ended = (0..100_000).find_map(|_| {
        generation += 1;
        handshake::Message::reset(handshake::Kind::Reset, generation)
            .send(&peer.socket, &[])
            .unwrap();
        let noticed = channel.is_peer_alive();
        peer.tx.restart(generation);
        peer.rx.restart(generation);
        match (noticed, recv_one(&mut channel)) {
            (Ok(_), Err(ShmError::Reset { .. })) => None,
            (Err(error), _) => Some(error),
            (_, outcome) => panic!("{outcome:?}"),
        }
    });
    assert!(
        matches!(
            ended,
            Some(ShmError::Os {
                operation: "sendmsg",
                ..
            })
        ),
        "{ended:?}"
    );
    assert!(started.elapsed() < PATIENCE);
}

#[test]
fn a_doorbell_made_blocking_is_a_lie_and_no_hang() {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let (mut channel, mut peer) = victim();
    assert!(peer.rx.want_data().unwrap());
    nix::unistd::write(&peer.own_bell, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    fcntl(&peer.own_bell, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
    let error = channel.send(&[b"message"]).unwrap_err();
    assert!(matches!(
        error,
        ShmError::Ring(RingError::PeerMisbehaved {
            field: "doorbell flags",
            ..
        })
    ));
}
