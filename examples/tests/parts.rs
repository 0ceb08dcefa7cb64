//! The parts of the examples with real processes and frames, in namespaces of their own. Every case is a process.

use std::net::{IpAddr, SocketAddr};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use dpumesh_examples::capture::{Capture, Datagram};
use dpumesh_examples::children::{Interrupt, Process, Run};
use dpumesh_examples::measure::{self, CpuMeter};
use dpumesh_examples::workload::{self, READY, http_client, spoof, tcp, udp};
use dpumesh_hw::netlink::{Address, LinkChange, Netlink, VethEnd};
use dpumesh_hw::netns::process::die_with_parent;
use dpumesh_hw::netns::testing::{self, Case, RunAs};
use dpumesh_hw::netns::{Namespace, ensure_privilege};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const DEADLINE: Duration = Duration::from_secs(30);
const PORT: u16 = 8080;

/// Environment variable that gives this program the role of a run that is to be killed; its value is the folder.
const DOOMED: &str = "PARTS_TEST_DOOMED";
/// Environment variable that gives this program the role of a run that is interrupted.
const INTERRUPTED: &str = "PARTS_TEST_INTERRUPTED";

fn main() -> ExitCode {
    if let Some(role) = workload::requested() {
        return match die_with_parent() {
            Ok(_) => role.run(),
            Err(_) => ExitCode::FAILURE,
        };
    }
    if let Some(folder) = std::env::var_os(DOOMED) {
        return doomed(folder.as_ref());
    }
    if std::env::var_os(INTERRUPTED).is_some() {
        return interrupted();
    }
    let case = |name, run| Case {
        name,
        run_as: RunAs::Caller,
        run,
    };
    let nobody = |name, run| Case {
        name,
        run_as: RunAs::Nobody,
        run,
    };
    testing::main(&[
        case("workloads_talk_across_a_wire", workloads_talk_across_a_wire),
        nobody("workloads_talk_without_root", workloads_talk_across_a_wire),
        case("a_capture_sees_both_directions", a_capture_sees_both_directions),
        case(
            "a_capture_keeps_the_newest_and_counts_all",
            a_capture_keeps_the_newest_and_counts_all,
        ),
        case("a_slow_capture_knows_its_losses", a_slow_capture_knows_its_losses),
        case(
            "forged_frames_leave_beside_honest_ones",
            forged_frames_leave_beside_honest_ones,
        ),
        case(
            "a_killed_run_is_cleaned_up_by_the_next",
            a_killed_run_is_cleaned_up_by_the_next,
        ),
        case(
            "an_interrupt_is_noticed_and_the_second_is_final",
            an_interrupt_is_noticed_and_the_second_is_final,
        ),
        case(
            "programs_nobody_here_wrote_agree",
            programs_nobody_here_wrote_agree,
        ),
    ])
}

/// Two pods joined by a veth pair, and the run that records what is started in them.
struct Wire {
    a: Namespace,
    b: Namespace,
    run: Run,
    _folder: tempfile::TempDir,
}

const A4: &str = "10.77.0.1";
const B4: &str = "10.77.0.2";
const A6: &str = "fd77::1";
const B6: &str = "fd77::2";
const B_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];

impl Wire {
    fn new() -> Self {
        let (a, b) = (
            Namespace::create().expect("created"),
            Namespace::create().expect("created"),
        );
        let mut netlink = Netlink::open_in(&a).expect("socket");
        let near = VethEnd::new("eth0").mac([2, 0, 0, 0, 0, 1]);
        let far = VethEnd::new("eth0").in_namespace(&b).mac(B_MAC);
        netlink.create_veth(&near, &far).expect("made");
        for (pod, addresses) in [(&a, [A4, A6]), (&b, [B4, B6])] {
            let mut netlink = Netlink::open_in(pod).expect("socket");
            let link = netlink.link("eth0").expect("there").index;
            netlink
                .change_link(link, &LinkChange::new().up())
                .expect("switched on");
            for address in addresses {
                let ip: IpAddr = address.parse().expect("address");
                let length = if ip.is_ipv4() { 24 } else { 64 };
                let network = format!("{address}/{length}").parse().expect("network");
                netlink
                    .add_address(&Address { link, net: network })
                    .expect("added");
            }
        }
        let folder = tempfile::tempdir().expect("made");
        let (run, _) = Run::begin_in(&folder.path().join("run")).expect("begun");
        Self {
            a,
            b,
            run,
            _folder: folder,
        }
    }

