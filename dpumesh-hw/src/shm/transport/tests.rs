//! What the conformance kit cannot see: sockets of the dead, folders of others, peers given up in the middle, and limits
//! against a peer that does not keep them.

use std::os::unix::fs::PermissionsExt;

use tempfile::TempDir;
use tokio::time::timeout;

use super::*;

const WITHIN: Duration = Duration::from_secs(10);

/// Makes claims that cannot be kept.
type Spoil = fn(&mut TransportCapabilities);

fn claims(channels: u32) -> TransportCapabilities {
    let mut claims = SocketTransport::usual_capabilities();
    claims.channels = channels;
    claims
}

fn transport(folder: &TempDir, channels: u32) -> SocketTransport {
    SocketTransport::new(folder.path().join("channels"), claims(channels)).unwrap()
}

fn name(text: &str) -> ChannelName {
    ChannelName::try_from(text.to_owned()).unwrap()
}

fn kind<T>(outcome: Result<T>) -> Option<ErrorKind> {
    outcome.err().map(|error| error.kind)
}

/// Both ends of a channel between two transports, as between two processes.
async fn meet(
    near: &SocketTransport,
    listener: &mut dyn ShmListener,
    at: &ChannelName,
) -> Result<(Box<dyn ShmChannel>, Box<dyn ShmChannel>)> {
    let config = ChannelConfig::default();
    let both = async { tokio::try_join!(near.connect(at, &config), listener.accept()) };
    timeout(WITHIN, both).await.expect("in time")
}

/// Polls a future once and gives it up.
async fn given_up(future: impl Future) {
    let mut future = std::pin::pin!(future);
    std::future::poll_fn(|context| {
        let _ = future.as_mut().poll(context);
        std::task::Poll::Ready(())
    })
    .await;
}

#[tokio::test]
async fn a_dead_process_s_name_is_free_and_a_living_one_s_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let (near, far) = (transport(&folder, 4), transport(&folder, 4));
    let at = name("proxy");
    // As a killed process leaves it: the socket closed, its file still there.
    let file = folder.path().join("channels/proxy");
    drop(std::os::unix::net::UnixListener::bind(&file).unwrap());
    assert!(file.exists());
    let config = ChannelConfig::default();
    assert_eq!(kind(near.connect(&at, &config).await), Some(ErrorKind::NotFound));

    let mut listener = far.listen(&at).await.unwrap();
    assert_eq!(kind(near.listen(&at).await), Some(ErrorKind::Exists));
    meet(&near, &mut *listener, &at).await.unwrap();
    drop(listener);
    assert!(!file.exists());
    near.listen(&at).await.unwrap();
}

#[tokio::test]
async fn many_that_want_a_dead_process_s_name_make_one_listener() {
    let folder = tempfile::tempdir().unwrap();
    let at = name("proxy");
    let transports: Vec<_> = (0..8).map(|_| transport(&folder, 1)).collect();
    drop(std::os::unix::net::UnixListener::bind(folder.path().join("channels/proxy")).unwrap());
    let mut tries = tokio::task::JoinSet::new();
    for transport in transports {
        let at = at.clone();
        tries.spawn(async move { transport.listen(&at).await });
    }
    let outcomes = tries.join_all().await;
    assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 1);
    assert!(
        outcomes
            .iter()
            .filter_map(|outcome| outcome.as_ref().err())
            .all(|error| error.kind == ErrorKind::Exists)
    );
}

#[tokio::test]
async fn a_folder_with_a_long_path_takes_the_longest_name() {
    let folder = tempfile::tempdir().unwrap();
    let deep = folder.path().join("d".repeat(200));
    let transport = SocketTransport::new(&deep, claims(2)).unwrap();
    assert_eq!(
        std::fs::metadata(&deep).unwrap().permissions().mode() & 0o777,
        0o700
    );
    let at = name(&"n".repeat(64));
    let mut listener = transport.listen(&at).await.unwrap();
    meet(&transport, &mut *listener, &at).await.unwrap();
}

#[test]
fn a_folder_open_to_others_is_denied_and_claims_that_cannot_be_kept_are_invalid() {
    let folder = tempfile::tempdir().unwrap();
    let open = |claims| SocketTransport::new(folder.path(), claims);
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    assert_eq!(kind(open(claims(1))), Some(ErrorKind::Denied));
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
    open(claims(1)).unwrap();
    let bad: [(&str, Spoil); 5] = [
        ("channels", |claims| claims.channels = 0),
        ("max_ring", |claims| claims.max_ring = 5000),
        ("max_message", |claims| claims.max_message = claims.max_ring),
        ("max_message", |claims| claims.max_message = 0),
        ("messages", |claims| {
            (claims.messages, claims.streams) = (false, false)
        }),
    ];
    for (field, spoil) in bad {
        let mut claims = claims(1);
        spoil(&mut claims);
        let error = open(claims).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Invalid);
        assert_eq!(error.object.as_ref().unwrap().field, field);
    }
}

#[tokio::test]
async fn what_is_given_up_in_the_middle_frees_its_place() {
    let folder = tempfile::tempdir().unwrap();
    let (near, far) = (transport(&folder, 1), transport(&folder, 1));
    let at = name("patient");
    let mut listener = far.listen(&at).await.unwrap();
    for _ in 0..50 {
        given_up(near.connect(&at, &ChannelConfig::default())).await;
        given_up(listener.accept()).await;
    }
    assert_eq!(near.connected.available_permits(), 1);
    // What was given up may still be in the queue, or accepted and dead: none of it keeps the next from coming.
    let config = ChannelConfig::default();
    let accepting = async {
        loop {
            drop(listener.accept().await.unwrap());
        }
    };
    let connecting = async {
        loop {
            match kind(near.connect(&at, &config).await) {
                Some(ErrorKind::CapacityExceeded) => tokio::time::sleep(Duration::from_millis(1)).await,
                outcome => return outcome,
            }
        }
    };
    tokio::select! {
        outcome = connecting => assert_eq!(outcome, None),
        () = accepting => {}
        () = tokio::time::sleep(WITHIN) => panic!("not in time"),
    }
    assert_eq!(near.connected.available_permits(), 1);
}

