//! VXLAN (RFC 7348 §5): `flags 8 (only I, 0x08) | reserved 24 | VNI 24 | reserved 8`, then the inner Ethernet frame.

use dpumesh_core::Vni;

use super::field::be32;
use super::malformed::{Layer, Malformed};

/// A view of a UDP payload that is a VXLAN packet.
#[derive(Clone, Copy, Debug)]
pub struct Packet<T: AsRef<[u8]>> {
    buffer: T,
}

/// Octets of the header.
pub const HEADER_LEN: usize = 8;

/// UDP destination port (RFC 7348 §5).
pub const PORT: u16 = 4789;

mod at {
    pub(super) const FLAGS: usize = 0;
    pub(super) const VNI: usize = 4;
}

/// The flag that says that the VNI is valid.
const VALID_VNI: u8 = 0x08;

impl<T: AsRef<[u8]>> Packet<T> {
    /// A view of `buffer`.
    ///
    /// # Errors
    /// Fewer than 8 octets, or flags other than the I flag alone. RFC 7348 has receivers ignore the reserved bits;
    /// but there live extensions (group policy, generic protocol) that change what the packet means, and this
    /// dataplane implements none: it refuses them like Linux does.
    pub fn new(buffer: T) -> Result<Self, Malformed> {
        let octets = buffer.as_ref();
        Malformed::at_least(Layer::Vxlan, "header", HEADER_LEN, octets.len())?;
        let flags = octets[at::FLAGS];
        if flags != VALID_VNI {
            return Err(Malformed::invalid(
                Layer::Vxlan,
                "flags",
                u32::from(flags),
                "the I flag alone, 0x08",
            ));
        }
        Ok(Self { buffer })
    }

    /// Network identifier.
    pub fn vni(&self) -> Vni {
        let id = be32(self.buffer.as_ref(), at::VNI) >> 8;
        Vni::try_from(id).expect("24 bits are left of 32 after a shift by 8")
    }

    /// The inner Ethernet frame.
    pub fn payload(&self) -> &[u8] {
        &self.buffer.as_ref()[HEADER_LEN..]
    }
}

/// The header's octets for a network.
pub fn emit(vni: Vni) -> [u8; HEADER_LEN] {
    let [a, b, c, _] = (vni.get() << 8).to_be_bytes();
    [VALID_VNI, 0, 0, 0, a, b, c, 0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_is_read_as_emitted() {
        for id in [0, 1, 0xabcdef, 0xff_ffff] {
            let vni = Vni::try_from(id).expect("24 bits");
            let octets = [&emit(vni)[..], b"inner"].concat();
            let packet = Packet::new(&octets).expect("valid");
            assert_eq!((packet.vni(), packet.payload()), (vni, &b"inner"[..]));
        }
    }

    #[test]
    fn short_headers_and_foreign_flags_are_refused() {
        let header = emit(Vni::try_from(5).expect("24 bits"));
        for len in 0..HEADER_LEN {
            assert!(Packet::new(&header[..len]).unwrap_err().is_truncated());
        }
        for flags in [0, 0x88, 0x0c, 0xff] {
            let mut header = header;
            header[0] = flags;
            assert_eq!(Packet::new(header).unwrap_err().field, "flags");
        }
    }
}
