//! The ring against a queue that cannot be wrong: any sequence of operations on small rings, so that every offset and
//! the wrap of the index itself are crossed many times. And against a peer that writes anything anywhere.

use std::{collections::VecDeque, sync::Arc};

use proptest::prelude::*;

use super::{
    layout::{CONTROL_BYTES, HEAD, START, TAIL, WANT_DATA, WANT_SPACE, pack, record_bytes},
    memory::heap::Heap,
    sync::Ordering,
    *,
};

type Ends = (Producer<Heap>, Consumer<Heap>, Arc<Heap>);

fn ring(mode: Mode, capacity: u32) -> Ends {
    let memory = Arc::new(Heap::new(CONTROL_BYTES, CONTROL_BYTES + capacity as usize));
    let geometry = Geometry {
        base: 0,
        capacity,
        mode,
        cookie: 1,
        generation: 1,
    };
    geometry.format(&*memory).unwrap();
    let producer = Producer::attach(Arc::clone(&memory), geometry).unwrap();
    let consumer = Consumer::attach(Arc::clone(&memory), geometry).unwrap();
    (producer, consumer, memory)
}

fn messages(max_len: u32, capacity: u32) -> Ends {
    ring(Mode::Messages { max_len }, capacity)
}

#[derive(Debug, Clone)]
enum Step {
    Push(Vec<Vec<u8>>),
    Reserve(Vec<u8>, bool),
    Pop(usize),
    PopPacked(usize, usize),
    Peek(bool),
    WantData,
    WantSpace(usize),
    Restart,
}

