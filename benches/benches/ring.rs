//! What a shared-memory channel moves between two threads that poll: messages a second by batch size, and octets a
//! second of a stream against a unix socket pair in the same run. The ratio is printed before criterion's figures;
//! nothing is pinned, so compare figures of one run only.

use std::{
    hint::black_box,
    io::{Read, Write},
    os::unix::net::UnixStream,
    thread,
    time::{Duration, Instant},
};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use dpumesh_hw::{
    ring::Mode,
    shm::{Channel, Options},
};

const RING_BYTES: u32 = 256 << 10;
const CHUNK: usize = 1024;

fn channel(mode: Mode) -> (Channel, Channel) {
    let options = Options {
        mode,
        ring_bytes: RING_BYTES,
        ..Options::default()
    };
    Channel::pair(&options).expect("a channel within one process")
}

/// Polls until `step` moved something; gives the processor away now and then, for machines with too few of them.
fn poll(mut step: impl FnMut() -> usize) -> usize {
    loop {
        for _ in 0..1000 {
            let moved = step();
            if moved > 0 {
                return moved;
            }
            std::hint::spin_loop();
        }
        thread::yield_now();
    }
}

/// Time for `count` messages of `len` octets to cross, `batch` at a time.
fn messages(count: u64, len: usize, batch: usize) -> Duration {
    let (mut tx, mut rx) = channel(Mode::Messages { max_len: 2048 });
    let message = vec![1; len];
    let slices = vec![&message[..]; batch];
    thread::scope(|scope| {
        let receiving = scope.spawn(move || {
            let (mut buffer, mut lengths) = (vec![0; 64 * 1024], vec![0; batch]);
            let mut left = count;
            while left > 0 {
                left -= poll(|| rx.recv_packed(&mut buffer, &mut lengths).expect("an honest peer")) as u64;
                black_box(&buffer);
            }
        });
        let started = Instant::now();
        let mut left = count;
        while left > 0 {
            let size = left.min(batch as u64) as usize;
            left -= poll(|| tx.send(&slices[..size]).expect("an honest peer")) as u64;
        }
        receiving.join().expect("the receiver ends");
        started.elapsed()
    })
}

/// Time for `count` messages through one thread that plays both ends.
fn one_thread(count: u64, len: usize, batch: usize) -> Duration {
    let (mut tx, mut rx) = channel(Mode::Messages { max_len: 2048 });
    let message = vec![1; len];
    let slices = vec![&message[..]; batch];
    let (mut buffer, mut lengths) = (vec![0; 64 * 1024], vec![0; batch]);
    let started = Instant::now();
    for _ in 0..count.div_ceil(batch as u64) {
        tx.send(&slices).expect("room for a batch");
        black_box(rx.recv_packed(&mut buffer, &mut lengths).expect("a batch"));
    }
    started.elapsed()
}

/// Time for `count` chunks of a kilobyte to cross a stream channel, copied in and out.
fn stream(count: u64) -> Duration {
    let (mut tx, mut rx) = channel(Mode::Stream);
    let total = count * CHUNK as u64;
    thread::scope(|scope| {
        let receiving = scope.spawn(move || {
            let (mut chunk, mut left) = ([0; CHUNK], total);
            while left > 0 {
                left -= poll(|| rx.read(&mut chunk).expect("an honest peer")) as u64;
                black_box(&chunk);
            }
        });
        let (chunk, started) = ([1; CHUNK], Instant::now());
        for _ in 0..count {
            let mut put = 0;
            while put < CHUNK {
                put += poll(|| tx.write(&[&chunk[put..]]).expect("an honest peer"));
            }
        }
        receiving.join().expect("the receiver ends");
        started.elapsed()
    })
}

/// The same through a unix stream socket pair.
fn unix_stream(count: u64) -> Duration {
    let (mut tx, mut rx) = UnixStream::pair().expect("a socket pair");
    let total = count * CHUNK as u64;
    thread::scope(|scope| {
        let receiving = scope.spawn(move || {
            let (mut chunk, mut left) = ([0; CHUNK], total);
            while left > 0 {
                left -= rx.read(&mut chunk).expect("an open socket") as u64;
                black_box(&chunk);
            }
        });
        let (chunk, started) = ([1; CHUNK], Instant::now());
        for _ in 0..count {
            tx.write_all(&chunk).expect("an open socket");
        }
        receiving.join().expect("the receiver ends");
        started.elapsed()
    })
}

/// Both streams in turn, three times; the best of each, and their ratio.
fn side_by_side(_: &mut Criterion) {
    const COUNT: u64 = 200_000;
    let best = |run: fn(u64) -> Duration| (0..3).map(|_| run(COUNT)).min().unwrap_or_default();
    let (ours, socket) = (best(stream), best(unix_stream));
    let rate = |time: Duration| (COUNT * CHUNK as u64) as f64 / time.as_secs_f64() / 1e9;
    println!(
        "stream of 1 KiB chunks: ring {:.2} GB/s, unix socket pair {:.2} GB/s, ratio {:.1}",
        rate(ours),
        rate(socket),
        socket.as_secs_f64() / ours.as_secs_f64(),
    );
}

fn figures(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("ring_messages");
    group.sample_size(10).throughput(Throughput::Elements(1));
    for (len, batch) in [(8, 1), (8, 32), (64, 1), (64, 32)] {
        let name = format!("{len}_octets_batch_{batch}");
        group.bench_function(BenchmarkId::new("two_threads", &name), |bencher| {
            bencher.iter_custom(|count| messages(count, len, batch));
        });
        group.bench_function(BenchmarkId::new("one_thread", &name), |bencher| {
            bencher.iter_custom(|count| one_thread(count, len, batch));
        });
    }
    group.finish();

    let mut group = criterion.benchmark_group("stream_1_kib");
    group.sample_size(10).throughput(Throughput::Bytes(CHUNK as u64));
    group.bench_function("ring", |bencher| bencher.iter_custom(stream));
    group.bench_function("unix_socket_pair", |bencher| bencher.iter_custom(unix_stream));
    group.finish();
}

criterion_group!(benches, side_by_side, figures);
criterion_main!(benches);
