//! Channels over shared memory: the sentences of [`dpumesh_core::ShmTransport`].

use std::time::Duration;

use dpumesh_core::transport::{ChannelConfig, ChannelMode, ChannelName, ShmChannel, ShmListener};
use dpumesh_core::{BackendExt, Error, ErrorKind, ShmTransport, TransportCapabilities};

use super::Rig;
use super::check::{CaseResult, Halt, ensure, ensure_eq, refused};
use super::ports::readable;

const WITHIN: Duration = Duration::from_secs(2);

fn name(text: &str) -> Result<ChannelName, Halt> {
    ChannelName::try_from(text.to_owned()).map_err(|error| Halt::failed(error.to_string()))
}

/// A name that no other run on this machine uses.
fn fresh_name(rig: &dyn Rig, text: &str) -> Result<ChannelName, Halt> {
    let _ = rig;
    static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    name(&format!("conform-{}-{number}-{text}", std::process::id()))
}

/// A small channel that the card claims to offer.
fn config(claims: &TransportCapabilities, mode: ChannelMode) -> ChannelConfig {
    let ring = claims.max_ring.min(4096);
    ChannelConfig {
        mode,
        ring,
        max_message: claims.max_message.min(ring / 4),
    }
}

/// Both ends of a channel, and the listener it came from.
pub(super) struct Pair {
    pub(super) near: Box<dyn ShmChannel>,
    pub(super) far: Box<dyn ShmChannel>,
    listener: Box<dyn ShmListener>,
}

async fn pair_of(rig: &dyn Rig, config: ChannelConfig) -> Result<Pair, Halt> {
    let soc = rig.soc();
    let transport = soc.require_transport()?;
    let name = fresh_name(rig, "pair")?;
    let mut listener = transport.listen(&name).await?;
    let (near, far) = meet(transport, &name, &config, &mut *listener).await?;
    Ok(Pair { near, far, listener })
}

/// Connects and accepts; gives up on one when the other fails.
async fn meet(
    transport: &dyn ShmTransport,
    name: &ChannelName,
    config: &ChannelConfig,
    listener: &mut dyn ShmListener,
) -> Result<(Box<dyn ShmChannel>, Box<dyn ShmChannel>), Error> {
    tokio::try_join!(transport.connect(name, config), listener.accept())
}

pub(super) async fn pair(rig: &dyn Rig, mode: ChannelMode) -> Result<Pair, Halt> {
    let claims = rig.soc().capabilities().transport;
    pair_of(rig, config(&claims, mode)).await
}

/// Receives until something came, the peer is gone, or time is up.
async fn receive(channel: &mut dyn ShmChannel, buffer: &mut [u8]) -> Result<Option<usize>, Error> {
    let begun = std::time::Instant::now();
    loop {
        match channel.receive(buffer)? {
            Some(length) => return Ok(Some(length)),
            None if begun.elapsed() > WITHIN => return Ok(None),
            None => tokio::time::sleep(Duration::from_millis(1)).await,
        }
    }
}

async fn receives(channel: &mut dyn ShmChannel, expected: &[u8], what: &str) -> CaseResult {
    let mut buffer = vec![0; expected.len() + 64];
    let length = receive(channel, &mut buffer).await?;
    ensure_eq!(length, Some(expected.len()), "length of {what}");
    ensure!(
        buffer[..expected.len()] == *expected,
        "the octets of {what} changed"
    );
    Ok(())
}

pub(super) async fn messages_keep_boundaries_and_order(rig: &dyn Rig) -> CaseResult {
    let mut pair = pair(rig, ChannelMode::Messages).await?;
    let messages: [&[u8]; 4] = [b"first", b"2", b"the third of them", b"4"];
    ensure_eq!(pair.near.send(&messages)?, 4, "messages sent");
    for message in messages {
        receives(&mut *pair.far, message, "a message").await?;
    }
    ensure_eq!(pair.far.receive(&mut [0; 64])?, None, "an empty channel");
    Ok(())
}

pub(super) async fn a_channel_carries_both_ways(rig: &dyn Rig) -> CaseResult {
    let mut pair = pair(rig, ChannelMode::Messages).await?;
    pair.near.send(&[b"ping"])?;
    pair.far.send(&[b"pong"])?;
    receives(&mut *pair.far, b"ping", "what the connecting side sent").await?;
    receives(&mut *pair.near, b"pong", "what the listening side sent").await
}