fn message() -> impl Strategy<Value = Vec<u8>> {
    proptest::collection::vec(any::<u8>(), 0..=24)
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => proptest::collection::vec(message(), 0..5).prop_map(Step::Push),
        2 => (message(), any::<bool>()).prop_map(|(message, commit)| Step::Reserve(message, commit)),
        6 => (0usize..6).prop_map(Step::Pop),
        3 => (0usize..60, 0usize..6).prop_map(|(room, count)| Step::PopPacked(room, count)),
        2 => any::<bool>().prop_map(Step::Peek),
        1 => Just(Step::WantData),
        1 => (0usize..=24).prop_map(Step::WantSpace),
        1 => Just(Step::Restart),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn messages_come_out_as_from_a_queue(
        capacity in (5u32..8).prop_map(|power| 1 << power),
        steps in proptest::collection::vec(step(), 1..120),
    ) {
        let (mut producer, mut consumer, _) = messages(24, capacity);
        let mut queue: VecDeque<Vec<u8>> = VecDeque::new();
        let mut generation = 1u32;
        let used = |queue: &VecDeque<Vec<u8>>| queue.iter().map(|held| record_bytes(held.len() as u32)).sum::<u32>();
        for step in steps {
            match step {
                Step::Push(batch) => {
                    let slices: Vec<&[u8]> = batch.iter().map(Vec::as_slice).collect();
                    let count = producer.push(&slices).unwrap();
                    let mut expected = 0;
                    for message in batch {
                        if used(&queue) + record_bytes(message.len() as u32) > capacity {
                            break;
                        }
                        queue.push_back(message);
                        expected += 1;
                    }
                    prop_assert_eq!(count, expected);
                }
                Step::Reserve(message, commit) => {
                    let fits = used(&queue) + record_bytes(message.len() as u32) <= capacity;
                    let reservation = producer.reserve(message.len()).unwrap();
                    prop_assert_eq!(reservation.is_some(), fits);
                    if let Some(mut reservation) = reservation {
                        let (first, rest) = message.split_at(message.len() / 2);
                        reservation.write_at(first.len(), rest).unwrap();
                        reservation.write_at(0, first).unwrap();
                        prop_assert!(reservation.write_at(message.len(), &[0]).is_err());
                        prop_assert!(reservation.write_at(usize::MAX, &[0]).is_err());
                        if commit {
                            reservation.commit();
                            queue.push_back(message);
                        }
                    }
                }
                Step::Pop(count) => {
                    let mut slots = vec![vec![0xaa; 3]; count];
                    let taken = consumer.pop(&mut slots).unwrap();
                    prop_assert_eq!(taken, count.min(queue.len()));
                    for slot in &slots[..taken] {
                        prop_assert_eq!(slot, &queue.pop_front().unwrap());
                    }
                }
                Step::PopPacked(room, count) => {
                    let (mut buffer, mut lengths) = (vec![0; room], vec![0; count]);
                    match consumer.pop_packed(&mut buffer, &mut lengths) {
                        Ok(taken) => {
                            let mut at = 0;
                            for len in &lengths[..taken] {
                                prop_assert_eq!(&buffer[at..at + len], &queue.pop_front().unwrap()[..]);
                                at += len;
                            }
                            let stopped = taken == count || queue.front().is_none_or(|next| next.len() > room - at);
                            prop_assert!(stopped);
                        }
                        Err(RingError::BufferTooSmall { need, have }) => {
                            prop_assert_eq!((need, have), (queue[0].len(), room));
                            prop_assert!(need > have);
                        }
                        Err(other) => return Err(TestCaseError::fail(other.to_string())),
                    }
                }
                Step::Peek(take) => match consumer.peek().unwrap() {
                    Some(record) => {
                        let mut message = vec![0; record.len()];
                        record.read_at(0, &mut message).unwrap();
                        prop_assert!(record.read_at(1, &mut message).is_err() || record.is_empty());
                        prop_assert_eq!(&message, &queue[0]);
                        if take {
                            record.take();
                            queue.pop_front();
                        }
                    }
                    None => prop_assert!(queue.is_empty()),
                },
                Step::WantData => {
                    prop_assert_eq!(consumer.want_data().unwrap(), queue.is_empty());
                    prop_assert_eq!(producer.must_notify(), queue.is_empty());
                    prop_assert!(!producer.must_notify());
                }
                Step::WantSpace(len) => {
                    let full = used(&queue) + record_bytes(len as u32) > capacity;
                    prop_assert_eq!(producer.want_space(len).unwrap(), full);
                    prop_assert_eq!(consumer.must_notify(), full);
                    prop_assert!(!consumer.must_notify());
                }
                Step::Restart => {
                    generation = generation.wrapping_add(1);
                    consumer.restart(generation);
                    producer.restart(generation);
                    queue.clear();
                }
            }
            let octets: usize = queue.iter().map(Vec::len).sum();
            let waiting = InFlight { messages: queue.len() as u64, bytes: octets as u64 };
            prop_assert_eq!(producer.in_flight().unwrap(), waiting);
        }
    }

    #[test]
    fn octets_come_out_as_from_a_queue(
        capacity in (4u32..8).prop_map(|power| 1 << power),
        steps in proptest::collection::vec((any::<bool>(), 0usize..200, 0usize..100), 1..200),
    ) {
        let (mut producer, mut consumer, _) = ring(Mode::Stream, capacity);
        let (mut queue, mut next) = (VecDeque::new(), 0u8);
        for (write, len, split) in steps {
            if write {
                let octets: Vec<u8> = (0..len).map(|at| next.wrapping_add(at as u8)).collect();
                let (first, rest) = octets.split_at(split.min(len));
                let count = producer.write(&[first, rest]).unwrap();
                prop_assert_eq!(count, len.min(capacity as usize - queue.len()));
                queue.extend(&octets[..count]);
                next = next.wrapping_add(count as u8);
            } else {
                let mut octets = vec![0; len];
                let count = consumer.read(&mut octets).unwrap();
                prop_assert_eq!(count, len.min(queue.len()));
                prop_assert!(octets[..count].iter().eq(queue.drain(..count).collect::<Vec<u8>>().iter()));
            }
            prop_assert_eq!(producer.in_flight().unwrap(), InFlight { messages: 0, bytes: queue.len() as u64 });
        }
    }

    #[test]
    fn whatever_a_peer_writes_is_an_answer_or_a_named_lie(
        mode in prop_oneof![Just(Mode::Messages { max_len: 24 }), Just(Mode::Stream)],
        lies in proptest::collection::vec((0usize..6, any::<u64>(), 0u64..200), 1..60),
    ) {
        let (mut producer, mut consumer, memory) = ring(mode, 64);
        let mut slots = vec![Vec::new(); 8];
        for (cell, wild, near) in lies {
            // Half of the lies are close to the truth: those are the ones that get past a careless check.
            let value = if wild % 2 == 0 { wild } else { pack(1, START.wrapping_add(near as u32)) };
            match cell {
                0 => memory.store(TAIL, value, Ordering::Relaxed),
                1 => memory.store(HEAD, value, Ordering::Relaxed),
                2 => memory.store(WANT_DATA, wild, Ordering::Relaxed),
                3 => memory.store(WANT_SPACE, wild, Ordering::Relaxed),
                4 => memory.write(CONTROL_BYTES + (near as usize % 8) * 8, &near.to_ne_bytes()),
                _ => memory.write(CONTROL_BYTES + (near as usize % 8) * 8, &wild.to_ne_bytes()),
            }
            let outcomes = match mode {
                Mode::Messages { .. } => [
                    producer.push(&[b"a", b"message"]).map(drop),
                    consumer.pop(&mut slots).map(|count| assert!(slots[..count].iter().all(|slot| slot.len() <= 24))),
                    consumer.peek().map(drop),
                ],
                Mode::Stream => [
                    producer.write(&[b"octets"]).map(drop),
                    consumer.read(&mut [0; 40]).map(drop),
                    consumer.is_empty().map(drop),
                ],
            };
            let judged = [producer.in_flight().map(drop), producer.want_space(9).map(drop), consumer.want_data().map(drop)];
            for outcome in outcomes.into_iter().chain(judged) {
                prop_assert!(matches!(outcome, Ok(()) | Err(RingError::PeerMisbehaved { .. })), "{:?}", outcome);
            }
            producer.must_notify();
            consumer.must_notify();
        }
    }
}

