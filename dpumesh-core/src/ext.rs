//! Comfort over the backend traits: built from them alone, so every backend has it and no wrapper can lose it.

use std::collections::BTreeMap;

use async_trait::async_trait;

use crate::backend::{Backend, Fence};
use crate::error::{Error, ErrorKind, Result};
use crate::offload::NpOffload;
use crate::port::Ports;
use crate::steering::{
    Atomicity, Batch, BatchOutcome, Cookie, FlowSteering, InstalledRule, Operation, Owner, SteeringRule,
};
use crate::transport::ShmTransport;
use crate::vf::VfAllocator;

/// The parts of a backend that a caller cannot do without.
pub trait BackendExt: Backend {
    /// Fence of the card's present life.
    fn fence(&self) -> Fence {
        Fence(self.epoch())
    }

    /// The VF part, or an error that names the backend.
    ///
    /// # Errors
    /// `Unsupported`.
    fn require_vf(&self) -> Result<&dyn VfAllocator> {
        self.vf().ok_or_else(|| lacks(self.info().name, "vf"))
    }

    /// The steering part, or an error that names the backend.
    ///
    /// # Errors
    /// `Unsupported`.
    fn require_steering(&self) -> Result<&dyn FlowSteering> {
        self.steering().ok_or_else(|| lacks(self.info().name, "steering"))
    }

    /// The NP part, or an error that names the backend.
    ///
    /// # Errors
    /// `Unsupported`.
    fn require_offload(&self) -> Result<&dyn NpOffload> {
        self.offload().ok_or_else(|| lacks(self.info().name, "offload"))
    }

    /// The transport part, or an error that names the backend.
    ///
    /// # Errors
    /// `Unsupported`.
    fn require_transport(&self) -> Result<&dyn ShmTransport> {
        self.transport()
            .ok_or_else(|| lacks(self.info().name, "transport"))
    }

    /// The ports part, or an error that names the backend.
    ///
    /// # Errors
    /// `Unsupported`.
    fn require_ports(&self) -> Result<&dyn Ports> {
        self.ports().ok_or_else(|| lacks(self.info().name, "ports"))
    }
}

impl<B: Backend + ?Sized> BackendExt for B {}

fn lacks(backend: String, part: &'static str) -> Error {
    Error::new(
        ErrorKind::Unsupported,
        format!("backend.{part}"),
        "this backend has no such part",
    )
    .backend(backend)
}

/// What a caller of steering does all the time.
#[async_trait]
pub trait FlowSteeringExt: FlowSteering {
    /// Makes an owner's rules equal to `rules`: adds what is missing, then removes what is too many.
    ///
    /// Add before remove, so that no frame finds a gap; rules that stay keep their counters. A cookie whose rule
    /// changed is removed and added at its place in the batch: use a new cookie where that matters. With `atomicity`
    /// [`Atomicity::Atomic`] no frame meets anything between the old set and the new.
    ///
    /// [`Atomicity::Continue`] goes on after a refused addition, so it cannot change a rule under its cookie: the old
    /// one would be gone without the new, and a rule of lower priority would get its frames. Such a set is refused
    /// before anything is changed. Removals of other cookies are carried out whether or not the additions were: who
    /// continues reads the results.
    ///
    /// # Errors
    /// `Invalid` (a rule of another owner, or one that changed under its cookie with `Continue`; the field is named),
    /// and those of [`FlowSteering::list`] and [`FlowSteering::apply`].
    async fn replace(
        &self,
        fence: Fence,
        owner: Owner,
        rules: Vec<SteeringRule>,
        atomicity: Atomicity,
    ) -> Result<BatchOutcome> {
        if let Some(index) = rules.iter().position(|rule| rule.owner != owner) {
            return Err(refuse(index, "owner", "the rule belongs to another owner"));
        }
        let installed = self.list(owner).await?;
        if atomicity == Atomicity::Continue
            && let Some(index) = changed(&installed, &rules)
        {
            let reason = "another rule is installed under this cookie, and with `continue` a refused addition would \
                          leave none: use a new cookie or another atomicity";
            return Err(refuse(index, "cookie", reason));
        }
        let operations = difference(owner, &installed, rules);
        self.apply(fence, &Batch::new(operations).with(atomicity)).await
    }

    /// Installs one rule.
    ///
    /// # Errors
    /// Those of the operation.
    async fn add(&self, fence: Fence, rule: SteeringRule) -> Result<crate::steering::Change> {
        let outcome = self.apply(fence, &Batch::new(vec![Operation::Add(rule)])).await?;
        only(outcome)
    }