    /// Starts a server in pod B and waits until it says that it is ready.
    fn serve(&self, role: &str, address: &str, name: &[&str]) -> Process {
        let listen = SocketAddr::new(address.parse().expect("address"), PORT).to_string();
        let arguments = [&[role, listen.as_str()], name].concat();
        let command = workload::command(arguments);
        let mut server = Process::start(&self.run, role, &self.b, command).expect("started");
        let ready = server.wait_for_line(READY, DEADLINE).expect("ready");
        assert_eq!(ready, listen);
        let udp = role.starts_with("udp");
        if !udp {
            let address = listen.parse().expect("address");
            server
                .wait_for_port(&self.a, address, DEADLINE)
                .expect("reachable");
        }
        server
    }

    /// Runs a client in pod A and reads its summary.
    fn ask<T: serde::de::DeserializeOwned>(&self, arguments: &[&str]) -> T {
        let command = workload::command(arguments.iter().chain(&["--json"]));
        Process::json(&self.run, arguments[0], &self.a, command, DEADLINE).expect("answered")
    }
}

fn workloads_talk_across_a_wire() {
    let wire = Wire::new();
    for (ip, client, target) in [
        (B4, A4, format!("{B4}:{PORT}")),
        (B6, A6, format!("[{B6}]:{PORT}")),
    ] {
        let target = target.as_str();
        let server = wire.serve("http-server", ip, &["web-b"]);
        let meter = CpuMeter::start([("server", server.id())]).expect("started");
        let got: http_client::Summary =
            wire.ask(&["http-get", target, "--count", "2000", "--connections", "20"]);
        assert_eq!(got.answered, 2000, "{got:?}");
        assert_eq!(got.served_by.get("web-b"), Some(&2000));
        assert_eq!(got.seen_as.get(client), Some(&2000), "{:?}", got.seen_as);
        assert_eq!(meter.per_unit(2000).expect("measured").len(), 1);
        assert!(measure::resident_kib(server.id()).expect("read") > 100);
        drop(server);
        let refused: tcp::Connected = wire.ask(&["tcp-connect", target]);
        assert_eq!(refused.outcome, tcp::Outcome::Refused);

        let sink = wire.serve("tcp-sink", ip, &[]);
        let sent: tcp::Sent = wire.ask(&["tcp-send", target, "--bytes", "20000000"]);
        assert!(sent.intact && sent.received.octets == 20_000_000, "{sent:?}");
        drop(sink);

        let echo = wire.serve("tcp-echo", ip, &[]);
        let said: tcp::Connected = wire.ask(&["tcp-connect", target, "--say", "hello"]);
        assert_eq!(said.answer.as_deref(), Some("hello"));
        drop(echo);

        let _echo = wire.serve("udp-echo", ip, &[]);
        let sent: udp::Answers = wire.ask(&["udp-send", target, "--count", "10", "--octets", "3000"]);
        assert_eq!((sent.answered, sent.refused), (10, 0), "{sent:?}");
        let pinged: udp::Answers = wire.ask(&["ping", ip, "--count", "3"]);
        assert_eq!(pinged.answered, 3, "{pinged:?}");
    }
    let silent: udp::Answers = wire.ask(&["ping", "10.77.0.99", "--timeout-ms", "50"]);
    assert_eq!((silent.sent, silent.answered), (1, 0));
}

fn a_capture_sees_both_directions() {
    let wire = Wire::new();
    let _server = wire.serve("http-server", B4, &["web-b"]);
    let to_port = |frame: &[u8]| {
        let ports = Datagram::in_frame(frame).and_then(|found| found.ports);
        ports.is_some_and(|(source, destination)| source == PORT || destination == PORT)
    };
    let capture = Capture::start(&wire.b, "eth0", to_port).expect("started");
    let target = format!("{B4}:{PORT}");
    let _: http_client::Summary = wire.ask(&["http-get", &target, "--path", "/needle"]);
    // At least three frames each way: handshake, data, end.
    assert!(capture.wait_for(6, DEADLINE));
    let seen = capture.stop().expect("stopped");
    assert_eq!(seen.lost, 0);
    let request =
        |outgoing| seen.count(|frame| frame.outgoing == outgoing && frame.contains(b"GET /needle HTTP/1.1"));
    assert_eq!((request(false), request(true)), (1, 0));
    assert!(seen.any(|frame| frame.outgoing && frame.contains(b"HTTP/1.1 200 OK")));
    assert!(seen.any(|frame| {
        frame
            .datagram()
            .is_some_and(|found| found.source == A4.parse::<IpAddr>().expect("address"))
    }));
    assert!(seen.frames.is_sorted_by_key(|frame| frame.at));
    let error = Capture::start(&wire.b, "eth9", |_| true).expect_err("no such interface");
    assert!(error.to_string().contains("eth9"), "{error}");
}

/// Sends `count` datagrams of `octets` from pod A to a port of pod B where nobody listens.
fn flood(wire: &Wire, count: u32, octets: usize) {
    wire.a
        .run(|| {
            let socket = std::net::UdpSocket::bind((A4, 0)).expect("bound");
            for number in 0..count {
                let mut datagram = vec![0; octets];
                datagram[..4].copy_from_slice(&number.to_be_bytes());
                // Not connected: refusals do not come back here.
                socket.send_to(&datagram, (B4, 9)).expect("sent");
            }
        })
        .expect("ran");
}

