//! Libraries that break the interface, each in one way, compiled from `broken.c`: each gets an error that names it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use dpumesh_core::steering::{Action, Cookie, Owner, Pattern, Priority, SteeringRule, Verdict};
use dpumesh_core::{
    Backend, BackendExt, Capabilities, Epoch, Error, ErrorKind, Event, EventStream, Frame, PortIo, PortRef,
};
use dpumesh_hw::loader::{Calls, Library, LoadError, Manifest};

use crate::header::cc;

/// Shorter than a test's patience, longer than a loaded machine's pauses.
const SOON: Duration = Duration::from_millis(400);

/// Compiles a library that is broken in this way.
fn library(folder: &Path, how: &str) -> PathBuf {
    let path = folder.join(format!("{how}.so"));
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/loader/broken.c");
    let broken = format!("-DBREAK={how}");
    let (to, from) = (path.to_str().expect("plain"), source.to_str().expect("plain"));
    cc(&["-shared", "-fPIC", &broken, "-o", to, from]);
    path
}

fn open(how: &str) -> Result<Arc<dyn Backend>, LoadError> {
    let folder = tempfile::tempdir().expect("a folder");
    Library::open(&Manifest::of(library(folder.path(), how)).with_deadline(SOON))
}

fn rule(cookie: u128) -> SteeringRule {
    SteeringRule::new(
        Cookie(cookie),
        Owner::Agent,
        Priority(0),
        Pattern::default(),
        vec![Action::Drop],
    )
}

async fn validate(backend: &Arc<dyn Backend>) -> Result<Vec<Verdict>, Error> {
    let steering = backend.steering().expect("it steers");
    steering.validate(&[rule(1), rule(2)]).await
}

#[tokio::test]
async fn a_library_that_breaks_nothing_is_loaded() {
    let backend = open("NOTHING").expect("loaded");
    assert_eq!(backend.info().name, "broken");
    let software = || Verdict::Software("so".to_owned());
    assert_eq!(
        validate(&backend).await.expect("judged"),
        vec![software(), software()]
    );
    assert!(backend.vf().is_none() && backend.ports().is_none() && backend.transport().is_none());
}

#[test]
fn what_is_wrong_with_a_table_or_a_card_is_named() {
    for (how, named) in [
        ("GETTER_FAILS", "kernel too old"),
        ("GETTER_STATUS", "status 3"),
        ("GETTER_HANGS", "not returned from `dpumesh_backend_v1`"),
        (
            "MAJOR",
            "speaks version 2 of the interface, this program version 1",
        ),
        ("SHORT_TABLE", "table has 64 octets"),
        ("NO_OPEN", "has no `open`"),
        ("HALF_PART", "part `steering`, but not `steering_flush`"),
        ("OPEN_FAILS", "no card on slot 7"),
        ("OPEN_HANGS", "not returned from `open`"),
        ("OPEN_STATUS", "status 77"),
        ("OPEN_MESSAGE", "error.message does not end within its 320 octets"),
        ("INFO_SIZE", "dm_info of size 12"),
        ("INFO_ROLE", "info.role is 9"),
        ("INFO_TEXT", "info.version does not end within its 64 octets"),
        ("CAPABILITIES_SIZE", "dm_capabilities of size 1048576"),
        (
            "CAPABILITIES_BITS",
            "capabilities.actions has bits that mean nothing",
        ),
        ("CAPABILITIES_FLAG", "capabilities.idle_timeout is 2"),
        (
            "CLAIMS_ABSENT_PART",
            "the part `offload` is claimed, but the table has no `offload_programs`",
        ),
        ("CLAIMS_NO_RULES", "claimed with `rules` of zero"),
        ("CLAIMS_MORE_HARDWARE", "9 rules in hardware, but 8 in all"),
        ("CLAIMS_NO_CONTINUE", "without DM_CONTINUE"),
    ] {
        let error = open(how).map(|_| ()).expect_err(how);
        assert!(error.to_string().contains(named), "{how}: {error}");
    }
}

#[test]
fn each_kind_of_refusal_can_be_told_by_a_program() {
    let kind = |how| open(how).map(|_| ()).expect_err(how);
    assert_eq!(kind("MAJOR"), LoadError::Major { theirs: 2, ours: 1 });
    assert!(matches!(
        kind("SHORT_TABLE"),
        LoadError::ShortTable { size: 64, .. }
    ));
    assert_eq!(kind("NO_OPEN"), LoadError::NullFunction { function: "open" });
    assert!(matches!(
        kind("INFO_SIZE"),
        LoadError::Broken { function: "info", .. }
    ));
    assert!(matches!(
        kind("OPEN_HANGS"),
        LoadError::Hangs { function: "open", .. }
    ));
    assert!(matches!(kind("CLAIMS_NO_RULES"), LoadError::Lies { .. }));
    assert!(matches!(kind("OPEN_FAILS"), LoadError::Backend(error) if error.kind == ErrorKind::NotFound));
}

