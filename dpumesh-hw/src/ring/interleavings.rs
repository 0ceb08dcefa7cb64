//! Every interleaving of two threads on a small ring, found by loom: no octet is read while it is written, order and
//! contents hold, and nobody sleeps through a doorbell.

use std::sync::Arc;

use loom::{sync::Notify, thread};

use super::{layout::CONTROL_BYTES, memory::heap::Heap, *};

/// Room for exactly one message of up to 8 octets, so that the second has to wait for the first.
const CAPACITY: u32 = 16;

fn ring(mode: Mode) -> (Producer<Heap>, Consumer<Heap>) {
    let memory = Arc::new(Heap::new(CONTROL_BYTES, CONTROL_BYTES + CAPACITY as usize));
    let geometry = Geometry {
        base: 0,
        capacity: CAPACITY,
        mode,
        cookie: 1,
        generation: 1,
    };
    geometry.format(&*memory).unwrap();
    let producer = Producer::attach(Arc::clone(&memory), geometry).unwrap();
    (producer, Consumer::attach(memory, geometry).unwrap())
}

fn explore(preemptions: usize, body: impl Fn() + Sync + Send + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(preemptions);
    model.check(body);
}

#[test]
fn messages_arrive_whole_and_in_order() {
    explore(4, || {
        let (mut producer, mut consumer) = ring(Mode::Messages { max_len: 8 });
        let filling = thread::spawn(move || {
            for message in [b"one", b"two"] {
                while producer.push(&[message]).unwrap() == 0 {
                    thread::yield_now();
                }
            }
        });
        let mut slots = vec![Vec::new()];
        for expected in [b"one", b"two"] {
            while consumer.pop(&mut slots).unwrap() == 0 {
                thread::yield_now();
            }
            assert_eq!(slots[0], expected);
        }
        filling.join().unwrap();
    });
}

#[test]
fn octets_arrive_whole_and_in_order() {
    explore(4, || {
        let (mut producer, mut consumer) = ring(Mode::Stream);
        let filling = thread::spawn(move || {
            let mut left = &b"twenty octets exactly"[..];
            while !left.is_empty() {
                let count = producer.write(&[left]).unwrap();
                left = &left[count..];
                thread::yield_now();
            }
        });
        let mut got: Vec<u8> = Vec::new();
        while got.len() < 21 {
            let mut octets = [0; 21];
            let count = consumer.read(&mut octets).unwrap();
            got.extend(&octets[..count]);
            thread::yield_now();
        }
        assert_eq!(got, b"twenty octets exactly");
        filling.join().unwrap();
    });
}

/// The doorbell is loom's `Notify`: a thread that waits for one that never comes is a deadlock, which loom reports.
#[test]
fn a_consumer_that_asked_is_woken_and_one_that_need_not_sleep_does_not() {
    explore(5, || {
        let (mut producer, mut consumer) = ring(Mode::Messages { max_len: 8 });
        let bell = Arc::new(Notify::new());
        let doorbell = Arc::clone(&bell);
        let filling = thread::spawn(move || {
            assert_eq!(producer.push(&[b"message"]), Ok(1));
            if producer.must_notify() {
                doorbell.notify();
            }
        });
        while consumer.pop(&mut [Vec::new()]).unwrap() == 0 {
            if consumer.want_data().unwrap() {
                bell.wait();
            }
        }
        filling.join().unwrap();
    });
}

#[test]
fn a_producer_that_waits_for_room_is_woken() {
    explore(5, || {
        let (mut producer, mut consumer) = ring(Mode::Messages { max_len: 8 });
        let bell = Arc::new(Notify::new());
        let doorbell = Arc::clone(&bell);
        assert_eq!(producer.push(&[b"first"]), Ok(1));
        let emptying = thread::spawn(move || {
            assert_eq!(consumer.pop(&mut [Vec::new()]), Ok(1));
            if consumer.must_notify() {
                doorbell.notify();
            }
        });
        while producer.push(&[b"second"]).unwrap() == 0 {
            if producer.want_space(6).unwrap() {
                bell.wait();
            }
        }
        emptying.join().unwrap();
    });
}
