//! Two real processes: all messages cross, a killed peer leaves an exact account, nothing is left behind.

use super::*;

/// The second process; killed and reaped whatever happens to the test.
struct Peer {
    child: Child,
}

impl Peer {
    fn kill(&mut self) {
        self.child.kill().unwrap();
    }

    /// Waits for it; whatever it waits for itself is bounded.
    fn succeeds(mut self) {
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Fails only when it has exited already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// In the first process: starts the second for the test of this name, and opens the channel it offers. In the
/// second: plays `role` on its channel and returns nothing.
fn with_peer(test: &str, role: impl FnOnce(Channel)) -> Option<(Channel, Peer)> {
    if let Some(path) = env::var_os(ROLE) {
        role(connect(path, &options()).unwrap());
        return None;
    }
    let folder = tempfile::tempdir().unwrap();
    let listener = Listener::bind(folder.path().join("channel"), Limits::default()).unwrap();
    let child = Command::new(env::current_exe().unwrap())
        .args([
            &format!("shm::tests::two_processes::{test}"),
            "--exact",
            "--test-threads=1",
        ])
        .env(ROLE, listener.path())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let peer = Peer { child };
    assert!(
        socket::wait_readable(listener.fd(), PATIENCE).unwrap(),
        "the peer connects"
    );
    let incoming = listener.accept().unwrap().unwrap();
    assert_eq!(incoming.peer().pid as u32, peer.child.id());
    Some((incoming.finish(PATIENCE).unwrap(), peer))
}

/// The messages of one direction, the same in both processes.
struct Flow {
    state: u64,
}

impl Flow {
    fn fill(&mut self, message: &mut Vec<u8>) {
        message.clear();
        let len = self.draw() % 200;
        message.extend((0..len).map(|_| self.draw() as u8));
    }

    fn draw(&mut self) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state >> 11
    }
}

/// Sends `count` messages and receives as many, both at once and each compared; returns a sum over all octets
/// received, or the error that ended it. Calls `progress` with the number received so far.
fn exchange(
    channel: &mut Channel,
    count: u64,
    (out, back): (u64, u64),
    mut progress: impl FnMut(u64),
) -> Result<u64, ShmError> {
    let (mut outgoing, mut incoming) = (Flow { state: out }, Flow { state: back });
    let (mut sent, mut received, mut sum) = (0, 0, 0u64);
    let mut batch = vec![Vec::new(); 16];
    let (mut slots, mut expected) = (vec![Vec::new(); 16], Vec::new());
    let mut pending: Vec<Vec<u8>> = Vec::new();
    let deadline = Instant::now() + PATIENCE;
    while sent < count || received < count {
        assert!(Instant::now() < deadline, "{sent} sent, {received} received");
        if pending.is_empty() {
            let size = (count - sent).min(batch.len() as u64) as usize;
            batch[..size]
                .iter_mut()
                .for_each(|message| outgoing.fill(message));
            pending.extend_from_slice(&batch[..size]);
        }
        let slices: Vec<&[u8]> = pending.iter().map(Vec::as_slice).collect();
        let put = channel.send(&slices)?;
        let wanted = (count - received).min(slots.len() as u64) as usize;
        let taken = channel.recv(&mut slots[..wanted])?;
        pending.drain(..put);
        sent += put as u64;
        received += taken as u64;
        progress(received);
        for slot in &slots[..taken] {
            incoming.fill(&mut expected);
            assert_eq!(*slot, expected);
            sum = slot
                .iter()
                .fold(sum, |sum, octet| sum.rotate_left(5) ^ u64::from(*octet));
        }
        if put == 0 && taken == 0 {
            let writable = pending.first().map(Vec::len);
            channel.wait(
                Interest {
                    readable: received < count,
                    writable,
                },
                TICK,
            )?;
        }
    }
    Ok(sum)
}

#[test]
fn a_hundred_thousand_messages_cross_both_ways() {
    const COUNT: u64 = 100_000;
    let (there, back) = (0x9e37_79b9_7f4a_7c15, 0xc2b2_ae3d_27d4_eb4f);
    let peer = with_peer("a_hundred_thousand_messages_cross_both_ways", |mut channel| {
        let sum = exchange(&mut channel, COUNT, (back, there), |_| ()).unwrap();
        while channel.send(&[&sum.to_le_bytes()]).unwrap() == 0 {
            channel
                .wait(
                    Interest {
                        readable: false,
                        writable: Some(8),
                    },
                    TICK,
                )
                .unwrap();
        }
        assert_eq!(next(&mut channel).unwrap(), b"bye");
    });
    let Some((mut channel, peer)) = peer else { return };
    exchange(&mut channel, COUNT, (there, back), |_| ()).unwrap();
    let theirs = next(&mut channel).unwrap();
    let mut flow = Flow { state: there };
    let (mut sum, mut message) = (0u64, Vec::new());
    for _ in 0..COUNT {
        flow.fill(&mut message);
        sum = message
            .iter()
            .fold(sum, |sum, octet| sum.rotate_left(5) ^ u64::from(*octet));
    }
    assert_eq!(theirs, sum.to_le_bytes());
    assert_eq!(channel.send(&[b"bye"]).unwrap(), 1);
    peer.succeeds();
}

#[test]
fn a_killed_peer_leaves_an_exact_account() {
    let peer = with_peer("a_killed_peer_leaves_an_exact_account", |mut channel| {
        for _ in 0..7 {
            next(&mut channel).unwrap();
        }
        channel.send(&[b"took seven"]).unwrap();
        while channel.is_peer_alive().unwrap() {
            channel.wait(Interest::default(), TICK).unwrap();
        }
    });
    let Some((mut channel, mut peer)) = peer else {
        return;
    };
    let messages: Vec<Vec<u8>> = (0..20).map(|len| vec![1; len]).collect();
    let slices: Vec<&[u8]> = messages.iter().map(Vec::as_slice).collect();
    assert_eq!(channel.send(&slices).unwrap(), 20);
    assert_eq!(next(&mut channel).unwrap(), b"took seven");
    peer.kill();
    let expected = InFlight {
        messages: 13,
        bytes: (7..20).sum(),
    };
    let error = end_of(&mut channel);
    assert!(
        matches!(error, ShmError::PeerGone { in_flight } if in_flight == expected),
        "{error}"
    );
}

#[test]
fn a_peer_killed_in_mid_transfer_is_noticed_and_harms_nothing() {
    let (there, back) = (0x2545_f491_4f6c_dd1d, 0x1234_5678_9abc_def1);
    for round in 1..=5 {
        let peer = with_peer(
            "a_peer_killed_in_mid_transfer_is_noticed_and_harms_nothing",
            |mut channel| {
                exchange(&mut channel, u64::MAX, (back, there), |_| ()).unwrap_err();
            },
        );
        let Some((mut channel, mut peer)) = peer else {
            return;
        };
        let kill = |received| {
            if received > round * 777 {
                peer.kill();
            }
        };
        let error = exchange(&mut channel, u64::MAX, (there, back), kill).unwrap_err();
        let ShmError::PeerGone { in_flight } = error else {
            panic!("{error}")
        };
        assert!(in_flight.messages <= channel.stats().sent && in_flight.bytes <= 4096);
    }
}

#[test]
fn a_hundred_channels_leave_no_descriptor_and_no_mapping() {
    if env::var_os(ROLE).is_none() {
        let child = Command::new(env::current_exe().unwrap())
            .args(["shm::tests::two_processes::a_hundred_channels_leave_no_descriptor_and_no_mapping"])
            .args(["--exact", "--test-threads=1"])
            .env(ROLE, "alone")
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        return Peer { child }.succeeds();
    }
    let held = || {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        (
            std::fs::read_dir("/proc/self/fd").unwrap().count(),
            maps.matches("dpumesh").count(),
        )
    };
    let folder = tempfile::tempdir().unwrap();
    let before = held();
    for round in 0..100 {
        let listener = Listener::bind(folder.path().join("channel"), Limits::default()).unwrap();
        let path = listener.path().to_owned();
        let connecting = std::thread::spawn(move || connect(path, &options()));
        assert!(socket::wait_readable(listener.fd(), PATIENCE).unwrap());
        let mut near = listener.accept().unwrap().unwrap().finish(PATIENCE).unwrap();
        let mut far = connecting.join().unwrap().unwrap();
        near.send(&[b"message"]).unwrap();
        assert_eq!(next(&mut far).unwrap(), b"message");
        // A refused offer must leave nothing behind either.
        if round % 10 == 0 {
            let huge = Options {
                ring_bytes: 1 << 30,
                ..options()
            };
            assert!(Channel::pair(&huge).is_err());
            let (one, two) = socket::pair().unwrap();
            let one = Socket::adopt(one).unwrap();
            one.send(&[0; 64], &[one.as_fd(), one.as_fd()]).unwrap();
            assert!(Channel::answer(two, &Limits::default(), TICK).is_err());
        }
    }
    assert_eq!(held(), before);
}
