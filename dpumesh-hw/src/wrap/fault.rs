//! [`Fault`]: a backend that fails as told, the same way for the same seed and the same calls.
//!
//! A [`FaultRule`] names a method, says which of its calls it strikes, and how. Control calls can fail with any effect, be
//! delayed, or be carried out without ever completing (the caller's deadline drops them); a batch of rules is then
//! carried out in part. Data-path calls can fail before they do anything.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use dpumesh_core::steering::{Atomicity, Batch, BatchOutcome};
use dpumesh_core::{Backend, Effect, Error, ErrorKind, Event, Fence, FlowSteering, Result};

use super::around::{Around, Call, Layer};

/// A backend with injected faults.
pub type Fault = Around<Faults>;

/// The layer of [`Fault`].
pub struct Faults {
    state: Mutex<State>,
    reset: Option<Box<dyn Fn() + Send + Sync>>,
}

/// Which calls of which method go wrong, and how.
#[derive(Clone, Debug)]
pub struct FaultRule {
    method: &'static str,
    when: When,
    what: What,
}

/// A fault that cannot be injected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{method}: {reason}")]
pub struct InvalidFault {
    method: &'static str,
    reason: &'static str,
}

#[derive(Clone, Copy, Debug)]
enum When {
    Always,
    Nth(u64),
    PerMille(u32),
}

#[derive(Clone, Copy, Debug)]
enum What {
    Fail(ErrorKind, Effect),
    Delay(Duration),
    Stall,
    Reset,
}

#[derive(Debug)]
struct State {
    rules: Vec<(FaultRule, u64)>,
    random: SplitMix,
    injected: u64,
}

impl Fault {
    /// A backend without faults so far; `seed` decides all that is left to chance.
    pub fn new(inner: Arc<dyn Backend>, seed: u64) -> Self {
        Self::with_layer(inner, Faults::new(seed, None))
    }

    /// As [`Fault::new`], with a way to reset the card, for [`FaultRule::resets`].
    pub fn with_reset(inner: Arc<dyn Backend>, seed: u64, reset: impl Fn() + Send + Sync + 'static) -> Self {
        Self::with_layer(inner, Faults::new(seed, Some(Box::new(reset))))
    }

    /// Adds a fault. Of several that strike one call, the one added first counts.
    ///
    /// # Errors
    /// The method does not exist, or cannot go wrong in this way.
    pub fn add(&self, rule: FaultRule) -> Result<(), InvalidFault> {
        rule.check(self.layer().reset.is_some())?;
        self.layer().state().rules.push((rule, 0));
        Ok(())
    }

    /// Removes all faults.
    pub fn clear(&self) {
        self.layer().state().rules.clear();
    }

    /// How many faults struck.
    pub fn injected(&self) -> u64 {
        self.layer().state().injected
    }
}

impl FaultRule {
    /// About a method, as `steering.apply`; `*` is every control call.
    pub const fn on(method: &'static str) -> Self {
        Self {
            method,
            when: When::Always,
            what: What::Stall,
        }
    }

    /// Strikes the nth call only, counted from 1 from when the rule is added.
    pub const fn nth(mut self, n: u64) -> Self {
        self.when = When::Nth(n);
        self
    }

    /// Strikes so many calls of a thousand.
    pub const fn per_mille(mut self, chance: u32) -> Self {
        self.when = When::PerMille(chance);
        self
    }

    /// The call fails. With [`Effect::None`] the inner call is not made; with `Applied` it is; with `Unknown` chance
    /// decides. With `Partial` a batch of rules is carried out up to some operation, any other call in full. A batch
    /// that promises all or nothing is carried out so, and reported as `Unknown`.
    pub const fn fails(mut self, kind: ErrorKind, effect: Effect) -> Self {
        self.what = What::Fail(kind, effect);
        self
    }

    /// The call is made after so long.
    pub const fn delays(mut self, time: Duration) -> Self {
        self.what = What::Delay(time);
        self
    }

    /// The call is made, a batch of rules up to some operation, and never completes.
    pub const fn stalls(mut self) -> Self {
        self.what = What::Stall;
        self
    }

    /// The card is reset just before the call.
    pub const fn resets(mut self) -> Self {
        self.what = What::Reset;
        self
    }

    fn check(&self, can_reset: bool) -> Result<(), InvalidFault> {
        let refuse = |reason| {
            Err(InvalidFault {
                method: self.method,
                reason,
            })
        };
        let is_inline = INLINE.contains(&self.method);
        if !is_inline && self.method != "*" && !CONTROL.contains(&self.method) {
            return refuse("there is no such method");
        }
        match self.what {
            What::Fail(_, Effect::None) => Ok(()),
            What::Reset if !can_reset => refuse("nobody said how to reset the card"),
            _ if is_inline => refuse("a data-path call can only fail without effect"),
            _ => Ok(()),
        }
    }

    fn is_about(&self, method: &str) -> bool {
        self.method == method || (self.method == "*" && !INLINE.contains(&method))
    }
}

