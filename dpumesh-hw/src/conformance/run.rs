//! [`run`]: the walk over the cases, one thread, one fresh rig and one deadline each. What no card of the fixture can show
//! is found out before, on one card for all cases.

use std::any::Any;
use std::collections::HashMap;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::cases::{CASES, Case};
use super::check::{CaseResult, Halt};
use super::expected::Expectations;
use super::report::{Entry, Outcome, Report};
use super::{Fixture, VERSION};

/// Runs the cases whose name contains `filter` (all for an empty one), or whose part is `filter`, in the order of [`CASES`], each
/// for at most `deadline`.
///
/// A failure, a panic or an overrun of one case is that case's outcome and never ends the run. A case that has blocked its
/// thread beyond the deadline keeps that thread; the run goes on without it.
pub async fn run(fixture: Arc<dyn Fixture>, filter: &str, deadline: Duration) -> Report {
    run_watched(fixture, filter, deadline, &mut |_| {}).await
}

/// Like [`run`], and shows each entry to `seen` as soon as its case has ended.
pub async fn run_watched(
    fixture: Arc<dyn Fixture>,
    filter: &str,
    deadline: Duration,
    seen: &mut (dyn FnMut(&Entry) + Send),
) -> Report {
    let expectations = fixture.expectations();
    let mut entries = Vec::new();
    let mut lacking = lacking(&fixture, filter, deadline).await;
    for case in CASES.iter().filter(|case| case.is_selected_by(filter)) {
        let begun = Instant::now();
        let result = match lacking.remove(case.name) {
            Some(halt) => Err(halt),
            None => run_case(&fixture, *case, deadline).await,
        };
        let outcome = judge(case.name, result, &expectations);
        let entry = Entry {
            part: case.part.to_owned(),
            case: case.name.to_owned(),
            sentence: case.sentence.to_owned(),
            outcome,
            micros: begun.elapsed().as_micros().try_into().unwrap_or(u64::MAX),
        };
        seen(&entry);
        entries.push(entry);
    }
    Report {
        fixture: fixture.name(),
        kit: VERSION.to_owned(),
        entries,
    }
}

fn judge(case: &str, result: CaseResult, expectations: &Expectations) -> Outcome {
    match (result, expectations.failures.get(case)) {
        (Ok(()), _) => Outcome::Passed,
        (Err(Halt::NotSupported { capability, reason }), _) => Outcome::NotSupported { capability, reason },
        (Err(Halt::Failed(message)), None) => Outcome::Failed { message },
        (Err(Halt::Failed(message)), Some(reason)) => Outcome::ExpectedFailure {
            reason: reason.clone(),
            message,
        },
    }
}

/// The cases that this fixture's cards cannot show, and what each is in want of, looked up on one card for all of them:
/// making a card may take longer than a case. Without a card to look at it is empty, and each case says why.
async fn lacking(
    fixture: &Arc<dyn Fixture>,
    filter: &str,
    deadline: Duration,
) -> HashMap<&'static str, Halt> {
    let (fixture, filter) = (Arc::clone(fixture), filter.to_owned());
    let look = supervised("needs", deadline, move || {
        on_this_thread(deadline, async {
            let rig = fixture.open().await?;
            let mut lacking = HashMap::new();
            for case in CASES.iter().filter(|case| case.is_selected_by(&filter)) {
                if let Err(halt @ Halt::NotSupported { .. }) = case.check_needs(&*rig).await {
                    lacking.insert(case.name, halt);
                }
            }
            Ok(lacking)
        })
    });
    look.await.unwrap_or_default()
}

async fn run_case(fixture: &Arc<dyn Fixture>, case: Case, deadline: Duration) -> CaseResult {
    let fixture = Arc::clone(fixture);
    let run = move || {
        on_this_thread(deadline, async {
            let rig = fixture.open().await?;
            case.check_needs(&*rig).await?;
            (case.run)(&*rig).await
        })
    };
    supervised(case.name, deadline, run).await
}

