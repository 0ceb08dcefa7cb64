//! The command line: what to run, what to print, and which exit code says what.
//!
//! # Exit codes
//! | code | meaning |
//! |---|---|
//! | 0 | conformant: no case failed, and nothing differs from the expectations, where there are any |
//! | 1 | not conformant: a case failed, or the expectations and the run disagree |
//! | 2 | could not run: wrong arguments, no card, or not done within `--limit` |

use std::fmt;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use clap::Parser;
use dpumesh_core::Backend;
use dpumesh_hw::conformance::{
    CASES, Case, Entry, Expectations, Fixture, Outcome, Report, VERSION, run_watched,
};
use dpumesh_hw::netns::ensure_privilege;
use tempfile::TempDir;

use crate::fixtures::{Choice, NoFixture, VARIANTS, Variant, expectations};
use crate::watch::Watch;

/// Arguments of `dpumesh-conform`.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "dpumesh-conform",
    version,
    about = "Proves a dpumesh backend: runs the conformance kit against its cards and prints what held",
    after_help = after_help(),
)]
pub struct Args {
    /// What to prove: memory, tap, sriov, yusur, or the path of a library with the C interface (include/dpumesh.h)
    #[arg(short, long, value_name = "BACKEND", required_unless_present_any = ["completions", "list"])]
    pub backend: Option<Choice>,
    /// Which of the backend's fixtures; see below
    #[arg(long, value_name = "NAME")]
    pub variant: Option<String>,
    /// How the card is opened, a JSON object: for a library its own (the member `card` is added, with another text for each
    /// case); for --device see below
    #[arg(long, value_name = "JSON", default_value = "{}", value_parser = parse_config)]
    pub config: serde_json::Value,
    /// PCI address of a real card, which is the run's alone: for sriov and yusur; for a library the member `device` of its
    /// configuration
    #[arg(long, value_name = "PCI", conflicts_with = "variant")]
    pub device: Option<dpumesh_core::PciAddress>,
    /// Only the cases whose name contains this, or of this part (vf, steering, …)
    #[arg(long, value_name = "FILTER", default_value = "")]
    pub only: String,
    /// Print the cases, what each proves and what it needs, and leave
    #[arg(long)]
    pub list: bool,
    /// Print only what did not pass
    #[arg(short, long)]
    pub quiet: bool,
    /// Also write the report as JSON (`-`: to standard output, instead of the table)
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Known skips and failures, each with its reason: what differs from them makes the run fail
    #[arg(long, value_name = "FILE")]
    pub expect: Option<PathBuf>,
    /// Write what this run would agree with, for --expect; failures keep the reasons they had there
    #[arg(long, value_name = "FILE")]
    pub write_expect: Option<PathBuf>,
    /// Seconds for one case
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub deadline: u64,
    /// Seconds for the whole run
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub limit: u64,
    /// Print shell completions and leave
    #[arg(long, value_enum, value_name = "SHELL")]
    pub completions: Option<clap_complete::Shell>,
}

fn parse_config(text: &str) -> Result<serde_json::Value, String> {
    let config: serde_json::Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
    if config.is_object() {
        return Ok(config);
    }
    Err("expected an object, as {\"device\": \"0000:3b:00.0\"}".to_owned())
}

