//! What happens to rules outside of batches: they age, and begin a new life with the card.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use dpumesh_core::steering::{Batch, Change, Cookie, Counters, Operation, Owner, SteeringRule};
use dpumesh_core::{Capabilities, ErrorKind, Event, Result};

use super::counting::{counts, in_l2, since, total};
use crate::rules::{Rules, Script};
use crate::worker::Worker;

impl Worker {
    /// The card says that nothing hit a rule for its idle time.
    pub(crate) async fn aged(&mut self, user: u64) {
        let Some((owner, cookie)) = self.rules.named(user) else {
            return; // removed meanwhile
        };
        let batch = Batch::new(vec![Operation::Remove { owner, cookie }]);
        let Ok(outcome) = self.apply(&batch).await else {
            return; // the card is away: its rules begin a new life
        };
        if let Some(Ok(Change::Removed(counters))) = outcome.results.into_iter().next() {
            let rules = vec![(cookie, counters)];
            self.shared.raise(&Event::Aged { owner, rules });
        }
    }

    /// Software removed rules that nothing hit.
    pub(crate) fn aged_in_software(&mut self, owner: Owner, aged: Vec<(Cookie, Option<Counters>)>) {
        let epoch = self.shared.life().epoch;
        let unit = self.soft_unit();
        let mut gone = Vec::new();
        for (cookie, counters) in aged {
            let Some(rule) = self
                .rules
                .rule_of(owner, cookie)
                .filter(|rule| rule.hard.is_none())
            else {
                continue;
            };
            let (carried, base) = (rule.carried, rule.base);
            let counters = counters.map(|counters| {
                let soft = in_l2((counters.packets, counters.octets), unit);
                total(&[carried, since(soft, base)], epoch)
            });
            let remove = Batch::new(vec![Operation::Remove { owner, cookie }]);
            // In the books only: software has done it.
            if self.rules.decide(&remove, &[]).is_ok() {
                gone.push((cookie, counters));
            }
        }
        self.rules.tables.settle();
        if !gone.is_empty() {
            self.shared.raise(&Event::Aged { owner, rules: gone });
        }
    }

    /// Puts the rules of the former life into the present one and says how many there are.
    pub(crate) async fn replay(
        &mut self,
        former: &Rules,
        capabilities: &Capabilities,
        same_floor: bool,
    ) -> Result<usize> {
        let mut rules: Vec<Arc<SteeringRule>> = former.all().map(|rule| Arc::clone(&rule.rule)).collect();
        // Winners first: a rule then finds those that keep it out of hardware, instead of being demoted by them.
        rules.sort_unstable_by_key(|rule| (rule.group, rule.priority, rule.cookie));
        let longest = capabilities.steering.batch_max.max(1) as usize;
        let mut refused: Vec<Operation> = Vec::new();
        let mut count = 0;
        for chunk in rules.chunks(longest) {
            if same_floor {
                self.forget_timed(chunk).await?;
            }
            let add = |rule: &Arc<SteeringRule>| Operation::Add((**rule).clone());
            let outcome = self.apply(&Batch::new(chunk.iter().map(add).collect())).await?;
            for (rule, result) in chunk.iter().zip(outcome.results) {
                match result {
                    Ok(_) => count += 1,
                    Err(_) if self.rules.rule_of(rule.owner, rule.cookie).is_some() => count += 1,
                    Err(failed) => {
                        tracing::warn!(cookie = %rule.cookie, %failed, "a rule did not come back");
                        refused.push(Operation::Remove {
                            owner: rule.owner,
                            cookie: rule.cookie,
                        });
                    }
                }
            }
        }
        if same_floor {
            let _ = self
                .tell(Script {
                    soft: refused.into_iter().map(|operation| (0, operation)).collect(),
                    ..Script::default()
                })
                .await;
            self.rebase().await?;
        }
        Ok(count)
    }

    /// Software's copies of rules that age differ by where the rule is: they are made anew.
    async fn forget_timed(&mut self, rules: &[Arc<SteeringRule>]) -> Result<()> {
        let timed = rules.iter().filter(|rule| rule.idle_timeout_ms.is_some());
        let soft: Vec<(usize, Operation)> = timed
            .map(|rule| {
                let (owner, cookie) = (rule.owner, rule.cookie);
                (0, Operation::Remove { owner, cookie })
            })
            .collect();
        let told = self
            .tell(Script {
                soft,
                ..Script::default()
            })
            .await;
        match told
            .soft_failed
            .into_values()
            .find(|failed| failed.kind == ErrorKind::DeviceLost)
        {
            Some(lost) => Err(lost),
            None => Ok(()),
        }
    }

    /// What software has counted so far belongs to the former life.
    async fn rebase(&mut self) -> Result<()> {
        let mut by_owner: BTreeMap<Owner, Vec<Cookie>> = BTreeMap::new();
        for rule in self.rules.all().filter(|rule| rule.soft && counts(&rule.rule)) {
            by_owner
                .entry(rule.rule.owner)
                .or_default()
                .push(rule.rule.cookie);
        }
        let mut bases: HashMap<Cookie, (u64, u64)> = HashMap::new();
        for (owner, cookies) in by_owner {
            let counted = self.soft_counters(owner, &cookies).await?;
            bases.extend(cookies.into_iter().zip(counted));
        }
        for rule in self.rules.all_mut() {
            rule.base = bases.get(&rule.rule.cookie).copied().unwrap_or_default();
        }
        Ok(())
    }
}
