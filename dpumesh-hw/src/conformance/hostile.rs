//! A peer on shared memory who writes what he likes. The memory of a channel is the peer's as well, so the kit plays him:
//! it finds the channel's memory among this process's mappings by a message that waits in it, and overwrites it. No hook
//! of the backend is needed, and a transport that shares no memory shows nothing here.
//!
//! Both ends live in this process; the near one is the victim, and nobody uses the far one while it is lied to.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

use dpumesh_core::transport::{ChannelMode, ShmChannel};
use dpumesh_core::{Error, ErrorKind};

use super::Rig;
use super::check::{CaseResult, Halt, ensure, ensure_eq};
use super::transport::{Pair, pair};

/// Calls after which a channel that still answers is left alone.
const CALLS: usize = 400;
/// Mappings above this size are not searched.
const LARGEST: u64 = 64 << 20;

/// A channel's memory, reached as the peer reaches it: by writing.
struct Memory {
    process: File,
    place: Range<u64>,
}

impl Memory {
    /// The memory in which a message waits that `near` has sent.
    fn of(pair: &mut Pair) -> Result<Self, Halt> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let mut cookie = format!("dpumesh-conform/{}/", std::process::id()).into_bytes();
        // Not a text that this process holds elsewhere in shared memory.
        cookie.extend(number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes());
        ensure_eq!(pair.near.send(&[&cookie])?, 1, "messages sent");
        match search(&cookie) {
            Ok(Some(memory)) => Ok(memory),
            Ok(None) => Err(Halt::not_supported(
                "transport.memory",
                "a message that waits is in no shared mapping of this process",
            )),
            Err(error) => Err(Halt::not_supported(
                "transport.memory",
                format!("this process cannot read its own mappings: {error}"),
            )),
        }
    }

    fn read(&self) -> Result<Vec<u8>, Halt> {
        let mut octets = vec![0; (self.place.end - self.place.start) as usize];
        self.process
            .read_exact_at(&mut octets, self.place.start)
            .map_err(|error| Halt::failed(format!("reading the channel's memory: {error}")))?;
        Ok(octets)
    }

    fn write(&self, octets: &[u8]) -> CaseResult {
        self.process
            .write_all_at(octets, self.place.start)
            .map_err(|error| Halt::failed(format!("writing the channel's memory: {error}")))
    }
}

fn search(cookie: &[u8]) -> io::Result<Option<Memory>> {
    let process = File::options().read(true).write(true).open("/proc/self/mem")?;
    for line in BufReader::new(File::open("/proc/self/maps")?).lines() {
        let Some(place) = shared_mapping(&line?) else {
            continue;
        };
        let mut octets = vec![0; (place.end - place.start) as usize];
        // A mapping may go while it is read: it was not ours.
        if process.read_exact_at(&mut octets, place.start).is_err() {
            continue;
        }
        if octets.windows(cookie.len()).any(|window| window == cookie) {
            return Ok(Some(Memory { process, place }));
        }
    }
    Ok(None)
}

/// The place of a writable shared mapping: `7f00-7f01 rw-s 0 00:01 5 /memfd:x`.
fn shared_mapping(line: &str) -> Option<Range<u64>> {
    let mut words = line.split_ascii_whitespace();
    let (from, to) = words.next()?.split_once('-')?;
    let place = u64::from_str_radix(from, 16).ok()?..u64::from_str_radix(to, 16).ok()?;
    (words.next()? == "rw-s" && place.end - place.start <= LARGEST).then_some(place)
}

/// Uses a channel in every way, again and again, until it says what is wrong or answered every call.
fn bother(channel: &mut dyn ShmChannel) -> Result<Option<Error>, Halt> {
    let mut buffer = vec![0; channel.config().max_message as usize];
    for call in 0..CALLS {
        let answer = match call % 4 {
            0 => channel.receive(&mut buffer).map(drop),
            1 => channel.send(&[b"x", b"yz"]).map(drop),
            2 => channel
                .send_with(3, &mut |writer| {
                    writer.write(b"abc");
                })
                .map(drop),
            _ => channel.arm().map(drop),
        };
        channel.peer();
        match answer {
            Ok(()) => {}
            Err(error) if error.kind == ErrorKind::PeerMisbehaved => return Ok(Some(error)),
            Err(error) => {
                return Err(Halt::failed(format!(
                    "a lie of the peer became {:?}: {error}",
                    error.kind
                )));
            }
        }
    }
    Ok(None)
}

