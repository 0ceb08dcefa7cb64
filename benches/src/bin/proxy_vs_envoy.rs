//! Proxy CPU per HTTP/1.1 request, side by side: dpu-proxy, stock Envoy, HAProxy, on the same endpoint in one run.
//!
//! The endpoint is nginx (`return 200` with 1 KiB), the load wrk with 32 keep-alive connections from one thread. Each
//! proxy has one worker. Rounds are interleaved, so that what disturbs the machine disturbs all; the figure is the
//! proxy's own CPU (`utime + stime` of `/proc/PID/stat`) divided by wrk's request count, median over the rounds with the
//! median absolute deviation. dpu-proxy and Envoy read the same bootstrap but for their ports. With two processors or
//! more, wrk runs on processor 0 and everything else on processor 1.
//!
//! `--json` prints the table as JSON, `--smoke` runs two short rounds. A peer that is not installed is a skip with its
//! name: `ENVOY_BIN` (or `envoy` on `PATH`), `haproxy`, and for all `nginx` and `wrk`. `DPU_PROXY_BIN` names our own
//! program, by default the `dpu-proxy` beside this one.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

const CONNECTIONS: &str = "32";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("proxy_vs_envoy: {error}");
            ExitCode::FAILURE
        }
    }
}

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn run() -> Result<()> {
    let flags: Vec<String> = std::env::args().skip(1).collect();
    if let Some(unknown) = flags
        .iter()
        .find(|f| !["--json", "--smoke"].contains(&f.as_str()))
    {
        return Err(format!("unknown argument {unknown}; there are --json and --smoke").into());
    }
    let has = |flag: &str| flags.iter().any(|f| f == flag);
    let (rounds, seconds) = if has("--smoke") { (2, 1) } else { (7, 3) };
    let (Some(nginx), Some(wrk)) = (find("nginx"), find("wrk")) else {
        println!("SKIP proxy_vs_envoy: nginx and wrk are needed and one is not installed");
        return Ok(());
    };
    let folder = tempfile::tempdir()?;
    let endpoint = free_address()?;
    let _nginx = start_nginx(&nginx, folder.path(), endpoint)?;
    let mut peers = start_peers(folder.path(), endpoint)?;
    for peer in &peers {
        load(&wrk, peer, 1)?;
    }
    for _ in 0..rounds {
        for peer in &mut peers {
            let before = cpu_seconds(peer.process.0.id())?;
            let requests = load(&wrk, peer, seconds)?;
            let after = cpu_seconds(peer.process.0.id())?;
            peer.micros.push((after - before) * 1e6 / requests.max(1) as f64);
            peer.rates.push(requests as f64 / f64::from(seconds));
        }
    }
    report(&peers, rounds, has("--json"));
    Ok(())
}

/// A proxy under test.
struct Peer {
    name: &'static str,
    process: Process,
    address: SocketAddr,
    /// CPU per request of each round, microseconds.
    micros: Vec<f64>,
    /// Requests per second of each round.
    rates: Vec<f64>,
}

/// A child that ends with its owner.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // Already gone is as good.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start_peers(folder: &Path, endpoint: SocketAddr) -> Result<Vec<Peer>> {
    let mut peers = Vec::new();
    let ours = std::env::var_os("DPU_PROXY_BIN").map(PathBuf::from);
    let ours = ours.or_else(|| Some(std::env::current_exe().ok()?.with_file_name("dpu-proxy")));
    let ours = ours
        .filter(|p| p.exists())
        .ok_or("build dpu-proxy first: cargo build --release -p dpumesh-proxy")?;
    let (file, address) = bootstrap(folder, "dpu-proxy", endpoint)?;
    let mut command = pinned(1, &ours);
    command
        .arg("-c")
        .arg(&file)
        .args(["--concurrency", "1", "--log-level", "error"]);
    peers.push(peer("dpu-proxy", command, address)?);
    match std::env::var_os("ENVOY_BIN")
        .map(PathBuf::from)
        .or_else(|| find("envoy"))
    {
        None => println!("SKIP envoy: not installed (set ENVOY_BIN)"),
        Some(envoy) => {
            let (file, address) = bootstrap(folder, "envoy", endpoint)?;
            let mut command = pinned(1, &envoy);
            command.arg("-c").arg(&file).args([
                "--concurrency",
                "1",
                "--log-level",
                "error",
                "--disable-hot-restart",
            ]);
            peers.push(peer("envoy", command, address)?);
        }
    }
    match find("haproxy") {
        None => println!("SKIP haproxy: not installed"),
        Some(haproxy) => {
            let address = free_address()?;
            let file = folder.join("haproxy.cfg");
            let text = format!(
                "global\n  nbthread 1\ndefaults\n  mode http\n  timeout client 60s\n  timeout server 60s\n  timeout connect 5s\n  \
                 http-reuse always\nfrontend f\n  bind {address}\n  default_backend b\nbackend b\n  server s {endpoint}\n"
            );
            std::fs::write(&file, text)?;
            let mut command = pinned(1, &haproxy);
            command.arg("-f").arg(&file).arg("-db");
            peers.push(peer("haproxy", command, address)?);
        }
    }
    Ok(peers)
}

fn peer(name: &'static str, mut command: Command, address: SocketAddr) -> Result<Peer> {
    let process = Process(
        command
            .stdout(Stdio::null())
            .spawn()
            .map_err(|e| format!("{name}: {e}"))?,
    );
    await_listening(name, address)?;
    Ok(Peer {
        name,
        process,
        address,
        micros: Vec::new(),
        rates: Vec::new(),
    })
}

