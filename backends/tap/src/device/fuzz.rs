//! What the fuzz target `virtio` runs: ten octets as the kernel's header, the rest as the frame behind it. The target in
//! `fuzz/` calls it and nothing else; its corpus runs as a unit test here.
//!
//! # Panics
//! When a rule is broken: that is what a fuzzer looks for.

use dpumesh_core::{Frame, MAX_FRAME, Mtu};

use super::{offloading, refusal, virtio as header};

/// What is accepted stays inside the frame, may leave by a port that offloads, and reads the same when written again.
pub fn virtio(data: &[u8]) {
    let Some((head, octets)) = data.split_first_chunk::<{ header::HEADER }>() else {
        return;
    };
    if octets.len() > MAX_FRAME {
        return;
    }
    let mut frame = Frame::copy_of(octets);
    if header::decode(head, &mut frame).is_none() {
        return;
    }
    let limits = offloading(Mtu::try_from(u16::MAX).expect("an MTU"), true);
    let segment = frame.gso.map_or(frame.len(), |gso| {
        usize::from(gso.header_len) + usize::from(gso.size)
    });
    if segment <= limits.mtu.frame_len() {
        assert_eq!(refusal(&limits, &frame), None, "{frame:?}");
    }
    let mut again = Frame::copy_of(octets);
    header::decode(&header::encode(&frame), &mut again).expect("what was read can be written");
    assert_eq!((again.checksum, again.gso), (frame.checksum, frame.gso));
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;

    fn corpus() -> Vec<Vec<u8>> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus/virtio");
        let files = std::fs::read_dir(folder).expect("the corpus");
        files
            .map(|file| std::fs::read(file.expect("a file").path()).expect("readable"))
            .collect()
    }

    #[test]
    fn the_corpus_breaks_no_rule_at_any_length() {
        let corpus = corpus();
        assert!(corpus.len() >= 16, "{} files", corpus.len());
        for octets in corpus {
            (0..=octets.len()).for_each(|length| super::virtio(&octets[..length]));
        }
    }

    proptest! {
        #[test]
        fn any_header_before_any_frame(
            head in any::<[u8; 10]>(), flags in 0..4u8, kind in prop::sample::select(vec![0, 1, 3, 4, 5, 0x81, 0xff]),
            octets in prop::collection::vec(any::<u8>(), 0..300),
        ) {
            super::virtio(&[&head[..], &octets].concat());
            let mut likely = [&head[..], &octets].concat();
            likely[..2].copy_from_slice(&[flags, kind]);
            likely[5] = 0;
            likely[7] = 0;
            likely[9] = 0;
            super::virtio(&likely);
        }
    }
}