pub(super) async fn a_message_of_the_agreed_length_passes_and_no_longer_one(rig: &dyn Rig) -> CaseResult {
    let mut pair = pair(rig, ChannelMode::Messages).await?;
    let longest = pair.near.config().max_message as usize;
    let (full, long) = (vec![7; longest], vec![8; longest + 1]);
    ensure_eq!(pair.near.send(&[&full])?, 1, "messages sent");
    receives(&mut *pair.far, &full, "the longest message").await?;
    let answer = pair.near.send(&[b"before", &long, b"behind"]);
    let kind = answer.map_err(|error| error.kind);
    ensure_eq!(kind, Err(ErrorKind::Invalid), "sending a message too long");
    receives(&mut *pair.far, b"before", "the message before it").await?;
    ensure_eq!(
        pair.far.receive(&mut [0; 64])?,
        None,
        "behind the refused message"
    );
    let kind = pair
        .near
        .send_with(longest + 1, &mut |_| {})
        .map_err(|error| error.kind);
    ensure_eq!(kind, Err(ErrorKind::Invalid), "writing a message too long");
    Ok(())
}

pub(super) async fn the_claimed_message_length_can_be_agreed(rig: &dyn Rig) -> CaseResult {
    let soc = rig.soc();
    let claims = soc.capabilities().transport;
    ensure!(
        claims.max_message > 0 && claims.max_ring > 0,
        "no message fits {claims:?}"
    );
    let largest = ChannelConfig {
        mode: ChannelMode::Messages,
        ring: claims.max_ring,
        max_message: claims.max_message,
    };
    let mut pair = pair_of(rig, largest).await?;
    let full = vec![5; claims.max_message as usize];
    ensure_eq!(pair.near.send(&[&full])?, 1, "messages sent");
    receives(&mut *pair.far, &full, "the longest message").await?;
    let Some(above) = claims.max_message.checked_add(1) else {
        return Ok(());
    };
    let name = fresh_name(rig, "above")?;
    let _listener = soc.require_transport()?.listen(&name).await?;
    let config = ChannelConfig {
        max_message: above,
        ..largest
    };
    let answer = soc.require_transport()?.connect(&name, &config).await;
    refused(answer, "transport.connect", ErrorKind::Invalid)?;
    Ok(())
}

pub(super) async fn sizes_out_of_range_are_invalid(rig: &dyn Rig) -> CaseResult {
    let soc = rig.soc();
    let claims = soc.capabilities().transport;
    let transport = soc.require_transport()?;
    let name = fresh_name(rig, "sizes")?;
    let _listener = transport.listen(&name).await?;
    let mode = if claims.messages {
        ChannelMode::Messages
    } else {
        ChannelMode::Stream
    };
    let good = config(&claims, mode);
    let mut bad = vec![ChannelConfig { ring: 0, ..good }];
    if claims.messages {
        bad.push(ChannelConfig {
            max_message: good.ring / 2 + 1,
            ..good
        });
        bad.push(ChannelConfig {
            max_message: 0,
            ..good
        });
    }
    if let Some(above) = claims.max_ring.checked_add(1) {
        bad.push(ChannelConfig { ring: above, ..good });
    }
    for config in bad {
        let answer = transport.connect(&name, &config).await;
        if let Ok(channel) = &answer {
            return Err(Halt::failed(format!(
                "{config:?} was taken as {:?}",
                channel.config()
            )));
        }
        refused(answer, "transport.connect", ErrorKind::Invalid)?;
    }
    Ok(())
}

pub(super) async fn both_ends_agree_on_a_ring_of_a_power_of_two(rig: &dyn Rig) -> CaseResult {
    let claims = rig.soc().capabilities().transport;
    let mode = if claims.messages {
        ChannelMode::Messages
    } else {
        ChannelMode::Stream
    };
    let asked = ChannelConfig {
        ring: 3000.min(claims.max_ring),
        max_message: 100,
        ..config(&claims, mode)
    };
    let pair = pair_of(rig, asked).await?;
    let agreed = pair.near.config();
    ensure_eq!(pair.far.config(), agreed, "config of the listening side");
    ensure_eq!(agreed.ring, asked.ring.next_power_of_two(), "ring");
    ensure_eq!(agreed.mode, asked.mode, "mode");
    if claims.messages {
        ensure_eq!(agreed.max_message, asked.max_message, "longest message");
    }
    Ok(())
}

