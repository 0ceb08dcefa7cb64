//! Faults injected on purpose: a delay, an answer in place of the endpoint's.

use std::time::Duration;

use super::{HeaderMatch, RequestView};

/// `envoy.extensions.filters.http.fault.v3.HTTPFault`.
#[derive(Debug, Default)]
pub struct Fault {
    /// How many requests wait, and how long.
    pub delay: Option<(Percentage, Duration)>,
    /// How many requests are answered with this status.
    pub abort: Option<(Percentage, u16)>,
    /// The gRPC status of that answer to gRPC requests, where it is not the one that the HTTP status stands for.
    pub grpc_status: Option<u32>,
    /// Only requests of which all of these hold.
    pub headers: Vec<HeaderMatch>,
}

/// `FractionalPercent`: so many of so many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Percentage {
    /// So many.
    pub numerator: u64,
    /// Of so many: 100, 10 000 or 1 000 000.
    pub denominator: u64,
}

impl Percentage {
    /// All of them.
    pub const ALL: Self = Self {
        numerator: 100,
        denominator: 100,
    };

    /// None of them.
    pub const NONE: Self = Self {
        numerator: 0,
        denominator: 100,
    };

    /// Whether a request with this random number is among them.
    pub fn takes(self, random: u64) -> bool {
        random % self.denominator < self.numerator
    }
}

impl Fault {
    /// Whether the request is one that faults are for.
    pub fn concerns(&self, request: &impl RequestView) -> bool {
        self.headers.iter().all(|h| h.holds(request))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentage_takes_its_share() {
        let mut random = fastrand::Rng::with_seed(7);
        let tenth = Percentage {
            numerator: 100_000,
            denominator: 1_000_000,
        };
        let taken = (0..100_000).filter(|_| tenth.takes(random.u64(..))).count();
        // Three standard deviations of 100 000 draws at 10 % are 285.
        assert!((9_715..=10_285).contains(&taken), "{taken}");
        let all = Percentage {
            numerator: 100,
            denominator: 100,
        };
        assert!(all.takes(u64::MAX));
        let none = Percentage {
            numerator: 0,
            denominator: 100,
        };
        assert!(!none.takes(0));
    }
}
