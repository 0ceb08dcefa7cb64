//! Numbers in network order at fixed places. A place outside the octets is the caller's bug: views check lengths
//! in their constructors, before anything here is called.

pub(super) fn be16(octets: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(array(octets, at))
}

pub(super) fn be32(octets: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(array(octets, at))
}

pub(super) fn array<const N: usize>(octets: &[u8], at: usize) -> [u8; N] {
    let mut value = [0; N];
    value.copy_from_slice(&octets[at..at + N]);
    value
}

pub(super) fn put<const N: usize>(octets: &mut [u8], at: usize, value: [u8; N]) {
    octets[at..at + N].copy_from_slice(&value);
}

pub(super) fn put16(octets: &mut [u8], at: usize, value: u16) {
    put(octets, at, value.to_be_bytes());
}

pub(super) fn put32(octets: &mut [u8], at: usize, value: u32) {
    put(octets, at, value.to_be_bytes());
}
