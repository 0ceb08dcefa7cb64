//! Per-frame and per-octet cost of `dpumesh_hw::wire`: the header parse, sums, segmentation and coalescing.
//!
//! Throughput counts the octets of whole Ethernet frames; what is in the cache stays there.

use std::hint::black_box;
use std::net::Ipv4Addr;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dpumesh_core::{Checksum, Frame, Gso, GsoKind, HEADROOM};
use dpumesh_hw::wire::checksum::Sum;
use dpumesh_hw::wire::coalesce::coalesce;
use dpumesh_hw::wire::ethernet::{self, ethertype};
use dpumesh_hw::wire::{Coalescer, Headers, Segments, TcpFlags, ipv4, protocol, tcp};

/// TCP payload of a segment at MTU 1500 with timestamps.
const MSS: usize = 1448;

criterion_group!(benches, parse, sum, segment, merge);
criterion_main!(benches);

fn parse(c: &mut Criterion) {
    let mut group = c.benchmark_group("parse");
    let frame = tcp_frame(0);
    group.throughput(Throughput::Elements(1));
    group.bench_function("headers of an ACK, 66 octets", |b| {
        b.iter(|| Headers::parse(black_box(frame.octets())))
    });
    group.bench_function("headers and flow hash", |b| {
        b.iter(|| Headers::parse(black_box(frame.octets())).map(|headers| headers.flow_hash()));
    });
    group.finish();
}

fn sum(c: &mut Criterion) {
    let mut group = c.benchmark_group("checksum");
    for len in [20, 64, MSS, 65_536] {
        let octets: Vec<u8> = (0..len).map(|i| i as u8).collect();
        let mut copy = octets.clone();
        group.throughput(Throughput::Bytes(len as u64));
        group.bench_function(format!("sum of {len}"), |b| {
            b.iter(|| Sum::of(black_box(&octets)))
        });
        group.bench_function(format!("copy and sum of {len}"), |b| {
            b.iter(|| Sum::copy(black_box(&octets), black_box(&mut copy)));
        });
        group.bench_function(format!("copy alone of {len}"), |b| {
            b.iter(|| black_box(&mut copy).copy_from_slice(black_box(&octets)));
        });
    }
    group.finish();
}

fn segment(c: &mut Criterion) {
    let mut group = c.benchmark_group("segment");
    let frame = super_frame(64_000);
    group.throughput(Throughput::Bytes(frame.len() as u64));
    let mut out = Frame::with_capacity(HEADROOM, 1600);
    group.bench_function("64 KB into frames", |b| {
        b.iter(|| {
            let mut segments = Segments::of(black_box(&frame)).expect("a valid super-frame");
            while segments.next_into(&mut out).expect("room for an MTU") {
                black_box(&out);
            }
        });
    });
    let mut room = vec![0; 65_507];
    group.bench_function("64 KB into runs behind VXLAN", |b| {
        b.iter(|| {
            let mut segments = Segments::of(black_box(&frame)).expect("a valid super-frame");
            while let Some(run) = segments.run_into(&[8; 8], 64, &mut room).expect("room for one") {
                black_box((&room, run));
            }
        });
    });
    group.finish();
}

fn merge(c: &mut Criterion) {
    let mut group = c.benchmark_group("coalesce");
    let frame = super_frame(64_000);
    let mut pieces = vec![];
    let mut segments = Segments::of(&frame).expect("a valid super-frame");
    let mut out = Frame::with_capacity(HEADROOM, 1600);
    while segments.next_into(&mut out).expect("room for an MTU") {
        pieces.push(out.octets().to_vec());
    }
    group.throughput(Throughput::Bytes(
        pieces.iter().map(|piece| piece.len() as u64).sum(),
    ));
    for (name, checksum) in [
        ("summed", Checksum::Unverified),
        ("vouched for", Checksum::Verified),
    ] {
        let mut heads = [Frame::new()];
        group.bench_function(format!("45 segments, {name}"), |b| {
            b.iter(|| {
                let mut flows = Coalescer::new();
                for (index, piece) in pieces.iter().enumerate() {
                    let merged = flows.absorb(&mut heads[..index.min(1)], 0, piece, checksum);
                    if !merged {
                        assert!(index == 0 && heads[0].fill(piece));
                        heads[0].checksum = checksum;
                    }
                }
                flows.finish(&mut heads);
            });
        });
    }
    let mut batch: Vec<Frame> = (0..32u8).map(other_flow).collect();
    group.throughput(Throughput::Elements(32));
    group.bench_function("32 frames of 32 flows, nothing to merge", |b| {
        b.iter(|| assert_eq!(coalesce(black_box(&mut batch)), 32));
    });
    group.finish();
}

fn super_frame(payload: usize) -> Frame {
    let mut frame = tcp_frame(payload);
    frame.gso = Some(Gso {
        kind: GsoKind::TcpV4,
        size: MSS as u16,
        header_len: 66,
        ecn: false,
    });
    frame
}

fn other_flow(port: u8) -> Frame {
    let mut frame = tcp_frame(MSS);
    frame.octets_mut()[35] = port;
    frame
}

/// A segment with timestamps and an open checksum.
fn tcp_frame(payload: usize) -> Frame {
    let mut segment = tcp::Repr {
        source: 40_000,
        destination: 80,
        sequence: 1,
        acknowledgment: 1,
        flags: TcpFlags::ACK,
        window: 501,
    }
    .emit()
    .to_vec();
    segment[12] = 0x80;
    segment.extend([1, 1, 8, 10, 0, 0, 0, 7, 0, 0, 0, 9]);
    segment.extend((0..payload).map(|i| i as u8));
    let (source, destination) = (Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2));
    let pseudo = Sum::pseudo(
        source.into(),
        destination.into(),
        protocol::TCP,
        segment.len() as u32,
    );
    segment[16..18].copy_from_slice(&pseudo.fold().to_be_bytes());
    let ip = ipv4::Repr {
        dscp: 0,
        ecn: 0,
        id: 1,
        dont_fragment: true,
        ttl: 64,
        protocol: protocol::TCP,
        source,
        destination,
        payload_len: segment.len() as u16,
    };
    let link = ethernet::Repr {
        destination: dpumesh_core::MacAddr([2; 6]),
        source: dpumesh_core::MacAddr([4; 6]),
        ethertype: ethertype::IPV4,
    };
    let mut frame = Frame::new();
    assert!(frame.fill(&[&link.emit()[..], &ip.emit(), &segment].concat()));
    frame.checksum = Checksum::Partial {
        start: 34,
        offset: 16,
    };
    frame
}
