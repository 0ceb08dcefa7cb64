//! h2spec, every case of it, the strict ones too, in clear text and over TLS. `tests/peers/build h2spec` builds it; where it is not built
//! this is skipped, loudly, and with `DPUMESH_NO_SKIP=1` a failure unless `DPUMESH_PEERS=absent` says that the peers are counted as missing.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::Command;

use crate::harness::{Endpoint, Running, simple};
use crate::mesh::{Authority, FRONT};

/// Cases that do not hold, and why.
const FAILING: &[(&str, &str)] = &[];

/// As many as h2spec 2.2.1 has.
const CASES: usize = 146;

#[test]
fn every_case_passes_in_clear_text() {
    let Some(program) = program() else { return };
    let endpoint = Endpoint::start("only");
    // With AUTO what is no preface is HTTP/1's to refuse.
    let running = Running::start(&simple(endpoint.address, "codec_type: HTTP2"));
    check(&program, &running, &[]);
}

#[test]
fn every_case_passes_over_tls() {
    let Some(program) = program() else { return };
    let endpoint = Endpoint::start("only");
    let (chain, key) = Authority::new().leaf(FRONT);
    let lines = |pem: &str| format!("{{inline_string: \"{}\"}}", pem.replace('\n', "\\n"));
    let socket = format!(
        "transport_socket: {{name: tls, typed_config: {{\"@type\": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext, \
         common_tls_context: {{alpn_protocols: [h2], tls_certificates: [{{certificate_chain: {}, private_key: {}}}]}}}}}}",
        lines(&chain),
        lines(&key)
    );
    let plain = simple(endpoint.address, "");
    let bootstrap = plain.replacen(
        "    - filters:\n",
        &format!("    - {socket}\n      filters:\n"),
        1,
    );
    assert_ne!(bootstrap, plain);
    check(&program, &Running::start(&bootstrap), &["--tls"]);
}

fn check(program: &PathBuf, running: &Running, more: &[&str]) {
    let port = running.web().port().to_string();
    let output = Command::new(program).arg(port).args(more).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut results: BTreeMap<&str, (&str, &str)> = BTreeMap::new();
    for line in text.lines() {
        let (result, rest) = line.split_once(' ').expect("RESULT ID");
        let (id, why) = rest.split_once(": ").unwrap_or((rest, ""));
        results.insert(id, (result, why));
    }
    assert_eq!(
        results.len(),
        CASES,
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let known: BTreeMap<&str, &str> = FAILING.iter().copied().collect();
    let failed: Vec<String> = results
        .iter()
        .filter(|(id, (result, _))| *result != "passed" && !known.contains_key(*id))
        .map(|(id, (result, why))| format!("{id} {result}: {why}"))
        .collect();
    assert!(
        failed.is_empty(),
        "{} cases:\n{}",
        failed.len(),
        failed.join("\n")
    );
    let better: Vec<_> = known
        .keys()
        .filter(|id| results.get(*id).is_some_and(|(r, _)| *r == "passed"))
        .collect();
    assert!(better.is_empty(), "they hold now: {better:?}");
}

/// The program, if it is built.
fn program() -> Option<PathBuf> {
    let build = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/peers/build");
    let built = Command::new(build).args(["--check", "h2spec"]).output().unwrap();
    if built.status.success() {
        let folder = String::from_utf8(built.stdout).unwrap();
        return Some(PathBuf::from(folder.trim()).join("h2spec"));
    }
    let reason = String::from_utf8_lossy(&built.stderr).trim().to_owned();
    // Past any capturing.
    let _ = writeln!(std::io::stderr(), "SKIPPED h2spec: {reason}");
    let is = |name, value| std::env::var_os(name).is_some_and(|found| found == value);
    assert!(
        !is("DPUMESH_NO_SKIP", "1") || is("DPUMESH_PEERS", "absent"),
        "skipped: {reason}"
    );
    None
}