#[test]
fn every_message_length_crosses_every_offset_and_the_wrap_of_the_index() {
    for len in 0..=56u32 {
        let (mut producer, mut consumer, _) = messages(56, 64);
        let rounds = (1 << 17) / record_bytes(len) / 64 * 64 + 64;
        let mut slots = vec![Vec::new()];
        for round in 0..rounds {
            let message: Vec<u8> = (0..len).map(|at| (at + round) as u8).collect();
            assert_eq!(producer.push(&[&message]), Ok(1));
            assert_eq!(consumer.pop(&mut slots), Ok(1));
            assert_eq!(slots[0], message);
        }
    }
}

#[test]
fn a_lie_is_named_and_remembered() {
    let (mut producer, mut consumer, memory) = messages(24, 64);
    memory.store(TAIL, pack(1, START.wrapping_add(72)), Ordering::Relaxed);
    let lie = RingError::PeerMisbehaved {
        field: "tail",
        value: START.wrapping_add(72).into(),
    };
    assert_eq!(consumer.pop(&mut [Vec::new()]), Err(lie));
    memory.store(TAIL, pack(1, START), Ordering::Relaxed);
    assert_eq!(consumer.pop(&mut [Vec::new()]), Err(lie));
    assert_eq!(consumer.want_data(), Err(lie));

    assert_eq!(producer.push(&[b"one"]), Ok(1));
    memory.store(HEAD, pack(1, START.wrapping_add(24)), Ordering::Relaxed);
    assert!(matches!(
        producer.in_flight(),
        Err(RingError::PeerMisbehaved { field: "head", .. })
    ));
    assert!(matches!(
        producer.push(&[]),
        Err(RingError::PeerMisbehaved { field: "head", .. })
    ));
}