fn is_flood(frame: &[u8]) -> bool {
    Datagram::in_frame(frame).is_some_and(|found| matches!(found.ports, Some((_, 9))) && found.protocol == 17)
}

fn a_capture_keeps_the_newest_and_counts_all() {
    let wire = Wire::new();
    let capture = Capture::start(&wire.b, "eth0", is_flood).expect("started");
    flood(&wire, 5000, 100);
    assert!(capture.wait_for(5000, DEADLINE));
    let seen = capture.stop().expect("stopped");
    assert_eq!((seen.chosen, seen.frames.len(), seen.lost), (5000, 4096, 0));
    let number = |index: usize| {
        let payload = seen.frames[index].datagram().expect("UDP").payload;
        u32::from_be_bytes(payload[..4].try_into().expect("four octets"))
    };
    assert_eq!((number(0), number(4095)), (904, 4999));
}

fn a_slow_capture_knows_its_losses() {
    let wire = Wire::new();
    let (go, gate) = std::sync::mpsc::channel::<()>();
    // The first frame is not let go before the queue has overflown.
    let gate = std::sync::Mutex::new(Some(gate));
    let slow = move |frame: &[u8]| {
        if let Some(gate) = gate.lock().expect("sound").take_if(|_| is_flood(frame)) {
            let _ = gate.recv_timeout(DEADLINE);
        }
        is_flood(frame)
    };
    let capture = Capture::start(&wire.b, "eth0", slow).expect("started");
    flood(&wire, 100_000, 1400);
    go.send(()).expect("waits");
    // With room in the queue again, one more frame gets in and brings the news.
    assert!(capture.wait_for(1000, DEADLINE));
    flood(&wire, 1, 100);
    let seen = capture.stop().expect("stopped");
    assert!(seen.lost > 0, "{} seen", seen.seen);
    // A few refusals and neighbour solicitations are on the wire as well.
    let all = seen.seen + seen.lost;
    assert!(
        (100_001..101_000).contains(&all),
        "{} seen, {} lost",
        seen.seen,
        seen.lost
    );
}

fn forged_frames_leave_beside_honest_ones() {
    let wire = Wire::new();
    for (to, as_ip, own) in [
        (format!("{B4}:9"), "10.77.0.66", A4),
        (format!("[{B6}]:9"), "fd77::66", A6),
    ] {
        let capture = Capture::start(&wire.b, "eth0", is_flood).expect("started");
        let arguments = [
            "spoof",
            "eth0",
            "--to",
            &to,
            "--to-mac",
            "02:00:00:00:00:02",
            "--as-ip",
            as_ip,
            "--count",
            "4",
        ];
        let sent: spoof::Spoofed = wire.ask(&arguments);
        assert_eq!((sent.honest, sent.wrong_mac, sent.wrong_ip), (4, 4, 4));
        assert!(capture.wait_for(12, DEADLINE));
        let seen = capture.stop().expect("stopped");
        let count = |text: &str, mac: u8, ip: &str| {
            let ip: IpAddr = ip.parse().expect("address");
            seen.count(|frame| {
                frame.contains(text.as_bytes())
                    && frame.octets[..6] == B_MAC
                    && frame.octets[11] == mac
                    && frame.datagram().is_some_and(|found| found.source == ip)
            })
        };
        assert_eq!(count(spoof::HONEST, 1, own), 4);
        assert_eq!(count(spoof::WRONG_MAC, 0x66, own), 4);
        assert_eq!(count(spoof::WRONG_IP, 1, as_ip), 4);
    }
}

/// A run that starts a workload and a foreign program and waits to be killed.
fn doomed(folder: &std::path::Path) -> ExitCode {
    die_with_parent().expect("the case is alive");
    let pod = Namespace::create().expect("created");
    let (run, _) = Run::begin_in(folder).expect("begun");
    std::fs::write(run.folder().join("key.pem"), "secret").expect("written");
    let server = workload::command(["tcp-echo", "127.0.0.1:0"]);
    let mut server = Process::start(&run, "echo", &pod, server).expect("started");
    server.wait_for_line(READY, DEADLINE).expect("ready");
    let mut foreign = Command::new("sleep");
    foreign.arg("600");
    let foreign = Process::start(&run, "foreign", &pod, foreign).expect("started");
    println!("{} {}", server.id(), foreign.id());
    loop {
        std::thread::park();
    }
}