/// Work on a thread of its own, for at most `deadline`, whatever it does there.
async fn supervised<T: Send + 'static>(
    name: &str,
    deadline: Duration,
    work: impl FnOnce() -> Result<T, Halt> + Send + 'static,
) -> Result<T, Halt> {
    let (sender, answer) = oneshot::channel();
    let spawned = thread::Builder::new().name(name.to_owned()).spawn(move || {
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        let result = caught
            .unwrap_or_else(|payload| Err(Halt::Failed(format!("panicked: {}", panic_text(&*payload)))));
        let _ = sender.send(result); // nobody listens any more after the deadline
    });
    if let Err(error) = spawned {
        return Err(Halt::Failed(format!("no thread to run on: {error}")));
    }
    // The inner deadline speaks first unless the thread is blocked.
    let grace = deadline + deadline / 4 + Duration::from_millis(250);
    match tokio::time::timeout(grace, answer).await {
        Ok(Ok(result)) => result,
        Ok(Err(_)) => Err(Halt::Failed(
            "the case's thread ended without an answer".to_owned(),
        )),
        Err(_) => Err(Halt::Failed(format!(
            "blocked its thread for more than {deadline:?}: no call may block"
        ))),
    }
}

fn on_this_thread<T>(deadline: Duration, work: impl Future<Output = Result<T, Halt>>) -> Result<T, Halt> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Halt::Failed(format!("no runtime to run on: {error}")))?;
    runtime.block_on(async {
        tokio::time::timeout(deadline, work)
            .await
            .unwrap_or_else(|_| Err(Halt::Failed(format!("not done after {deadline:?}"))))
    })
}

fn panic_text(payload: &(dyn Any + Send)) -> &str {
    payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("without a message")
}

#[cfg(test)]
mod tests {
    use async_trait::async_trait;
    use dpumesh_core::Result;

    use super::*;
    use crate::conformance::Rig;

    /// Misbehaves before there is a card.
    #[derive(Debug)]
    enum Misfit {
        Panics,
        Hangs,
        Blocks,
    }

    #[async_trait]
    impl Fixture for Misfit {
        fn name(&self) -> String {
            "misfit".into()
        }

        async fn open(&self) -> Result<Box<dyn Rig>> {
            match self {
                Self::Panics => panic!("no card today"),
                Self::Hangs => std::future::pending().await,
                Self::Blocks => loop {
                    thread::park();
                },
            }
        }

        fn expectations(&self) -> Expectations {
            let reason = ("releasing_again_is_not_current".into(), "known".into());
            Expectations {
                failures: [reason].into(),
                ..Expectations::default()
            }
        }
    }

    async fn one(misfit: Misfit, case: &str) -> Outcome {
        // Long enough for a busy machine to start a thread; a case that hangs waits for all of it.
        let deadline = Duration::from_millis(500);
        let report = run(Arc::new(misfit), case, deadline).await;
        assert_eq!(report.entries.len(), 1, "{case} names one case");
        report.entries.into_iter().next().expect("one entry").outcome
    }

    #[tokio::test]
    async fn a_panic_an_overrun_and_a_blocked_thread_are_failures_of_their_case() {
        let case = "an_empty_owner_is_invalid";
        for (misfit, text) in [
            (Misfit::Panics, "panicked: no card today"),
            (Misfit::Hangs, "not done after"),
            (Misfit::Blocks, "blocked its thread"),
        ] {
            match one(misfit, case).await {
                Outcome::Failed { message } => assert!(message.starts_with(text), "{message}"),
                other => panic!("{other}"),
            }
        }
    }

    #[tokio::test]
    async fn a_listed_failure_is_expected() {
        let outcome = one(Misfit::Panics, "releasing_again_is_not_current").await;
        assert!(matches!(outcome, Outcome::ExpectedFailure { reason, .. } if reason == "known"));
    }

    #[tokio::test]
    async fn a_part_selects_its_cases() {
        let report = run(Arc::new(Misfit::Panics), "events", Duration::from_secs(1)).await;
        assert!(report.entries.len() > 5);
        assert!(
            report
                .entries
                .iter()
                .all(|entry| entry.part == "events" || entry.case.contains("events"))
        );
    }
}