pub(super) async fn an_unclaimed_mode_is_unsupported(rig: &dyn Rig) -> CaseResult {
    let soc = rig.soc();
    let claims = soc.capabilities().transport;
    ensure!(
        claims.messages || claims.streams,
        "a transport with neither messages nor streams"
    );
    let transport = soc.require_transport()?;
    let name = fresh_name(rig, "mode")?;
    let _listener = transport.listen(&name).await?;
    for (offered, mode) in [
        (claims.messages, ChannelMode::Messages),
        (claims.streams, ChannelMode::Stream),
    ] {
        if !offered {
            let answer = transport.connect(&name, &config(&claims, mode)).await;
            refused(answer, "transport.connect", ErrorKind::Unsupported)?;
        }
    }
    Ok(())
}

pub(super) async fn a_full_ring_takes_a_part_and_goes_on_later(rig: &dyn Rig) -> CaseResult {
    let mut pair = pair(rig, ChannelMode::Messages).await?;
    let config = pair.near.config();
    let size = (config.max_message as usize).min(200);
    let count = 2 * config.ring as usize / size;
    let messages: Vec<Vec<u8>> = (0..count).map(|i| vec![i as u8; size]).collect();
    let slices: Vec<&[u8]> = messages.iter().map(Vec::as_slice).collect();
    let mut sent = pair.near.send(&slices)?;
    ensure!(
        0 < sent && sent < count,
        "{sent} of {count} messages into a ring of half the room"
    );
    ensure_eq!(pair.near.send(&slices[sent..])?, 0, "messages into a full ring");
    let fits = pair.near.send_with(size, &mut |_| {})?;
    ensure!(!fits, "send_with found room in a full ring");
    for (i, message) in messages.iter().enumerate() {
        receives(&mut *pair.far, message, &format!("message {i}")).await?;
        if sent < count {
            sent += pair.near.send(&slices[sent..])?;
        }
    }
    ensure_eq!(sent, count, "messages sent in all");
    Ok(())
}

pub(super) async fn a_stream_keeps_every_octet(rig: &dyn Rig) -> CaseResult {
    let mut pair = pair(rig, ChannelMode::Stream).await?;
    let total = 3 * pair.near.config().ring as usize + 17;
    let octets: Vec<u8> = (0..total).map(|i| (i * 31 % 251) as u8).collect();
    let (mut sent, mut found) = (0, Vec::with_capacity(total));
    let mut buffer = [0; 331];
    let mut idle = 0;
    while found.len() < total {
        let rest = &octets[sent..];
        let (one, two) = rest.split_at(rest.len().min(100));
        let went = pair.near.send(&[one, &[], two])?;
        ensure!(went <= rest.len(), "{went} octets sent of {}", rest.len());
        sent += went;
        let got = pair.far.receive(&mut buffer)?;
        ensure!(got != Some(0), "a receive of no octets");
        idle = if got.is_none() && went == 0 { idle + 1 } else { 0 };
        ensure!(
            idle < 2000,
            "the stream stands still at {} of {total} octets",
            found.len()
        );
        if idle > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        found.extend_from_slice(&buffer[..got.unwrap_or(0)]);
    }
    ensure!(found == octets, "the octets of the stream changed");
    Ok(())
}

pub(super) async fn a_message_longer_than_the_buffer_stays(rig: &dyn Rig) -> CaseResult {
    let mut pair = pair(rig, ChannelMode::Messages).await?;
    pair.near.send(&[b"longer than four", b"next"])?;
    let kind = receive(&mut *pair.far, &mut [0; 4])
        .await
        .map_err(|error| error.kind);
    ensure_eq!(kind, Err(ErrorKind::Invalid), "receive into a buffer too small");
    receives(&mut *pair.far, b"longer than four", "the message that stayed").await?;
    receives(&mut *pair.far, b"next", "the next message").await
}

pub(super) async fn an_empty_message_is_a_message(rig: &dyn Rig) -> CaseResult {
    let mut pair = pair(rig, ChannelMode::Messages).await?;
    ensure_eq!(pair.near.send(&[b"", b"x", b""])?, 3, "messages sent");
    for expected in [&b""[..], b"x", b""] {
        receives(&mut *pair.far, expected, "a message").await?;
    }
    ensure_eq!(pair.far.receive(&mut [0; 64])?, None, "an empty channel");
    Ok(())
}