fn a_killed_run_is_cleaned_up_by_the_next() {
    let folder = tempfile::tempdir().expect("made");
    let base = folder.path().join("run");
    let here = Namespace::current().expect("here");
    let mut command = Command::new("/proc/self/exe");
    command.env(DOOMED, &base).stdout(Stdio::piped());
    let mut child = here.spawn(command).expect("started");
    let mut said = String::new();
    let mut stdout = std::io::BufReader::new(child.stdout.take().expect("piped"));
    std::io::BufRead::read_line(&mut stdout, &mut said).expect("said");
    let pids: Vec<u32> = said
        .split_whitespace()
        .map(|pid| pid.parse().expect("number"))
        .collect();
    let &[server, foreign] = pids.as_slice() else {
        panic!("said {said:?}");
    };
    assert!(Run::begin_in(&base).is_err(), "it is going on");
    child.kill().expect("killed");
    child.wait().expect("gone");
    let lives = |pid| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // A zombie that nobody fetches has ended, too.
        !stat.is_empty() && !stat.contains(") Z ")
    };
    assert!(lives(foreign), "nothing ties a foreign program to its parent");
    let (run, leftovers) = Run::begin_in(&base).expect("free");
    // The workload dies with its parent by itself, and may or may not have done so by now.
    let names: Vec<&str> = leftovers
        .processes
        .iter()
        .map(|(name, _)| name.as_str())
        .filter(|name| *name != "echo")
        .collect();
    assert_eq!((names, leftovers.folders), (vec!["foreign"], 1));
    assert!(!lives(foreign) && !lives(server));
    drop(run);
    let left: Vec<_> = std::fs::read_dir(&base).expect("listed").collect();
    assert_eq!(left.len(), 1, "the lock alone: {left:?}");
}

fn interrupted() -> ExitCode {
    let interrupt = Interrupt::catch().expect("caught");
    assert!(!interrupt.is_raised() && interrupt.check().is_ok());
    println!("{READY}");
    assert!(interrupt.wait(DEADLINE) && interrupt.check().is_err());
    println!("interrupted");
    // Too slow for the user's patience.
    std::thread::sleep(DEADLINE);
    ExitCode::FAILURE
}

fn an_interrupt_is_noticed_and_the_second_is_final() {
    let folder = tempfile::tempdir().expect("made");
    let (run, _) = Run::begin_in(&folder.path().join("run")).expect("begun");
    let here = Namespace::current().expect("here");
    let mut command = Command::new("/proc/self/exe");
    command.env(INTERRUPTED, "1");
    let mut process = Process::start(&run, "interrupted", &here, command).expect("started");
    process.wait_for_line(READY, DEADLINE).expect("ready");
    let pid = Pid::from_raw(i32::try_from(process.id()).expect("small"));
    kill(pid, Signal::SIGINT).expect("sent");
    process.wait_for_line("interrupted", DEADLINE).expect("noticed");
    kill(pid, Signal::SIGTERM).expect("sent");
    assert_eq!(process.wait(DEADLINE).expect("ended").code(), Some(130));
}

fn programs_nobody_here_wrote_agree() {
    ensure_privilege().expect("has rights");
    let wire = Wire::new();
    let _server = wire.serve("http-server", B4, &["web-b"]);
    let url = |path: &str| format!("http://{B4}:{PORT}{path}");
    let foreign = |name: &str, arguments: &[&str]| {
        let mut command = Command::new(name);
        command.args(arguments);
        Process::output(&wire.run, name, &wire.a, command, DEADLINE)
    };
    if foreign("curl", &["--version"]).is_err() {
        testing::skip("programs_nobody_here_wrote_agree: curl", "curl is not installed");
    } else {
        let body = foreign("curl", &["-sS", "--fail", &url("/a"), &url("/b")]).expect("answered");
        assert_eq!(
            body,
            format!("web-b answers GET /a to {A4}\nweb-b answers GET /b to {A4}\n")
        );
        // Larger than a megabyte, so that curl asks first (Expect).
        let upload = "x".repeat(2_000_000);
        let file = wire.run.folder().join("upload");
        std::fs::write(&file, upload).expect("written");
        let data = format!("@{}", file.display());
        let body =
            foreign("curl", &["-sS", "--fail", "--data-binary", &data, &url("/up")]).expect("answered");
        assert!(body.contains("answers POST /up"), "{body}");
        let head = foreign("curl", &["-sS", "-I", &url("/bytes/1000")]).expect("answered");
        assert!(head.contains("content-length: 1000"), "{head}");
    }
    if foreign("wrk", &["-c1", "-t1", "-d1", &url("/")]).is_err() {
        testing::skip("programs_nobody_here_wrote_agree: wrk", "wrk is not installed");
    } else {
        let said = foreign("wrk", &["-c1000", "-t1", "-d2", &url("/")]).expect("ran");
        assert!(
            said.contains("requests in") && !said.contains("Non-2xx") && !said.contains("Socket errors"),
            "{said}"
        );
    }
}