const CONTROL: &[&str] = &[
    "vf.plan_vf_count",
    "vf.set_vf_count",
    "vf.list",
    "vf.lease",
    "vf.admit",
    "vf.revoke",
    "vf.configure",
    "vf.attach",
    "vf.detach",
    "vf.release",
    "vf.reclaim",
    "steering.validate",
    "steering.apply",
    "steering.list",
    "steering.counters",
    "steering.flush",
    "steering.set_miss_policy",
    "steering.occupancy",
    "offload.programs",
    "offload.load",
    "offload.activate",
    "offload.unload",
    "offload.tables",
    "offload.write",
    "offload.read",
    "offload.offload_connection",
    "offload.resume",
    "offload.stats",
    "transport.listen",
    "transport.connect",
    "transport.accept",
    "ports.list",
    "ports.open",
];

const INLINE: &[&str] = &[
    "transport.send",
    "transport.send_with",
    "transport.receive",
    "transport.arm",
    "ports.receive",
    "ports.transmit",
];

impl Faults {
    fn new(seed: u64, reset: Option<Box<dyn Fn() + Send + Sync>>) -> Self {
        let state = State {
            rules: Vec::new(),
            random: SplitMix(seed),
            injected: 0,
        };
        Self {
            state: Mutex::new(state),
            reset,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing in here panics half-way: the state is whole whatever happened to the other thread.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What strikes this call; resets are done already.
    fn strike(&self, method: &str) -> Option<What> {
        let what = self.state().strike(method)?;
        if let What::Reset = what {
            if let Some(reset) = &self.reset {
                reset();
            }
            return None;
        }
        Some(what)
    }

    fn coin(&self) -> bool {
        self.state().random.below(2) == 1
    }

    /// How much of a batch is carried out before it goes wrong, and what may be said of it.
    fn part(&self, batch: &Batch) -> (Batch, Effect) {
        let count = batch.operations.len();
        if batch.atomicity == Atomicity::Continue {
            let some = self.state().random.below(count as u64 + 1) as usize;
            let operations = batch.operations[..some].to_vec();
            return (Batch::new(operations), Effect::Partial);
        }
        let operations = if self.coin() {
            batch.operations.clone()
        } else {
            Vec::new()
        };
        (Batch::new(operations).with(batch.atomicity), Effect::Unknown)
    }
}

impl Layer for Faults {
    async fn around<'a, T: Send + 'a>(
        &'a self,
        call: Call,
        run: impl Future<Output = Result<T>> + Send + 'a,
    ) -> Result<T> {
        match self.strike(call.method) {
            None | Some(What::Reset) => run.await,
            Some(What::Delay(time)) => {
                tokio::time::sleep(time).await;
                run.await
            }
            Some(What::Stall) => {
                run.await?;
                std::future::pending().await
            }
            Some(What::Fail(kind, effect)) => {
                let carried_out = match effect {
                    Effect::None => false,
                    Effect::Applied | Effect::Partial => true,
                    Effect::Unknown => self.coin(),
                };
                if carried_out {
                    run.await?;
                }
                Err(injected(call, kind, effect))
            }
        }
    }

    fn inline<T>(&self, call: Call, run: impl FnOnce() -> Result<T>) -> Result<T> {
        match self.strike(call.method) {
            Some(What::Fail(kind, effect)) => Err(injected(call, kind, effect)),
            _ => run(),
        }
    }

    async fn around_apply<'a>(
        &'a self,
        call: Call,
        steering: &'a dyn FlowSteering,
        fence: Fence,
        batch: &'a Batch,
    ) -> Result<BatchOutcome> {
        match self.strike(call.method) {
            None | Some(What::Reset) => steering.apply(fence, batch).await,
            Some(What::Delay(time)) => {
                tokio::time::sleep(time).await;
                steering.apply(fence, batch).await
            }
            Some(What::Stall) => {
                steering.apply(fence, &self.part(batch).0).await?;
                std::future::pending().await
            }
            Some(What::Fail(kind, Effect::Partial)) => {
                let (part, effect) = self.part(batch);
                steering.apply(fence, &part).await?;
                Err(injected(call, kind, effect))
            }
            Some(What::Fail(kind, effect)) => {
                if effect == Effect::Applied || (effect == Effect::Unknown && self.coin()) {
                    steering.apply(fence, batch).await?;
                }
                Err(injected(call, kind, effect))
            }
        }
    }

    fn event(&self, _event: &Event) {}
}

impl fmt::Debug for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Faults")
            .field("state", &self.state())
            .finish_non_exhaustive()
    }
}

impl State {
    fn strike(&mut self, method: &str) -> Option<What> {
        let mut struck = None;
        for (rule, calls) in self.rules.iter_mut().filter(|(rule, _)| rule.is_about(method)) {
            *calls += 1;
            let strikes = match rule.when {
                When::Always => true,
                When::Nth(n) => *calls == n,
                When::PerMille(chance) => self.random.below(1000) < chance.into(),
            };
            if strikes && struck.is_none() {
                struck = Some(rule.what);
            }
        }
        self.injected += u64::from(struck.is_some());
        struck
    }
}

fn injected(call: Call, kind: ErrorKind, effect: Effect) -> Error {
    Error::new(kind, call.method, "an injected fault").effect(effect)
}

/// SplitMix64 (Steele, Lea, Flood 2014): reproducible everywhere, and good enough to choose faults.
#[derive(Debug)]
struct SplitMix(u64);

impl SplitMix {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound.max(1)
    }
}