fn after_help() -> String {
    let mut help = "\
Examples:
  dpumesh-conform --backend memory                     the reference backend: what a full report looks like
  dpumesh-conform --backend memory --only lease        the cases about leases
  dpumesh-conform --list --only steering               what they are, what they prove, what they need
  dpumesh-conform --backend tap --json report.json     the emulator; needs namespaces (root, or a user namespace)
  dpumesh-conform --backend ./libmycard.so             a vendor's library; the hooks that it gives the kit decide how much
                                                       can be shown
  dpumesh-conform --backend sriov --device 0000:3b:00.0 --config '{\"vlans\": [3000, 3063]}'
                                                       a real NIC; nobody else may use it: VFs go and come, and its driver
                                                       is taken away and given back

--config of a real card:
  sriov  {\"vfs\": 4, \"vlans\": [FIRST, LAST], \"protect\": \"required\" | \"waived\"}
  yusur  {\"library\": \"/path/of/libyusur_np.so\", \"profile\": \"\", \"floor\": {as sriov's}}

Each case runs on a fresh card and ends within --deadline; the run ends within --limit, whatever a backend does.
A case ends as one of
  passed              the sentence of the contract held
  FAILED              it did not
  not supported       it needs an ability that the card does not claim, or the fixture lacks: counted by ability
  expected failure    it did not hold, and the expectations say so, with the reason

Exit codes: 0 conformant; 1 a case failed, or the run differs from the expectations (in-tree backends have theirs
built in, others by --expect); 2 could not run.

Variants:
"
    .to_owned();
    for Variant {
        backend, name, about, ..
    } in VARIANTS
    {
        help += &format!("  {backend:<8} {name:<24} {about}\n");
    }
    help
}

/// The exit code of a run that could not be done.
const COULD_NOT_RUN: i32 = 2;

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is nothing to run on.
    #[error(transparent)]
    NoFixture(#[from] NoFixture),
    /// The rights to make namespaces.
    #[error(transparent)]
    Privilege(#[from] dpumesh_hw::netns::PrivilegeError),
    /// The first card could not be made.
    #[error("{fixture} gives no card: {reason}")]
    NoCard {
        /// Which fixture.
        fixture: String,
        /// Why.
        reason: String,
    },
    /// A configuration that nobody reads.
    #[error(
        "--config and --device are for libraries and real cards: these cards of {0} are made for the run"
    )]
    NoConfiguration(Choice),
    /// No case has such a name.
    #[error("no case is called like `{0}` and no part is `{0}`: see --list")]
    NoCase(String),
    /// A file that is no expectations file.
    #[error("{path}: {source}")]
    Expectations {
        /// Which file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// The operating system said no.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
}

impl Error {
    /// The exit code that says so.
    pub fn code(&self) -> i32 {
        COULD_NOT_RUN
    }
}

fn io_error(what: impl fmt::Display) -> impl FnOnce(io::Error) -> Error {
    let what = what.to_string();
    move |source| Error::Io { what, source }
}

/// Runs the program and returns its exit code.
///
/// # Errors
/// Why it could not run.
pub fn run(args: &Args) -> Result<i32, Error> {
    if let Some(shell) = args.completions {
        let mut command = <Args as clap::CommandFactory>::command();
        clap_complete::generate(shell, &mut command, "dpumesh-conform", &mut io::stdout());
        return Ok(0);
    }
    if !CASES.iter().any(|case| case.is_selected_by(&args.only)) {
        return Err(Error::NoCase(args.only.clone()));
    }
    match &args.backend {
        Some(backend) if !args.list => prove(args, backend),
        _ => {
            list(&args.only);
            Ok(0)
        }
    }
}

/// Prints the cases by part.
fn list(only: &str) {
    for case in CASES.iter().filter(|case| case.is_selected_by(only)) {
        let Case {
            part,
            name,
            sentence,
            needs,
            ..
        } = case;
        say(format_args!("{part:<10} {name}"));
        say(format_args!("{:<10}   {sentence}", ""));
        if !needs.is_empty() {
            let needs: Vec<&str> = needs.iter().map(|need| need.capability()).collect();
            say(format_args!("{:<10}   needs {}", "", needs.join(", ")));
        }
    }
}

fn prove(args: &Args, backend: &Choice) -> Result<i32, Error> {
    if backend.needs_privilege() {
        // Before the first thread: the kernel asks for it.
        ensure_privilege()?;
    }
    let (fixture, _journals) = fixture(args, backend)?;
    let expected = match &args.expect {
        Some(path) => Some(read_expectations(path)?),
        None => expectations(&fixture.name()),
    };
    let fixture: Arc<dyn Fixture> = Arc::new(Expecting {
        fixture,
        expected: expected.clone().unwrap_or_default(),
    });
    let seen = Arc::new(Mutex::new(Vec::new()));
    let _watch = watch(args, fixture.name(), Arc::clone(&seen))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(io_error("start the runtime"))?;
    let table = args.json.as_deref() != Some(Path::new("-"));
    if table {
        introduce(&fixture, args)?;
    }
    let report = runtime.block_on(run_watched(
        fixture,
        &args.only,
        Duration::from_secs(args.deadline),
        &mut |entry| {
            if table && (!args.quiet || entry.outcome != Outcome::Passed) {
                say(format_args!("{entry}"));
            }
            seen.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(entry.clone());
        },
    ));
    let differences = expected
        .map(|expected| differences(&report, expected))
        .unwrap_or_default();
    if table {
        conclude(&report, &differences);
    }
    write_files(args, &report)?;
    Ok(i32::from(!report.is_clean() || !differences.is_empty()))
}

/// What is to be proved, and the folder that it needs for the while.
fn fixture(args: &Args, backend: &Choice) -> Result<(Arc<dyn Fixture>, Option<TempDir>), Error> {
    let mut config = args.config.clone();
    match (backend, args.device) {
        (Choice::Library(_), device) => {
            if let (Some(device), Some(members)) = (device, config.as_object_mut()) {
                members.insert("device".to_owned(), device.to_string().into());
            }
        }
        (_, Some(device)) if backend.has_real_cards() => {
            let journals = tempfile::tempdir().map_err(io_error("make a folder for the journals"))?;
            let card = backend.card(device, config, journals.path())?;
            return Ok((card, Some(journals)));
        }
        (_, device) => {
            if device.is_some() || config.as_object().is_some_and(|members| !members.is_empty()) {
                return Err(Error::NoConfiguration(backend.clone()));
            }
        }
    }
    Ok((backend.fixture(args.variant.as_deref(), config)?, None))
}

fn read_expectations(path: &Path) -> Result<Expectations, Error> {
    let text = std::fs::read_to_string(path).map_err(io_error(path.display()))?;
    Expectations::from_json(&text).map_err(|source| Error::Expectations {
        path: path.to_owned(),
        source,
    })
}

/// What is known of the cases that were run and did not happen, or the other way round.
fn differences(report: &Report, mut expected: Expectations) -> Vec<String> {
    // A selection says nothing about the cases that it leaves out; a name that no case has is a difference all the same.
    let left_out =
        |name: &String| CASES.iter().any(|case| case.name == name) && report.outcome(name).is_none();
    expected.skips.retain(|name, _| !left_out(name));
    expected.failures.retain(|name, _| !left_out(name));
    report
        .differences(&expected)
        .iter()
        .map(ToString::to_string)
        .collect()
}

/// Says who is being proved, from a card that is made for the purpose.
fn introduce(fixture: &Arc<dyn Fixture>, args: &Args) -> Result<(), Error> {
    let cards = Arc::clone(fixture);
    let deadline = Duration::from_secs(args.deadline);
    let (sender, answer) = std::sync::mpsc::channel();
    let look = move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let lines = runtime.map_err(|error| error.to_string()).and_then(|runtime| {
            runtime.block_on(async {
                let rig = cards.open().await.map_err(|error| error.to_string())?;
                Ok(describe(&*rig.host(), &*rig.soc()))
            })
        });
        let _ = sender.send(lines); // nobody listens any more after the deadline
    };
    std::thread::Builder::new()
        .spawn(look)
        .map_err(io_error("start a thread"))?;
    let lines = answer
        .recv_timeout(deadline)
        .unwrap_or_else(|_| Err(format!("not within {deadline:?}, or it panicked")))
        .map_err(|reason| Error::NoCard {
            fixture: fixture.name(),
            reason,
        })?;
    say(format_args!(
        "{} against conformance kit {VERSION}",
        fixture.name()
    ));
    for line in lines {
        say(format_args!("  {line}"));
    }
    Ok(())
}

/// One line per half.
fn describe(host: &dyn Backend, soc: &dyn Backend) -> Vec<String> {
    let line = |backend: &dyn Backend| {
        let info = backend.info();
        let parts: Vec<&str> = [
            ("vf", backend.vf().is_some()),
            ("steering", backend.steering().is_some()),
            ("offload", backend.offload().is_some()),
            ("transport", backend.transport().is_some()),
            ("ports", backend.ports().is_some()),
        ]
        .into_iter()
        .filter_map(|(part, there)| there.then_some(part))
        .collect();
        let parts = if parts.is_empty() {
            "no part".to_owned()
        } else {
            parts.join(", ")
        };
        format!(
            "{:?}: {} {} on {}, mode `{}`: {parts}",
            info.role,
            info.name,
            info.version,
            info.dpu,
            backend.capabilities().mode
        )
    };
    let mut lines = vec![line(host)];
    if host.info().role != soc.info().role {
        lines.push(line(soc));
    }
    lines
}

fn conclude(report: &Report, differences: &[String]) {
    say(format_args!("\n{}", report.summary()));
    let failures = report
        .entries
        .iter()
        .filter(|entry| matches!(entry.outcome, Outcome::Failed { .. }));
    for entry in failures {
        say(format_args!(
            "\n{}: {}\n  the contract says: {}",
            entry.case, entry.outcome, entry.sentence
        ));
    }
    for difference in differences {
        say(format_args!("differs from the expectations: {difference}"));
    }
    let verdict = if report.is_clean() && differences.is_empty() {
        "conformant"
    } else {
        "NOT conformant"
    };
    say(format_args!("{verdict}"));
}

fn write_files(args: &Args, report: &Report) -> Result<(), Error> {
    match args.json.as_deref() {
        Some(path) if path == Path::new("-") => say(format_args!("{}", report.to_json())),
        Some(path) => write(path, report.to_json() + "\n")?,
        None => {}
    }
    if let Some(path) = &args.write_expect {
        let known = match &args.expect {
            Some(known) => read_expectations(known)?,
            None => Expectations::default(),
        };
        write(path, report.to_expectations(&known).to_json())?;
    }
    Ok(())
}

fn write(path: &Path, text: String) -> Result<(), Error> {
    std::fs::write(path, text).map_err(io_error(path.display()))
}

/// Ends the process after `--limit`, with what was seen until then.
fn watch(args: &Args, fixture: String, seen: Arc<Mutex<Vec<Entry>>>) -> Result<Watch, Error> {
    let limit = Duration::from_secs(args.limit);
    let args = args.clone();
    let last_words = move || {
        let entries = seen.lock().unwrap_or_else(PoisonError::into_inner).clone();
        eprintln!(
            "dpumesh-conform: not done after {limit:?}: {} cases ended",
            entries.len()
        );
        let kit = VERSION.to_owned();
        let report = Report {
            fixture,
            kit,
            entries,
        };
        if let Err(error) = write_files(
            &Args {
                write_expect: None,
                ..args
            },
            &report,
        ) {
            eprintln!("dpumesh-conform: {error}");
        }
    };
    Watch::start(limit, COULD_NOT_RUN, last_words).map_err(io_error("start a thread"))
}

/// A fixture with the expectations that the command line names.
#[derive(Debug)]
struct Expecting {
    fixture: Arc<dyn Fixture>,
    expected: Expectations,
}

#[async_trait::async_trait]
impl Fixture for Expecting {
    fn name(&self) -> String {
        self.fixture.name()
    }

    async fn open(&self) -> dpumesh_core::Result<Box<dyn dpumesh_hw::conformance::Rig>> {
        self.fixture.open().await
    }

    fn expectations(&self) -> Expectations {
        self.expected.clone()
    }
}

/// Prints a line; who closed standard output reads no more, and the exit code still speaks.
fn say(line: fmt::Arguments<'_>) {
    let _ = writeln!(io::stdout(), "{line}");
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
        assert!(
            Args::try_parse_from(["dpumesh-conform"]).is_err(),
            "a backend is asked for"
        );
        for alone in [["--list", "--quiet"], ["--completions", "bash"]] {
            let line = ["dpumesh-conform"].into_iter().chain(alone);
            Args::try_parse_from(line).expect("needs no backend");
        }
        for (flag, value) in [("--backend", "moon"), ("--deadline", "0"), ("--limit", "0")] {
            assert!(Args::try_parse_from(["dpumesh-conform", "-b", "memory", flag, value]).is_err());
        }
    }

    #[test]
    fn what_a_selection_leaves_out_is_no_difference_and_a_wrong_name_is() {
        let report = Report {
            fixture: "none".into(),
            kit: VERSION.into(),
            entries: Vec::new(),
        };
        let expected = r#"{"skips": {"releasing_again_is_not_current": "x", "no_such_case": "x"}}"#;
        let expected = Expectations::from_json(expected).expect("valid");
        let found = differences(&report, expected);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].starts_with("no_such_case: "), "{found:?}");
    }
}