pub(super) async fn send_with_writes_one_message_of_exactly_its_length(rig: &dyn Rig) -> CaseResult {
    let mut pair = pair(rig, ChannelMode::Messages).await?;
    let mut calls = 0;
    let mut seen = (0, 0, 0, 0);
    let fits = pair.near.send_with(10, &mut |writer| {
        calls += 1;
        let room = writer.remaining();
        let first = writer.write(b"01234");
        let left = writer.remaining();
        seen = (room, first, left, writer.write(b"56789too much"));
    })?;
    ensure!(fits, "no room in an empty ring");
    ensure_eq!(calls, 1, "calls of fill");
    ensure_eq!(
        seen,
        (10, 5, 5, 5),
        "room, written, room left, written of too much"
    );
    receives(&mut *pair.far, b"0123456789", "the message").await
}

pub(super) async fn send_with_fills_only_what_it_will_send(rig: &dyn Rig) -> CaseResult {
    let mut pair = pair(rig, ChannelMode::Messages).await?;
    let longest = pair.near.config().max_message as usize;
    let mut calls = 0;
    let full = vec![9; longest];
    let fits = pair.near.send_with(longest, &mut |writer| {
        calls += 1;
        writer.write(&full);
    })?;
    ensure!(
        fits && calls == 1,
        "a message of the agreed length was not written"
    );
    receives(&mut *pair.far, &full, "the longest message").await?;
    let answer = pair.near.send_with(longest + 1, &mut |_| calls += 1);
    ensure_eq!(
        answer.map_err(|error| error.kind),
        Err(ErrorKind::Invalid),
        "writing a message too long"
    );
    ensure_eq!(calls, 1, "calls of fill after a message too long");
    let mut sent = 0;
    while pair.near.send_with(longest, &mut |_| calls += 1)? {
        sent += 1;
        ensure_eq!(calls, 1 + sent, "calls of fill");
        ensure!(sent < 1_000_000, "the ring is never full");
    }
    ensure_eq!(calls, 1 + sent, "calls of fill when there is no room");
    // What fill leaves unwritten is unspecified, but the message is as long as was said.
    let mut buffer = vec![0; longest + 1];
    for _ in 0..sent {
        let length = receive(&mut *pair.far, &mut buffer).await?;
        ensure_eq!(length, Some(longest), "length of a message that fill left alone");
    }
    ensure_eq!(
        pair.far.receive(&mut buffer)?,
        None,
        "a message that was not sent"
    );
    Ok(())
}

pub(super) async fn arming_says_whether_to_sleep(rig: &dyn Rig) -> CaseResult {
    let mut pair = pair(rig, ChannelMode::Messages).await?;
    let far = pair.far.poll_fd();
    let far = far
        .try_clone_to_owned()
        .map_err(|error| Halt::failed(format!("the descriptor cannot be cloned: {error}")))?;
    // Until nothing old is left to do: a fresh channel may have a notification in flight.
    let mut armed = false;
    for _ in 0..100 {
        armed = pair.far.arm()?;
        if armed {
            break;
        }
        pair.far.receive(&mut [0; 64])?;
    }
    ensure!(armed, "an idle channel never lets its owner sleep");
    pair.near.send(&[b"wake up"])?;
    ensure!(
        readable(far, WITHIN).await?,
        "an armed channel is not woken by a message"
    );
    ensure!(!pair.far.arm()?, "arming says sleep although a message waits");
    receives(&mut *pair.far, b"wake up", "the message").await
}

