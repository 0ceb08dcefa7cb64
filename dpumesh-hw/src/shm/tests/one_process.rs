//! Two ends in one process: batches, streams, doorbells, sleeping, and an end that goes.

use super::*;

#[test]
fn both_directions_carry_messages_in_batches() {
    let (mut near, mut far) = pair();
    assert_eq!(near.send(&[b"one", b"", b"three"]).unwrap(), 3);
    assert_eq!(far.send(&[b"back"]).unwrap(), 1);
    let mut slots = vec![Vec::new(); 8];
    assert_eq!(far.recv(&mut slots).unwrap(), 3);
    assert_eq!(slots[..3], [b"one".to_vec(), Vec::new(), b"three".to_vec()]);
    let (mut buffer, mut lengths) = ([0; 16], [0; 4]);
    assert_eq!(near.recv_packed(&mut buffer, &mut lengths).unwrap(), 1);
    assert_eq!(&buffer[..lengths[0]], b"back");
    assert_eq!(
        (near.stats().sent, near.stats().received, near.stats().doorbells),
        (3, 1, 0)
    );
}

#[test]
fn a_stream_carries_octets_both_ways() {
    let stream = Options {
        mode: Mode::Stream,
        ..options()
    };
    let (mut near, mut far) = Channel::pair(&stream).unwrap();
    let octets: Vec<u8> = (0..100_000u32).map(|at| (at / 7) as u8).collect();
    let (mut there, mut back) = (Vec::new(), Vec::new());
    let mut buffer = [0; 1500];
    while back.len() < octets.len() {
        near.write(&[&octets[near.stats().sent as usize..]]).unwrap();
        let count = far.read(&mut buffer).unwrap();
        there.extend_from_slice(&buffer[..count]);
        far.write(&[&there[far.stats().sent as usize..]]).unwrap();
        let count = near.read(&mut buffer).unwrap();
        back.extend_from_slice(&buffer[..count]);
    }
    assert_eq!(back, octets);
}

#[test]
fn a_sleeper_is_woken_by_each_message_and_nobody_rings_for_one_awake() {
    let (mut near, mut far) = pair();
    let echo = std::thread::spawn(move || {
        for _ in 0..2000 {
            let message = next(&mut far).unwrap();
            assert_eq!(far.send(&[&message]).unwrap(), 1);
        }
    });
    for round in 0..2000u32 {
        assert_eq!(near.send(&[&round.to_le_bytes()]).unwrap(), 1);
        assert_eq!(next(&mut near).unwrap(), round.to_le_bytes());
    }
    echo.join().unwrap();
    assert!(near.stats().doorbells <= 2000);
    let (mut near, mut far) = pair();
    for _ in 0..1000 {
        near.send(&[b"message"]).unwrap();
        recv_one(&mut far).unwrap().unwrap();
    }
    assert_eq!((near.stats().doorbells, far.stats().doorbells), (0, 0));
}

#[test]
fn a_sender_that_waits_for_room_is_woken() {
    let (mut near, mut far) = pair();
    let message = [7; 256];
    while near.send(&[&message]).unwrap() == 1 {}
    let room = Interest {
        readable: false,
        writable: Some(256),
    };
    assert!(near.want_notify(room).unwrap());
    assert!(!socket::wait_readable(near.fd(), Duration::ZERO).unwrap());
    recv_one(&mut far).unwrap().unwrap();
    assert!(socket::wait_readable(near.fd(), TICK).unwrap());
    assert!(
        !near.want_notify(room).unwrap(),
        "there is room: no reason to sleep"
    );
    assert_eq!(near.send(&[&message]).unwrap(), 1);
    let too_long = Interest {
        readable: false,
        writable: Some(257),
    };
    assert!(matches!(
        near.want_notify(too_long),
        Err(ShmError::Ring(RingError::MessageTooLong { len: 257, max: 256 }))
    ));
}

#[test]
fn an_old_doorbell_does_not_wake_again() {
    let (mut near, mut far) = pair();
    assert!(far.want_notify(Interest::READABLE).unwrap());
    near.send(&[b"message"]).unwrap();
    assert!(socket::wait_readable(far.fd(), TICK).unwrap());
    recv_one(&mut far).unwrap().unwrap();
    assert!(far.want_notify(Interest::READABLE).unwrap());
    assert!(!socket::wait_readable(far.fd(), Duration::from_millis(5)).unwrap());
}

#[test]
fn the_descriptor_works_inside_an_edge_triggered_epoll() {
    use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
    let (mut near, mut far) = pair();
    let outer = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
    outer
        .add(
            far.fd(),
            EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 0),
        )
        .unwrap();
    let woken = |millis: u16| outer.wait(&mut [EpollEvent::empty()], millis).unwrap();
    for round in 0..100u8 {
        assert!(far.want_notify(Interest::READABLE).unwrap());
        assert_eq!(woken(0), 0);
        near.send(&[&[round]]).unwrap();
        assert_eq!(woken(1000), 1);
        assert_eq!(recv_one(&mut far).unwrap().unwrap(), [round]);
    }
    assert!(far.want_notify(Interest::READABLE).unwrap());
    drop(near);
    assert_eq!(woken(1000), 1);
}

#[test]
fn what_a_gone_peer_left_is_received_before_its_end_is_said() {
    let (mut near, mut far) = pair();
    near.send(&[b"lost", b"lost too"]).unwrap();
    far.send(&[b"first", b"second"]).unwrap();
    assert!(near.is_peer_alive().unwrap());
    drop(far);
    assert!(!near.is_peer_alive().unwrap());
    assert_eq!(next(&mut near).unwrap(), b"first");
    assert_eq!(next(&mut near).unwrap(), b"second");
    for _ in 0..3 {
        let expected = InFlight {
            messages: 2,
            bytes: 12,
        };
        assert!(
            matches!(recv_one(&mut near), Err(ShmError::PeerGone { in_flight }) if in_flight == expected)
        );
        assert!(matches!(near.send(&[b"x"]), Err(ShmError::PeerGone { .. })));
        assert!(!near.want_notify(Interest::READABLE).unwrap());
        assert!(socket::wait_readable(near.fd(), Duration::ZERO).unwrap());
    }
}

#[test]
fn one_who_only_polls_notices_the_end() {
    let (mut near, far) = pair();
    drop(far);
    let polls = (0..1000).take_while(|_| recv_one(&mut near).is_ok()).count();
    assert!(polls < 100, "{polls}");
    let (mut near, far) = pair();
    while near.send(&[&[0; 200]]).unwrap() == 1 {}
    drop(far);
    let polls = (0..1000).take_while(|_| near.send(&[&[0; 200]]).is_ok()).count();
    assert!(polls < 100, "{polls}");
}

#[test]
fn the_peer_is_known_by_the_kernels_word() {
    let (near, _far) = pair();
    assert_eq!(near.peer().pid as u32, std::process::id());
    assert_eq!(near.peer().uid, nix::unistd::geteuid().as_raw());
}

#[test]
fn a_channel_may_move_to_another_thread() {
    fn moves<T: Send + 'static>(_: &T) {}
    let (near, far) = pair();
    moves(&near);
    std::thread::spawn(move || drop(far)).join().unwrap();
}