#[test]
fn a_file_that_is_no_backend_is_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let text = folder.path().join("text.so");
    std::fs::write(&text, "not a library").expect("written");
    let error = Library::open(&Manifest::of(&text))
        .map(|_| ())
        .expect_err("no library");
    assert!(matches!(&error, LoadError::Linker { .. }), "{error}");
    let source = folder.path().join("empty.c");
    std::fs::write(&source, "int nothing_here;\n").expect("written");
    let empty = folder.path().join("empty.so");
    let plain = |path: &Path| path.to_str().expect("plain").to_owned();
    cc(&["-shared", "-fPIC", "-o", &plain(&empty), &plain(&source)]);
    let error = Library::open(&Manifest::of(&empty))
        .map(|_| ())
        .expect_err("no symbol");
    assert!(
        error.to_string().contains("no symbol `dpumesh_backend_v1`"),
        "{error}"
    );
}

#[test]
fn what_a_manifest_requires_is_compared() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut required = Capabilities::default();
    required.steering.rules = 1000;
    let manifest = Manifest::of(library(folder.path(), "NOTHING")).requiring(required);
    let error = Library::open(&manifest).map(|_| ()).expect_err("too few rules");
    assert!(
        error
            .to_string()
            .contains("steering.rules: 1000 required, 8 offered"),
        "{error}"
    );
}

#[test]
fn inline_calls_need_a_library_that_is_thread_safe() {
    let folder = tempfile::tempdir().expect("a folder");
    let manifest = Manifest::of(library(folder.path(), "NOTHING")).with_calls(Calls::Inline);
    let error = Library::open(&manifest).map(|_| ()).expect_err("not thread safe");
    assert!(error.to_string().contains("DM_THREAD_SAFE"), "{error}");
}

#[tokio::test]
async fn an_answer_that_breaks_the_interface_is_an_error_of_its_call() {
    for (how, named) in [
        ("CALL_STATUS", "status 77"),
        ("CALL_MORE", "an answer of 18446744073709551615 elements"),
        ("ERROR_KIND", "error.kind is 1234"),
        (
            "ERROR_MESSAGE",
            "error.message does not end within its 320 octets",
        ),
        ("VERDICT_CODE", "verdict.verdict is 55"),
        ("VERDICT_SIZE", "dm_verdict of size 5000"),
        (
            "VERDICT_POINTER",
            "verdict.reason points outside of the call's arena",
        ),
        ("VERDICT_FEW", "1 answers to 2 questions"),
        ("VERDICT_MANY", "1000 elements in room for 2"),
    ] {
        let backend = open(how).expect(how);
        let error = validate(&backend).await.expect_err(how);
        assert_eq!(error.kind, ErrorKind::Abi, "{how}: {error}");
        assert!(error.to_string().contains(named), "{how}: {error}");
    }
}

#[tokio::test]
async fn a_call_that_never_returns_ends_with_the_deadline_and_holds_nobody_up() {
    let backend = open("CALL_HANGS").expect("opened");
    let begun = Instant::now();
    let error = validate(&backend).await.expect_err("it hangs");
    assert_eq!(error.kind, ErrorKind::Timeout, "{error}");
    assert!(
        error
            .to_string()
            .contains("has not returned from `steering.validate`"),
        "{error}"
    );
    assert!(begun.elapsed() >= SOON);
    let begun = Instant::now();
    let error = validate(&backend).await.expect_err("it still hangs");
    assert_eq!(error.kind, ErrorKind::Abi, "{error}");
    assert!(begun.elapsed() < SOON, "refused at once");
    assert_eq!(backend.epoch().0, 0, "what does not wait still works");
}

/// What an event tells of the card's health, soon.
async fn health(events: &mut Box<dyn EventStream>) -> Option<Error> {
    match tokio::time::timeout(Duration::from_secs(20), events.next()).await {
        Ok(Some(Event::Health(health))) => health,
        other => panic!("{other:?}"),
    }
}

/// The card is failed because of this function: who waits for it is told, and everybody is refused without waiting.
async fn all_is_refused(backend: Arc<dyn Backend>, mut events: Box<dyn EventStream>, stuck: &str) {
    let error = health(&mut events).await.expect("the card ails");
    let named = format!("has not returned from `{stuck}`");
    assert_eq!(error.kind, ErrorKind::Abi, "{error}");
    assert!(error.to_string().contains(&named), "{error}");

    let begun = Instant::now();
    let error = validate(&backend).await.expect_err("refused");
    assert_eq!(error.kind, ErrorKind::Abi, "{error}");
    assert!(error.to_string().contains(&named), "{error}");
    assert_eq!(backend.epoch(), Epoch(0), "the last one known");
    assert_eq!(backend.capabilities().steering.rules, 8, "those last known");
    drop(backend.events());
    drop(backend);
    assert!(begun.elapsed() < SOON, "nobody waits for the library");
}