pub(super) async fn room_wakes_an_armed_sender(rig: &dyn Rig) -> CaseResult {
    let mut pair = pair(rig, ChannelMode::Messages).await?;
    let size = (pair.near.config().max_message as usize).min(200);
    let message = vec![1; size];
    let mut sent = 0;
    while pair.near.send(&[&message])? == 1 {
        sent += 1;
        ensure!(sent < 1_000_000, "the ring is never full");
    }
    let near = pair.near.poll_fd();
    let near = near
        .try_clone_to_owned()
        .map_err(|error| Halt::failed(format!("the descriptor cannot be cloned: {error}")))?;
    let mut armed = false;
    for _ in 0..100 {
        armed = pair.near.arm()?;
        if armed {
            break;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    ensure!(armed, "a full channel never lets its owner sleep");
    for _ in 0..sent {
        receives(&mut *pair.far, &message, "a message").await?;
    }
    ensure!(
        readable(near, WITHIN).await?,
        "an armed sender is not woken by room"
    );
    ensure_eq!(pair.near.send(&[&message])?, 1, "messages sent into the room");
    Ok(())
}

pub(super) async fn in_flight_is_what_the_peer_has_not_taken(rig: &dyn Rig) -> CaseResult {
    let mut pair = pair(rig, ChannelMode::Messages).await?;
    ensure_eq!(
        pair.near.peer().in_flight,
        0,
        "octets in flight on a fresh channel"
    );
    ensure!(pair.near.peer().alive, "the peer of a fresh channel is dead");
    pair.near.send(&[b"0123456789", b"0123456789"])?;
    let two = pair.near.peer().in_flight;
    ensure!(two >= 20, "{two} octets in flight, 20 sent");
    receives(&mut *pair.far, b"0123456789", "the first message").await?;
    let one = pair.near.peer().in_flight;
    ensure!((10..two).contains(&one), "{one} octets in flight, 10 of 20 taken");
    receives(&mut *pair.far, b"0123456789", "the second message").await?;
    ensure_eq!(
        pair.near.peer().in_flight,
        0,
        "octets in flight when all were taken"
    );
    Ok(())
}

pub(super) async fn a_dead_peer_is_seen_and_what_it_sent_is_received(rig: &dyn Rig) -> CaseResult {
    let mut pair = pair(rig, ChannelMode::Messages).await?;
    pair.near.send(&[b"last", b"words"])?;
    pair.far.send(&[b"never taken"])?;
    let Pair { near, mut far, .. } = pair;
    let descriptor = far
        .poll_fd()
        .try_clone_to_owned()
        .map_err(|error| Halt::failed(format!("the descriptor cannot be cloned: {error}")))?;
    drop(near);
    ensure!(
        readable(descriptor, WITHIN).await?,
        "the descriptor stays silent though the peer is gone"
    );
    receives(&mut *far, b"last", "what it sent").await?;
    receives(&mut *far, b"words", "what it sent").await?;
    let kind = receive(&mut *far, &mut [0; 64]).await.map_err(|error| error.kind);
    ensure_eq!(kind, Err(ErrorKind::DeviceLost), "receive from a dead peer");
    let kind = far.send(&[b"anyone"]).map_err(|error| error.kind);
    ensure_eq!(kind, Err(ErrorKind::DeviceLost), "send to a dead peer");
    let state = far.peer();
    ensure!(!state.alive, "a dead peer is called alive");
    ensure!(
        state.in_flight >= 11,
        "{} octets in flight to the dead peer, 11 were sent",
        state.in_flight
    );
    Ok(())
}

pub(super) async fn a_name_in_use_exists(rig: &dyn Rig) -> CaseResult {
    let soc = rig.soc();
    let transport = soc.require_transport()?;
    let name = fresh_name(rig, "twice")?;
    let first = transport.listen(&name).await?;
    refused(
        transport.listen(&name).await,
        "transport.listen",
        ErrorKind::Exists,
    )?;
    drop(first);
    transport.listen(&name).await?;
    Ok(())
}

pub(super) async fn nobody_listening_is_not_found(rig: &dyn Rig) -> CaseResult {
    let soc = rig.soc();
    let transport = soc.require_transport()?;
    let name = fresh_name(rig, "nobody")?;
    let claims = soc.capabilities().transport;
    let mode = if claims.messages {
        ChannelMode::Messages
    } else {
        ChannelMode::Stream
    };
    let config = config(&claims, mode);
    let answer = transport.connect(&name, &config).await;
    refused(answer, "transport.connect", ErrorKind::NotFound)?;
    drop(transport.listen(&name).await?);
    let answer = transport.connect(&name, &config).await;
    refused(answer, "transport.connect", ErrorKind::NotFound)?;
    Ok(())
}

pub(super) async fn a_name_of_64_octets_is_taken(rig: &dyn Rig) -> CaseResult {
    let soc = rig.soc();
    let transport = soc.require_transport()?;
    let mut text: String = fresh_name(rig, "long")?.into();
    while text.len() < 64 {
        text.push(['.', '_', '-', 'Z'][text.len() % 4]);
    }
    let long = name(&text)?;
    let _listener = transport.listen(&long).await?;
    refused(
        transport.listen(&long).await,
        "transport.listen",
        ErrorKind::Exists,
    )?;
    for bad in ["", ".hidden", "a/b", "../up", &"x".repeat(65), "nul\0"] {
        ensure!(
            ChannelName::try_from(bad.to_owned()).is_err(),
            "`{bad}` passes as a channel name"
        );
    }
    Ok(())
}

pub(super) async fn channels_outlive_their_listener(rig: &dyn Rig) -> CaseResult {
    let Pair {
        mut near,
        mut far,
        listener,
    } = pair(rig, ChannelMode::Messages).await?;
    drop(listener);
    near.send(&[b"still here"])?;
    receives(&mut *far, b"still here", "a message").await?;
    ensure!(
        near.peer().alive && far.peer().alive,
        "a living peer is called dead"
    );
    Ok(())
}

pub(super) async fn a_listener_accepts_one_channel_per_peer(rig: &dyn Rig) -> CaseResult {
    let soc = rig.soc();
    let transport = soc.require_transport()?;
    let claims = soc.capabilities().transport;
    if claims.channels < 2 {
        return Err(Halt::not_supported("transport.channels", "only one at a time"));
    }
    let config = config(&claims, ChannelMode::Messages);
    let name = fresh_name(rig, "two")?;
    let mut listener = transport.listen(&name).await?;
    let mut ends = Vec::new();
    for text in [b"one", b"two"] {
        let (mut near, far) = meet(transport, &name, &config, &mut *listener).await?;
        near.send(&[text])?;
        ends.push((near, far));
    }
    for ((_, far), text) in ends.iter_mut().zip([b"one", b"two"]) {
        receives(&mut **far, text, "the message of its own peer").await?;
    }
    Ok(())
}

pub(super) async fn cancelling_accept_loses_no_peer(rig: &dyn Rig) -> CaseResult {
    let soc = rig.soc();
    let transport = soc.require_transport()?;
    let claims = soc.capabilities().transport;
    let config = config(&claims, ChannelMode::Messages);
    let name = fresh_name(rig, "patient")?;
    let mut listener = transport.listen(&name).await?;
    super::check::cancelled(listener.accept()).await;
    let accept = async {
        loop {
            // Given up and begun again until the peer is there.
            match tokio::time::timeout(Duration::from_millis(2), listener.accept()).await {
                Ok(answer) => return answer,
                Err(_) => tokio::task::yield_now().await,
            }
        }
    };
    let (mut near, mut far) = tokio::try_join!(transport.connect(&name, &config), accept)?;
    near.send(&[b"patience"])?;
    receives(&mut *far, b"patience", "the message").await
}

pub(super) async fn the_claimed_channels_can_be_had(rig: &dyn Rig) -> CaseResult {
    let soc = rig.soc();
    let transport = soc.require_transport()?;
    let claims = soc.capabilities().transport;
    ensure!(claims.channels > 0, "transport.channels is 0: none could be had");
    if claims.channels > 256 {
        return Err(Halt::not_supported(
            "transport.channels",
            format!("{} are claimed; the kit makes up to 256", claims.channels),
        ));
    }
    let mode = if claims.messages {
        ChannelMode::Messages
    } else {
        ChannelMode::Stream
    };
    let config = config(&claims, mode);
    let name = fresh_name(rig, "many")?;
    let mut listener = transport.listen(&name).await?;
    let mut ends = Vec::new();
    for i in 0..claims.channels {
        match meet(transport, &name, &config, &mut *listener).await {
            Ok(both) => ends.push(both),
            Err(error) => {
                return Err(Halt::failed(format!(
                    "channel {} of the claimed {}: {error}",
                    i + 1,
                    claims.channels
                )));
            }
        }
    }
    let answer = transport.connect(&name, &config).await;
    let error = refused(answer, "transport.connect", ErrorKind::CapacityExceeded)?;
    let resource = error.object.as_ref().map_or("", |object| &object.name);
    ensure_eq!(resource, "transport.channels", "resource that the error names");
    ends.pop();
    let begun = std::time::Instant::now();
    loop {
        // The end of a channel may be seen a little later than it was dropped.
        match meet(transport, &name, &config, &mut *listener).await {
            Ok(_) => return Ok(()),
            Err(error) if error.kind == ErrorKind::CapacityExceeded && begun.elapsed() < WITHIN => {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            Err(error) => return Err(error.into()),
        }
    }
}