#[test]
fn an_index_that_goes_back_or_between_records_is_a_lie() {
    let (mut producer, mut consumer, memory) = messages(24, 64);
    producer.push(&[b"one", b"two"]).unwrap();
    consumer.pop(&mut [Vec::new()]).unwrap();
    memory.store(TAIL, pack(1, START.wrapping_add(16)), Ordering::Relaxed);
    assert!(matches!(
        consumer.want_data(),
        Err(RingError::PeerMisbehaved { field: "tail", .. })
    ));
    memory.store(HEAD, pack(1, START.wrapping_add(3)), Ordering::Relaxed);
    assert!(matches!(
        producer.in_flight(),
        Err(RingError::PeerMisbehaved { field: "head", .. })
    ));
}

#[test]
fn a_length_over_the_bound_or_past_the_tail_is_a_lie_after_the_good_ones_were_delivered() {
    for length in [25, 24, u64::MAX, 1 << 32] {
        let (mut producer, mut consumer, memory) = messages(24, 64);
        producer.push(&[b"good", b"bad"]).unwrap();
        let second = CONTROL_BYTES + (START.wrapping_add(16) % 64) as usize;
        memory.write(second, &length.to_ne_bytes());
        let mut slots = vec![Vec::new(); 2];
        assert_eq!(consumer.pop(&mut slots), Ok(1));
        assert_eq!(slots[0], b"good");
        let lie = RingError::PeerMisbehaved {
            field: "record length",
            value: length,
        };
        assert_eq!(consumer.pop(&mut slots), Err(lie));
        assert_eq!(producer.in_flight(), Err(lie));
    }
}

#[test]
fn a_peer_a_generation_behind_is_awaited_and_any_other_is_a_lie() {
    let (mut producer, mut consumer, memory) = messages(24, 64);
    producer.push(&[b"old"]).unwrap();
    consumer.restart(2);
    assert_eq!(
        consumer.pop(&mut [Vec::new()]),
        Ok(0),
        "what the old generation left is gone"
    );
    producer.restart(2);
    producer.push(&[b"new"]).unwrap();
    assert_eq!(consumer.pop(&mut [Vec::new()]), Ok(1));
    memory.store(TAIL, pack(1, START), Ordering::Relaxed);
    assert!(matches!(
        consumer.want_data(),
        Err(RingError::PeerMisbehaved {
            field: "generation",
            value: 1
        })
    ));
    memory.store(HEAD, pack(4, START), Ordering::Relaxed);
    assert!(matches!(
        producer.in_flight(),
        Err(RingError::PeerMisbehaved {
            field: "generation",
            value: 4
        })
    ));
}

#[test]
fn what_cannot_be_done_is_refused_with_nothing_put_in() {
    let (mut producer, mut consumer, _) = messages(24, 64);
    assert_eq!(
        producer.push(&[&[0; 25]]),
        Err(RingError::MessageTooLong { len: 25, max: 24 })
    );
    assert_eq!(
        producer.push(&[b"fits", &[0; 25], b"fits"]),
        Ok(1),
        "a later one ends the batch before it"
    );
    assert_eq!(producer.in_flight().unwrap().messages, 1);
    assert!(matches!(
        producer.reserve(25),
        Err(RingError::MessageTooLong { .. })
    ));
    assert!(matches!(
        producer.want_space(25),
        Err(RingError::MessageTooLong { .. })
    ));
    assert!(matches!(
        producer.write(&[b"x"]),
        Err(RingError::WrongMode {
            operation: "write",
            mode: "messages"
        })
    ));
    assert!(matches!(
        consumer.read(&mut [0]),
        Err(RingError::WrongMode {
            operation: "read",
            ..
        })
    ));
    let (mut producer, mut consumer, _) = ring(Mode::Stream, 64);
    assert!(matches!(
        producer.push(&[b"x"]),
        Err(RingError::WrongMode {
            operation: "push",
            mode: "stream"
        })
    ));
    assert!(matches!(
        consumer.pop(&mut []),
        Err(RingError::WrongMode { operation: "pop", .. })
    ));
    assert!(matches!(
        producer.want_space(65),
        Err(RingError::MessageTooLong { len: 65, max: 64 })
    ));
}
