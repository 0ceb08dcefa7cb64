//! Channels as their users see them: within one process, between two, with peers that die and peers that lie.
//!
//! A test that needs a second process starts the test program again, for itself alone, with [`ROLE`] set to the path
//! where the first listens. All waiting is bounded by [`PATIENCE`].

mod hostile;
mod listening;
mod one_process;
mod resetting;
mod two_processes;

use std::{
    env,
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use proptest::prelude::*;

use super::{
    handshake::{self, Agreed},
    socket::{self, Socket},
    *,
};
use crate::ring::{InFlight, Memory, Mode, RingError, layout};

const ROLE: &str = "DPUMESH_TEST_PEER";
const PATIENCE: Duration = Duration::from_secs(60);
const TICK: Duration = Duration::from_millis(200);

fn options() -> Options {
    Options {
        mode: Mode::Messages { max_len: 256 },
        ring_bytes: 4096,
        ..Options::default()
    }
}

fn pair() -> (Channel, Channel) {
    Channel::pair(&options()).unwrap()
}

fn recv_one(channel: &mut Channel) -> Result<Option<Vec<u8>>, ShmError> {
    let mut slots = [Vec::new()];
    let count = channel.recv(&mut slots)?;
    let [message] = slots;
    Ok((count == 1).then_some(message))
}

/// Waits for the next message.
fn next(channel: &mut Channel) -> Result<Vec<u8>, ShmError> {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        if let Some(message) = recv_one(channel)? {
            return Ok(message);
        }
        channel.wait(Interest::READABLE, TICK)?;
    }
    panic!("no message in {PATIENCE:?}");
}

/// The error that ends a channel, whatever is still received before it.
fn end_of(channel: &mut Channel) -> ShmError {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        if let Err(error) = next(channel) {
            return error;
        }
    }
    panic!("no end in {PATIENCE:?}");
}
