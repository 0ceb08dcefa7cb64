//! Flows offered to the network processor.
//!
//! A flow that is only forwarded and has shown itself worth it is offered; when the NP takes it, its frames are hardware's from
//! then on (on the emulator: counted as such), and when it is full the flow stays in software. A refused offer is no
//! error for the packet: software has forwarded it already.

use serde::{Deserialize, Serialize};

/// How many flows the NP holds by itself, beside steering rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowOffloadLimits {
    /// Flow entries of the NP; 0 offloads nothing.
    pub flows: u32,
    /// Packets that a flow must have had before it is offered.
    pub after_packets: u32,
}

impl Default for FlowOffloadLimits {
    /// No NP.
    fn default() -> Self {
        Self {
            flows: 0,
            after_packets: 8,
        }
    }
}

/// The NP's flow table as the worker sees it.
#[derive(Debug)]
pub(super) struct FlowOffload {
    limits: FlowOffloadLimits,
    used: u32,
}

/// What became of an offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Offer {
    /// Not worth it yet.
    TooYoung,
    /// The NP holds the flow now.
    Taken,
    /// The NP is full.
    Refused,
}

impl FlowOffload {
    pub(super) const fn new(limits: FlowOffloadLimits) -> Self {
        Self { limits, used: 0 }
    }

    /// Whether there is an NP to offer flows to.
    pub(super) const fn is_there(&self) -> bool {
        self.limits.flows > 0
    }

    /// Offers a flow that had `packets` packets. Offered once, at the threshold, so that a full NP is not asked again and
    /// again by the same flow.
    pub(super) fn offer(&mut self, packets: u32) -> Offer {
        if packets != self.limits.after_packets.max(1) {
            return Offer::TooYoung;
        }
        if self.used == self.limits.flows {
            return Offer::Refused;
        }
        self.used += 1;
        Offer::Taken
    }

    /// A flow left the NP.
    pub(super) fn gone(&mut self) {
        self.used -= 1;
    }

    /// All flows left the NP: rules changed, and each would have to be judged anew.
    pub(super) fn clear(&mut self) {
        self.used = 0;
    }

    pub(super) const fn used(&self) -> u32 {
        self.used
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offers_end_when_the_np_is_full_and_begin_again_after_a_flow_left() {
        let mut np = FlowOffload::new(FlowOffloadLimits {
            flows: 1,
            after_packets: 2,
        });
        assert_eq!(np.offer(1), Offer::TooYoung);
        assert_eq!(np.offer(2), Offer::Taken);
        assert_eq!(np.offer(2), Offer::Refused);
        np.gone();
        assert_eq!(np.offer(2), Offer::Taken);
    }
}