fn start_nginx(nginx: &Path, folder: &Path, endpoint: SocketAddr) -> Result<Process> {
    let file = folder.join("nginx.conf");
    let body = "x".repeat(1024);
    let text = format!(
        "daemon off; master_process off; pid {0}/nginx.pid; error_log {0}/nginx.log;\nevents {{ worker_connections 4096; }}\n\
         http {{ access_log off; keepalive_requests 1000000000; keepalive_timeout 3600; default_type text/plain;\n\
         server {{ listen {endpoint} backlog=1024; location / {{ return 200 \"{body}\"; }} }} }}\n",
        folder.display()
    );
    std::fs::write(&file, text)?;
    let mut command = pinned(1, nginx);
    command.arg("-c").arg(&file).stderr(Stdio::null());
    let process = Process(command.spawn().map_err(|e| format!("nginx: {e}"))?);
    await_listening("nginx", endpoint)?;
    Ok(process)
}

/// The bootstrap both dpu-proxy and Envoy read.
fn bootstrap(folder: &Path, name: &str, endpoint: SocketAddr) -> Result<(PathBuf, SocketAddr)> {
    let (address, file) = (free_address()?, folder.join(format!("{name}.yaml")));
    let text = format!(
        r#"
node: {{id: bench, cluster: bench}}
static_resources:
  listeners:
  - name: web
    address: {{socket_address: {{address: 127.0.0.1, port_value: {}}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: web
          route_config:
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes:
              - match: {{prefix: /}}
                route: {{cluster: app}}
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
  clusters:
  - name: app
    type: STATIC
    load_assignment:
      cluster_name: app
      endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {}}}}}}}}}]}}]
"#,
        address.port(),
        endpoint.port()
    );
    std::fs::write(&file, text)?;
    Ok((file, address))
}

/// Runs wrk; the number of requests answered. Any answer but 2xx and 3xx fails the run.
fn load(wrk: &Path, peer: &Peer, seconds: u32) -> Result<u64> {
    let url = format!("http://{}/", peer.address);
    let output = pinned(0, wrk)
        .args(["-t1", "-c", CONNECTIONS, &format!("-d{seconds}s"), &url])
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    if text.contains("Non-2xx") || text.contains("Socket errors") {
        return Err(format!("{}: wrong answers:\n{text}", peer.name).into());
    }
    let line = text.lines().find(|l| l.contains("requests in"));
    let count = line.and_then(|l| l.split_whitespace().next()?.parse().ok());
    count.ok_or_else(|| format!("{}: wrk said:\n{text}", peer.name).into())
}

/// User and system time of a process, seconds.
fn cpu_seconds(pid: u32) -> Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let after_name = stat.rsplit_once(')').ok_or("no name in stat")?.1;
    let fields: Vec<&str> = after_name.split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
    Ok(ticks as f64 / 100.0)
}

fn resident_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
    line.and_then(|l| l.split_whitespace().next()?.parse().ok())
        .unwrap_or_default()
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Median absolute deviation.
fn spread(values: &[f64]) -> f64 {
    let middle = median(values);
    median(&values.iter().map(|v| (v - middle).abs()).collect::<Vec<_>>())
}

fn report(peers: &[Peer], rounds: u32, json: bool) {
    let own = median(&peers[0].micros);
    if json {
        let rows: Vec<serde_json::Value> = peers
            .iter()
            .map(|p| {
                serde_json::json!({"proxy": p.name, "cpu_us_per_request": median(&p.micros), "spread_us": spread(&p.micros),
                    "requests_per_second": median(&p.rates), "rss_kib": resident_kib(p.process.0.id()),
                    "dpu_proxy_ratio": own / median(&p.micros)})
            })
            .collect();
        let all = serde_json::json!({"connections": CONNECTIONS, "rounds": rounds, "kernel": kernel(), "peers": rows});
        println!("{all:#}");
        return;
    }
    println!(
        "HTTP/1.1 keep-alive, {CONNECTIONS} connections, 1 KiB, one worker, {rounds} rounds, kernel {}",
        kernel()
    );
    println!(
        "{:<10} {:>14} {:>9} {:>12} {:>10} {:>18}",
        "proxy", "CPU µs/request", "± µs", "requests/s", "RSS KiB", "dpu-proxy / this"
    );
    for peer in peers {
        println!(
            "{:<10} {:>14.2} {:>9.2} {:>12.0} {:>10} {:>18.2}",
            peer.name,
            median(&peer.micros),
            spread(&peer.micros),
            median(&peer.rates),
            resident_kib(peer.process.0.id()),
            own / median(&peer.micros)
        );
    }
}

fn kernel() -> String {
    std::fs::read_to_string("/proc/sys/kernel/osrelease")
        .unwrap_or_default()
        .trim()
        .to_owned()
}

/// A command on one processor, where there are two and taskset is there.
fn pinned(processor: usize, program: &Path) -> Command {
    let several = std::thread::available_parallelism().is_ok_and(|n| n.get() > 1);
    match find("taskset").filter(|_| several) {
        Some(taskset) => {
            let mut command = Command::new(taskset);
            command.args(["-c", &processor.to_string()]).arg(program);
            command
        }
        None => Command::new(program),
    }
}

fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let folders = std::env::split_paths(&path).chain([PathBuf::from("/usr/sbin")]);
    folders.map(|f| f.join(name)).find(|p| p.is_file())
}

fn free_address() -> Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

fn await_listening(name: &str, address: SocketAddr) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(20);
    while TcpStream::connect(address).is_err() {
        if Instant::now() > end {
            return Err(format!("{name} does not listen on {address}").into());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