#[tokio::test]
async fn the_accepting_side_keeps_its_limits_against_any_peer() {
    let folder = tempfile::tempdir().unwrap();
    let (generous, mut strict) = (transport(&folder, 64), claims(2));
    (strict.streams, strict.max_ring, strict.max_message) = (false, 1 << 21, 1 << 17);
    let strict = SocketTransport::new(folder.path().join("channels"), strict).unwrap();
    let at = name("strict");
    let mut listener = strict.listen(&at).await.unwrap();
    let accepting = async {
        let mut ends = Vec::new();
        loop {
            ends.push(listener.accept().await.unwrap());
        }
    };
    let connecting = async {
        let good = ChannelConfig::default();
        let stream = ChannelConfig {
            mode: ChannelMode::Stream,
            ..good
        };
        let large = ChannelConfig {
            ring: 1 << 22,
            ..good
        };
        assert_eq!(
            kind(generous.connect(&at, &stream).await),
            Some(ErrorKind::Unsupported)
        );
        assert_eq!(
            kind(generous.connect(&at, &large).await),
            Some(ErrorKind::Invalid)
        );
        let mut two = Vec::new();
        while two.len() < 2 {
            // Those refused above give their places back a moment after they were told.
            match generous.connect(&at, &good).await {
                Ok(end) => two.push(end),
                Err(error) => assert_eq!(error.kind, ErrorKind::CapacityExceeded, "{error}"),
            }
        }
        let error = generous.connect(&at, &good).await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::CapacityExceeded);
        assert_eq!(error.object.as_ref().unwrap().name, "transport.channels");
    };
    tokio::select! {
        () = connecting => {}
        () = accepting => {}
        () = tokio::time::sleep(WITHIN) => panic!("not in time"),
    }
}

/// A silent peer costs its own timeout and nobody else's time.
#[tokio::test]
async fn silent_peers_delay_nobody() {
    let folder = tempfile::tempdir().unwrap();
    let transport = transport(&folder, 16);
    let at = name("busy");
    let mut listener = transport.listen(&at).await.unwrap();
    let _silent: Vec<_> = (0..4)
        .map(|_| reach(&transport.folder.path(&at)).unwrap())
        .collect();
    let begun = Instant::now();
    meet(&transport, &mut *listener, &at).await.unwrap();
    assert!(begun.elapsed() < PATIENCE, "{:?}", begun.elapsed());
    // Neither does the end of the offer wait for them.
    drop(listener);
    assert_eq!(transport.connected.available_permits(), 16);
}

/// A reset, which only a peer outside the contract sends, ends the channel for good.
#[tokio::test]
async fn a_reset_ends_the_channel() {
    let folder = tempfile::tempdir().unwrap();
    let transport = transport(&folder, 1);
    let at = name("reset");
    let mut listener = transport.listen(&at).await.unwrap();
    let path = transport.folder.path(&at);
    let peer = tokio::task::spawn_blocking(move || super::super::connect(path, &Options::default()));
    let mut end = timeout(WITHIN, listener.accept()).await.unwrap().unwrap();
    let mut peer = peer.await.unwrap().unwrap();
    peer.reset().unwrap();
    assert!(!end.arm().unwrap());
    for _ in 0..3 {
        assert_eq!(kind(end.receive(&mut [0; 8])), Some(ErrorKind::PeerMisbehaved));
        assert_eq!(kind(end.send(&[b"x"])), Some(ErrorKind::PeerMisbehaved));
    }
    assert!(!end.peer().alive);
}

#[tokio::test]
async fn a_run_of_a_stream_is_written_in_place_or_not_at_all() {
    let folder = tempfile::tempdir().unwrap();
    let transport = transport(&folder, 1);
    let at = name("stream");
    let mut listener = transport.listen(&at).await.unwrap();
    let config = ChannelConfig {
        mode: ChannelMode::Stream,
        ring: 64,
        max_message: 7,
    };
    let (mut near, mut far) = tokio::try_join!(transport.connect(&at, &config), listener.accept()).unwrap();
    assert_eq!(near.config(), far.config());
    let write = |near: &mut Box<dyn ShmChannel>, len: usize| {
        near.send_with(len, &mut |writer| {
            assert_eq!(writer.write(&[len as u8; 100]), len);
            assert_eq!(writer.remaining(), 0);
        })
    };
    assert!(write(&mut near, 0).unwrap());
    assert!(write(&mut near, 40).unwrap());
    assert!(!write(&mut near, 30).unwrap());
    assert_eq!(kind(write(&mut near, 65)), Some(ErrorKind::Invalid));
    assert!(near.arm().unwrap(), "there is no room for 30");
    let mut buffer = [0; 100];
    assert_eq!(far.receive(&mut buffer).unwrap(), Some(40));
    assert_eq!(buffer[..40], [40; 40]);
    assert!(!near.arm().unwrap(), "room is told");
    assert!(near.arm().unwrap(), "once");
    // Across the end of the ring.
    assert!(write(&mut near, 50).unwrap());
    assert_eq!(far.receive(&mut buffer).unwrap(), Some(50));
    assert_eq!(buffer[..50], [50; 50]);
}