/// Every later call says the same.
fn is_closed_for_good(channel: &mut dyn ShmChannel) -> CaseResult {
    let mut buffer = vec![0; channel.config().max_message as usize];
    for round in 0..3 {
        let answers = [
            ("send", channel.send(&[b"x"]).map(drop)),
            ("receive", channel.receive(&mut buffer).map(drop)),
            ("send_with", channel.send_with(1, &mut |_| {}).map(drop)),
            ("arm", channel.arm().map(drop)),
        ];
        for (call, answer) in answers {
            let kind = answer.map_err(|error| error.kind);
            ensure_eq!(
                kind,
                Err(ErrorKind::PeerMisbehaved),
                "{call} of round {round} on a channel whose peer lied"
            );
        }
    }
    Ok(())
}

pub(super) async fn a_lie_of_the_peer_closes_the_channel_for_good(rig: &dyn Rig) -> CaseResult {
    // What he may claim: more than there is, less than there was.
    for lie in [0xff, 0x7f] {
        let mut pair = pair(rig, ChannelMode::Messages).await?;
        let memory = Memory::of(&mut pair)?;
        let honest = memory.read()?;
        memory.write(&vec![lie; honest.len()])?;
        let noticed = bother(&mut *pair.near)?;
        ensure!(
            noticed.is_some(),
            "all of the shared memory is {lie:#x}, and {CALLS} calls did not notice"
        );
        is_closed_for_good(&mut *pair.near)?;
        // Remorse does not help.
        memory.write(&honest)?;
        is_closed_for_good(&mut *pair.near)?;
    }
    Ok(())
}

/// Marsaglia's xorshift: the same lies in every run.
fn draw(seed: &mut u64) -> u64 {
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    *seed
}

pub(super) async fn whatever_the_peer_writes_ends_cleanly(rig: &dyn Rig) -> CaseResult {
    let mut noticed = 0;
    for seed in 1..=16_u64 {
        let mut pair = pair(rig, ChannelMode::Messages).await?;
        // What he says of his own messages is looked at as well as what he says of ours.
        pair.far.send(&[b"honest", b"words"])?;
        let memory = Memory::of(&mut pair)?;
        let mut octets = memory.read()?;
        let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        for _ in 0..(1 << (seed % 8)) {
            // Words, small and large, at the places of words: counts, lengths, flags.
            let at = (draw(&mut random) as usize % (octets.len() / 8)) * 8;
            let word = draw(&mut random) >> (draw(&mut random) % 64);
            octets[at..at + 8].copy_from_slice(&word.to_ne_bytes());
        }
        if seed % 2 == 0 {
            // Not one octet is as it was.
            octets
                .iter_mut()
                .for_each(|octet| *octet = draw(&mut random) as u8);
        }
        memory.write(&octets)?;
        if bother(&mut *pair.near)?.is_some() {
            noticed += 1;
            is_closed_for_good(&mut *pair.near)?;
        }
    }
    ensure!(
        noticed > 0,
        "16 times rubbish in the shared memory, never noticed"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_writable_shared_mappings_are_searched() {
        let line = "7f2c1000-7f2c3000 rw-s 00000000 00:01 1057                       /memfd:ring (deleted)";
        assert_eq!(shared_mapping(line), Some(0x7f2c_1000..0x7f2c_3000));
        for other in [
            "7f2c1000-7f2c3000 r--s 00000000 00:01 1057 /memfd:ring",
            "7f2c1000-7f2c3000 rw-p 00000000 00:00 0",
            "7f2c1000-ff2c3000 rw-s 00000000 00:01 1 /memfd:large",
            "nonsense",
            "",
        ] {
            assert_eq!(shared_mapping(other), None, "{other}");
        }
    }
}