async fn port(backend: &Arc<dyn Backend>, index: u16) -> Box<dyn PortIo> {
    let ports = backend.require_ports().expect("it has ports");
    ports
        .open(backend.fence(), PortRef::vf(index))
        .await
        .expect("opened")
}

#[tokio::test]
async fn a_port_that_never_returns_fails_the_card_for_everybody_else() {
    let backend = open("RECEIVE_HANGS").expect("opened");
    let events = backend.events();
    let (mut stuck, mut other) = (port(&backend, 0).await, port(&backend, 1).await);
    // Nobody can free this thread: it ends with the process.
    std::thread::spawn(move || stuck.receive(&mut [Frame::new()]));
    assert_eq!(other.transmit(&mut [Frame::new()]).expect("not yet noticed"), 1);
    assert_eq!(other.refused(), 3);
    all_is_refused(backend, events, "ports.receive").await;

    let begun = Instant::now();
    let error = other.transmit(&mut [Frame::new()]).expect_err("refused");
    assert_eq!(error.kind, ErrorKind::Abi, "{error}");
    assert_eq!(other.refused(), 3, "as last told");
    drop(other);
    assert!(begun.elapsed() < SOON, "nobody waits for the library");
}

#[tokio::test]
async fn a_card_whose_library_came_back_works_again() {
    let backend = open("RECEIVE_IS_SLOW").expect("opened");
    let mut events = backend.events();
    let (mut slow, mut other) = (port(&backend, 0).await, port(&backend, 1).await);
    let slow = std::thread::spawn(move || slow.receive(&mut [Frame::new()]).map(|_| slow));
    assert!(health(&mut events).await.is_some(), "failed");
    assert!(other.receive(&mut [Frame::new()]).is_err(), "refused");
    assert_eq!(health(&mut events).await, None, "well again");
    let mut slow = slow.join().expect("no panic").expect("it came back");
    for port in [&mut slow, &mut other] {
        assert_eq!(port.receive(&mut [Frame::new()]).expect("it works"), 0);
    }
    assert_eq!(validate(&backend).await.expect("judged").len(), 2);
}

#[tokio::test]
async fn a_quick_call_that_never_returns_fails_the_card_for_everybody_else() {
    for (how, stuck) in [
        ("EPOCH_HANGS", "backend.epoch"),
        ("EVENTS_HANG", "backend.events"),
    ] {
        let backend = open(how).expect("opened");
        let events = backend.events();
        validate(&backend)
            .await
            .expect("judged, and from now on it hangs");
        let caller = Arc::clone(&backend);
        std::thread::spawn(move || (caller.epoch(), caller.events()));
        all_is_refused(backend, events, stuck).await;
    }
}

#[tokio::test]
async fn an_inline_call_that_never_returns_fails_the_card_for_everybody_else() {
    let folder = tempfile::tempdir().expect("a folder");
    let manifest = Manifest::of(library(folder.path(), "INLINE_HANGS")).with_deadline(SOON);
    let backend = Library::open(&manifest.with_calls(Calls::Inline)).expect("opened");
    let (events, caller) = (backend.events(), Arc::clone(&backend));
    let runtime = tokio::runtime::Handle::current();
    std::thread::spawn(move || runtime.block_on(validate(&caller)));
    all_is_refused(backend, events, "steering.validate").await;
}

#[tokio::test]
async fn a_call_that_never_completes_ends_with_the_deadline() {
    let backend = open("CALL_NEVER_COMPLETES").expect("opened");
    let error = validate(&backend).await.expect_err("it never completes");
    assert_eq!(error.kind, ErrorKind::Timeout, "{error}");
    assert!(error.to_string().contains("not completed the call"), "{error}");
}

#[tokio::test]
async fn a_call_that_completes_twice_completes_once() {
    let backend = open("COMPLETES_TWICE").expect("opened");
    for _ in 0..3 {
        assert_eq!(validate(&backend).await.expect("judged").len(), 2);
    }
}

#[tokio::test]
async fn an_event_that_means_nothing_is_bad_health() {
    let backend = open("EVENT_KIND").expect("opened");
    let mut events = backend.events();
    validate(&backend).await.expect("judged, and an event is due");
    match tokio::time::timeout(Duration::from_secs(5), events.next()).await {
        Ok(Some(Event::Health(Some(error)))) => {
            assert!(error.to_string().contains("event.kind is 99"), "{error}");
        }
        other => panic!("{other:?}"),
    }
}

/// A descriptor that is always readable slows its library down and nothing else.
#[tokio::test]
async fn a_descriptor_that_is_readable_for_nothing_stops_no_call() {
    let backend = open("FD_STORM").expect("opened");
    for _ in 0..100 {
        assert_eq!(validate(&backend).await.expect("it works all the same").len(), 2);
    }
}
