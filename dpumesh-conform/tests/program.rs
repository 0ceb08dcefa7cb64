//! The program as its user meets it: what it prints, what it writes, how it ends.

use std::process::{Command, Output};
use std::time::{Duration, Instant};

use dpumesh_hw::conformance::{CASES, Report};

fn conform(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_dpumesh-conform"))
        .args(arguments)
        .output()
        .expect("starts")
}

fn text(octets: &[u8]) -> String {
    String::from_utf8_lossy(octets).into_owned()
}

#[test]
fn a_conformant_backend_ends_with_0_and_a_table() {
    let folder = tempfile::tempdir().expect("a folder");
    let json = folder.path().join("report.json");
    let output = conform(&["--backend", "memory", "--json", json.to_str().expect("UTF-8")]);
    let table = text(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{table}{}", text(&output.stderr));
    assert!(table.starts_with("memory against conformance kit "), "{table}");
    assert!(table.contains("Both: memory "), "{table}");
    assert!(table.trim_end().ends_with("conformant"), "{table}");
    let report: Report = serde_json::from_slice(&std::fs::read(json).expect("written")).expect("a report");
    assert_eq!(report.entries.len(), CASES.len());
    for entry in &report.entries {
        assert!(table.contains(&format!("{} ", entry.case)), "{}", entry.case);
    }
}

#[test]
fn json_on_standard_output_is_nothing_but_json() {
    let output = conform(&["-b", "memory", "--only", "events", "--json", "-"]);
    let report: Report = serde_json::from_slice(&output.stdout).expect("a report");
    assert!(report.entries.len() > 5 && report.is_clean());
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn what_differs_from_the_expectations_ends_with_1() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("expected.json");
    let case = "releasing_again_is_not_current";
    std::fs::write(&file, format!(r#"{{"failures": {{"{case}": "firmware 1.2"}}}}"#)).expect("written");
    let file = file.to_str().expect("UTF-8");
    let output = conform(&["-b", "memory", "--only", case, "--expect", file]);
    let table = text(&output.stdout);
    assert_eq!(
        output.status.code(),
        Some(1),
        "an excuse has outlived its bug: {table}"
    );
    assert!(table.contains("expected to fail, found: passed"), "{table}");
    // What the run would agree with is written, and then agrees.
    let agreed = conform(&["-b", "memory", "--only", case, "--write-expect", file]);
    assert_eq!(agreed.status.code(), Some(0));
    let again = conform(&["-b", "memory", "--only", case, "--expect", file]);
    assert_eq!(again.status.code(), Some(0), "{}", text(&again.stdout));
}

/// No machine has so many buses.
const NOWHERE: &str = "ffff:ff:1f.7";

#[test]
fn what_cannot_be_run_ends_with_2_and_says_why() {
    for (arguments, why) in [
        (&["--backend", "moon"][..], "moon"),
        (
            &["--backend", "memory", "--only", "no_such_thing"],
            "no_such_thing",
        ),
        (&["--backend", "memory", "--variant", "big"], "memory-halves"),
        (&["--backend", "memory", "--expect", "/nowhere"], "/nowhere"),
        (
            &["--backend", "memory", "--device", NOWHERE],
            "libraries and real cards",
        ),
        (
            &["--backend", "sriov", "--device", NOWHERE],
            "/sys/bus/pci/devices/ffff:ff:1f.7",
        ),
        (
            &[
                "--backend",
                "sriov",
                "--device",
                NOWHERE,
                "--config",
                r#"{"vlan": 3}"#,
            ],
            "unknown field `vlan`",
        ),
        (
            &["--backend", "yusur", "--device", NOWHERE],
            "no PCI device at ffff:ff:1f.7: looked in /sys/bus/pci/devices",
        ),
        (&[], "--backend"),
    ] {
        let output = conform(arguments);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {said}");
        assert!(said.contains(why), "{arguments:?}: {said}");
    }
}

#[test]
fn a_run_ends_at_its_limit_with_what_was_seen() {
    let begun = Instant::now();
    // The whole kit takes longer than a second.
    let output = conform(&["-b", "memory", "--limit", "1", "--json", "-"]);
    assert!(begun.elapsed() < Duration::from_secs(20));
    assert_eq!(output.status.code(), Some(2));
    assert!(
        text(&output.stderr).contains("not done after 1s"),
        "{}",
        text(&output.stderr)
    );
    let report: Report = serde_json::from_slice(&output.stdout).expect("a report");
    assert!(report.entries.len() < CASES.len());
}

#[test]
fn the_list_names_every_case_and_help_and_completions_teach() {
    let list = text(&conform(&["--list"]).stdout);
    for case in CASES {
        assert!(
            list.contains(case.name) && list.contains(case.sentence),
            "{case:?}"
        );
    }
    let some = text(&conform(&["--list", "--only", "transport"]).stdout);
    assert!(
        some.contains("needs transport") && !some.contains("needs vf"),
        "{some}"
    );
    let help = text(&conform(&["--help"]).stdout);
    for word in ["Exit codes: 0", "tap-steered-minimal", "not supported", "--limit"] {
        assert!(help.contains(word), "{word}: {help}");
    }
    assert!(text(&conform(&["--completions", "bash"]).stdout).contains("--backend"));
}