    /// Removes one rule.
    ///
    /// # Errors
    /// Those of the operation.
    async fn remove(&self, fence: Fence, owner: Owner, cookie: Cookie) -> Result<crate::steering::Change> {
        let outcome = self
            .apply(fence, &Batch::new(vec![Operation::Remove { owner, cookie }]))
            .await?;
        only(outcome)
    }
}

impl<S: FlowSteering + ?Sized> FlowSteeringExt for S {}

fn only(outcome: BatchOutcome) -> Result<crate::steering::Change> {
    outcome.results.into_iter().next().unwrap_or_else(|| {
        Err(Error::new(
            ErrorKind::Fault,
            "steering.apply",
            "the backend returned no result for the operation",
        ))
    })
}

/// An error about a rule of the set that [`FlowSteeringExt::replace`] was given.
fn refuse(index: usize, field: &'static str, reason: &'static str) -> Error {
    Error::new(ErrorKind::Invalid, "steering.replace", reason)
        .object("rules")
        .index(index)
        .field(field)
}

/// Index of the first wanted rule whose cookie is installed with something else.
fn changed(installed: &[InstalledRule], wanted: &[SteeringRule]) -> Option<usize> {
    let installed: BTreeMap<Cookie, &SteeringRule> =
        installed.iter().map(|i| (i.rule.cookie, &i.rule)).collect();
    wanted
        .iter()
        .position(|rule| installed.get(&rule.cookie).is_some_and(|old| *old != rule))
}

/// The operations that turn `installed` into `wanted`: additions first, then removals; a changed rule is removed just
/// before it is added.
pub fn difference(owner: Owner, installed: &[InstalledRule], wanted: Vec<SteeringRule>) -> Vec<Operation> {
    let mut obsolete: BTreeMap<Cookie, &SteeringRule> =
        installed.iter().map(|i| (i.rule.cookie, &i.rule)).collect();
    let mut operations = Vec::new();
    for rule in wanted {
        match obsolete.remove(&rule.cookie) {
            Some(old) if *old == rule => {}
            Some(_) => {
                operations.push(Operation::Remove {
                    owner,
                    cookie: rule.cookie,
                });
                operations.push(Operation::Add(rule));
            }
            None => operations.push(Operation::Add(rule)),
        }
    }
    operations.extend(
        obsolete
            .into_keys()
            .map(|cookie| Operation::Remove { owner, cookie }),
    );
    operations
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::steering::{Action, Pattern, Placement, Priority};

    fn rule(cookie: u128, action: Action) -> SteeringRule {
        SteeringRule::new(
            Cookie(cookie),
            Owner::Agent,
            Priority(0),
            Pattern::default(),
            vec![action],
        )
    }

    #[test]
    fn a_rule_that_changed_under_its_cookie_is_found() {
        let installed: Vec<_> = [rule(1, Action::Drop), rule(2, Action::Drop)]
            .into_iter()
            .map(|rule| InstalledRule::new(rule, Placement::Hardware))
            .collect();
        let cases = [
            (vec![], None),
            (vec![rule(1, Action::Drop), rule(3, Action::Punt)], None),
            (vec![rule(1, Action::Drop), rule(2, Action::Punt)], Some(1)),
            (vec![rule(1, Action::Punt)], Some(0)),
        ];
        for (wanted, index) in cases {
            assert_eq!(changed(&installed, &wanted), index, "{wanted:?}");
        }
    }

    #[test]
    fn additions_come_before_removals_and_equal_rules_stay() {
        let installed: Vec<_> = [
            rule(1, Action::Drop),
            rule(2, Action::Drop),
            rule(3, Action::Drop),
        ]
        .into_iter()
        .map(|rule| InstalledRule::new(rule, Placement::Hardware))
        .collect();
        let wanted = vec![
            rule(2, Action::Drop),
            rule(3, Action::Punt),
            rule(4, Action::Drop),
        ];
        let owner = Owner::Agent;
        assert_eq!(
            difference(owner, &installed, wanted),
            vec![
                Operation::Remove {
                    owner,
                    cookie: Cookie(3)
                },
                Operation::Add(rule(3, Action::Punt)),
                Operation::Add(rule(4, Action::Drop)),
                Operation::Remove {
                    owner,
                    cookie: Cookie(1)
                },
            ]
        );
    }
}
