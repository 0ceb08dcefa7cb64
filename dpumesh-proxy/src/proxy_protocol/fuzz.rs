//! What must hold of any octets that a connection begins with. Run by the fuzzer's target `proxy_protocol`, and here over its corpus.

use super::{Begin, LONGEST, Version, next, read};

/// Reads `octets`: no panic, a header is the same with less or more behind it, and what is read is written as it was.
///
/// # Panics
/// One of these does not hold.
pub fn header(octets: &[u8]) {
    let header = match read(octets) {
        Begin::Header(header) => header,
        Begin::Incomplete => {
            assert!(octets.len() < LONGEST);
            return;
        }
        Begin::Other | Begin::Malformed(..) => return,
    };
    let own = &octets[..header.length];
    assert_eq!(read(own), Begin::Header(header.clone()));
    assert_eq!(read(&own[..own.len() - 1]), Begin::Incomplete);
    let mut left = header.tlvs;
    while !left.is_empty() {
        (_, left) = next(left).expect("well-formed TLVs");
    }
    let Some(ends) = header.ends else {
        return;
    };
    assert_eq!(ends.source.is_ipv4(), ends.destination.is_ipv4());
    match header.version {
        Version::V2 => assert_eq!(ends.binary(header.tlvs), own),
        // Addresses have more spellings than one.
        Version::V1 => match read(&ends.line()) {
            Begin::Header(again) => assert_eq!(again.ends, Some(ends)),
            other => panic!("{other:?}"),
        },
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_corpus_holds() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/corpus/proxy_protocol");
        let files: Vec<_> = std::fs::read_dir(folder).unwrap().map(Result::unwrap).collect();
        assert!(files.len() >= 12, "{} files", files.len());
        for file in files {
            let octets = std::fs::read(file.path()).unwrap();
            super::header(&octets);
            (0..octets.len()).for_each(|length| super::header(&octets[..length]));
        }
    }
}
