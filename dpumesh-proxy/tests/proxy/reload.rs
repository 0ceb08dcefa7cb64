//! Listeners, clusters, routes and endpoints from watched files.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::harness::{Client, Endpoint, Message, Running, await_true, cluster, lb_endpoint, replace};

fn eds(version: &str, endpoints: &[SocketAddr]) -> String {
    let endpoints: Vec<String> = endpoints.iter().map(|e| lb_endpoint(*e)).collect();
    format!(
        "version_info: \"{version}\"\nresources:\n- \"@type\": type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment\n  \
         cluster_name: app\n  endpoints: [{{lb_endpoints: [{}]}}]\n",
        endpoints.join(", ")
    )
}

fn rds(cluster: &str) -> String {
    format!(
        "resources:\n- \"@type\": type.googleapis.com/envoy.config.route.v3.RouteConfiguration\n  name: routes\n  \
         virtual_hosts: [{{name: all, domains: [\"*\"], routes: [{{match: {{prefix: /}}, route: {{cluster: {cluster}}}}}]}}]\n"
    )
}

fn lds(name: &str, folder: &Path) -> String {
    format!(
        r#"
version_info: "1"
resources:
- "@type": type.googleapis.com/envoy.config.listener.v3.Listener
  name: {name}
  address: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}
  filter_chains:
  - filters:
    - name: envoy.filters.network.http_connection_manager
      typed_config:
        "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
        stat_prefix: web
        rds: {{route_config_name: routes, config_source: {{path_config_source: {{path: "{}"}}}}}}
        http_filters:
        - name: envoy.filters.http.router
          typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
"#,
        folder.join("rds.yaml").display()
    )
}

fn cds(folder: &Path, more: &str) -> String {
    format!(
        "resources:\n- {{\"@type\": type.googleapis.com/envoy.config.cluster.v3.Cluster, name: app, type: EDS, connect_timeout: 1s, \
         eds_cluster_config: {{eds_config: {{path_config_source: {{path: \"{}\"}}}}}}}}\n{more}",
        folder.join("eds.yaml").display()
    )
}

fn dynamic(endpoints: &[SocketAddr]) -> Running {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    std::fs::write(at.join("eds.yaml"), eds("1", endpoints)).unwrap();
    std::fs::write(at.join("rds.yaml"), rds("app")).unwrap();
    std::fs::write(at.join("lds.yaml"), lds("web", at)).unwrap();
    std::fs::write(at.join("cds.yaml"), cds(at, "")).unwrap();
    let bootstrap = format!(
        "admin: {{address: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}}}\n\
         dynamic_resources:\n  lds_config: {{path_config_source: {{path: \"{0}/lds.yaml\"}}}}\n  \
         cds_config: {{path_config_source: {{path: \"{0}/cds.yaml\", watched_directory: {{path: \"{0}\"}}}}}}\n",
        at.display()
    );
    Running::start_in(folder, &bootstrap, 2)
}

impl Running {
    fn file(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }

    fn generation(&self) -> u64 {
        self.proxy.shared().config.load().generation
    }

    /// Waits until an answer is as it should be: workers take a new configuration a moment after it is in force.
    fn await_answer(&self, client: &mut Client, what: &str, holds: impl Fn(&Message) -> bool) {
        await_true(what, || holds(&client.get("/")));
    }

    fn next_generation(&self, change: impl FnOnce()) {
        let before = self.generation();
        change();
        await_true("a new configuration", || self.generation() > before);
    }
}

#[test]
fn endpoints_change_under_load_without_a_failed_request() {
    let all = [Endpoint::start("a"), Endpoint::start("b"), Endpoint::start("c")];
    let at = |index: usize| all[index].address;
    let running = dynamic(&[at(0)]);
    let load = Load::start(running.web(), 8);
    for (version, endpoints) in [vec![at(0), at(1)], vec![at(1)], vec![at(1), at(2)], vec![at(2)]]
        .iter()
        .enumerate()
    {
        running.next_generation(|| replace(&running.file("eds.yaml"), &eds(&version.to_string(), endpoints)));
        load.goes_on();
    }
    let settled = all[0].requests() + all[1].requests();
    let last = all[2].requests();
    await_true("the last endpoint serves", || all[2].requests() > last + 50);
    load.stop();
    assert!(all[0].requests() + all[1].requests() <= settled + 8);
    assert_eq!(running.stat("http.web.downstream_rq_5xx"), 0);
    running.await_stat("cluster.app.update_success", 5);
}

#[test]
fn a_bad_update_is_refused_named_and_counted_and_the_old_one_serves() {
    let endpoint = Endpoint::start("only");
    let running = dynamic(&[endpoint.address]);
    let before = running.generation();
    for (n, bad) in [
        "resources: [",
        "resources:\n- {\"@type\": type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment, cluster_name: app, nonsense: 1}\n",
        "resources:\n- {\"@type\": type.googleapis.com/envoy.config.cluster.v3.Cluster, name: app}\n",
        "resources:\n- {\"@type\": type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment, cluster_name: app, endpoints: [{proximity: 1}]}\n",
    ]
    .iter()
    .enumerate()
    {
        replace(&running.file("eds.yaml"), bad);
        running.await_stat("cluster.app.update_rejected", n as u64 + 1);
        assert_eq!(running.client().get("/").status(), 200);
    }
    assert_eq!(running.generation(), before);
    // A good update of another file goes through although this one is still bad.
    running.next_generation(|| replace(&running.file("rds.yaml"), &rds("missing")));
    let mut client = running.client();
    running.await_answer(&mut client, "no such cluster", |r| r.status() == 503);
    running.next_generation(|| replace(&running.file("rds.yaml"), &rds("app")));
    running.await_answer(&mut client, "the old cluster again", |r| r.status() == 200);
    running.next_generation(|| replace(&running.file("eds.yaml"), &eds("2", &[])));
    running.await_answer(&mut client, "no endpoints", |r| r.text() == "no healthy upstream");
}

/// Clients that send requests, each expecting 200, until they are told to stop.
struct Load {
    stop: Arc<AtomicBool>,
    served: Arc<AtomicUsize>,
    clients: Vec<std::thread::JoinHandle<()>>,
}

impl Load {
    fn start(web: SocketAddr, clients: usize) -> Self {
        let (stop, served) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let client = |_| {
            let (stop, served) = (Arc::clone(&stop), Arc::clone(&served));
            std::thread::spawn(move || {
                let mut client = Client::connect(web);
                while !stop.load(Ordering::Relaxed) {
                    let response = client.get("/");
                    assert_eq!(response.status(), 200, "{}", response.text());
                    served.fetch_add(1, Ordering::Relaxed);
                }
            })
        };
        let clients = (0..clients).map(client).collect();
        Self {
            stop,
            served,
            clients,
        }
    }

    fn goes_on(&self) {
        let before = self.served.load(Ordering::Relaxed);
        await_true("requests go on", || {
            self.served.load(Ordering::Relaxed) > before + 50
        });
    }

    fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.clients.into_iter().for_each(|c| c.join().unwrap());
    }
}

#[test]
fn a_broken_file_is_named_by_file_field_and_reason_while_requests_go_on() {
    let endpoint = Endpoint::start("only");
    let running = dynamic(&[endpoint.address]);
    let (before, file) = (running.generation(), running.file("rds.yaml"));
    let load = Load::start(running.web(), 4);
    let failures = || {
        let dump: serde_json::Value =
            serde_json::from_str(&running.admin("GET", "/config_dump").text()).unwrap();
        let configs = dump["configs"].as_array().unwrap().iter();
        configs
            .filter(|c| {
                c["@type"]
                    .as_str()
                    .unwrap()
                    .ends_with("envoy.admin.v3.UpdateFailureState")
            })
            .map(|c| c["details"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    let good = rds("app");
    for (n, (bad, path, reason)) in [
        (good.replace("[\"*\"]", "[\"*\""), "", "line 4"),
        (
            good.replace("match: {prefix", "matches: {prefix"),
            "route configuration \"routes\": resources[0].virtual_hosts[0].routes[0]",
            "matches",
        ),
        (
            good.replace("name: routes", "name: routes\n  validate_clusters: true")
                .replace("cluster: app", "cluster: gone"),
            "resources[0].virtual_hosts[0].routes[0].route.cluster",
            "gone",
        ),
    ]
    .iter()
    .enumerate()
    {
        replace(&file, bad);
        running.await_stat("http.web.rds.routes.update_rejected", n as u64 + 1);
        await_true("the failure is shown", || {
            failures()
                .iter()
                .any(|f| f.contains(&file.display().to_string()) && f.contains(path) && f.contains(reason))
        });
        assert_eq!(failures().len(), 1);
        load.goes_on();
    }
    assert_eq!(running.generation(), before);
    running.next_generation(|| replace(&file, &good));
    await_true("nothing is wrong any more", || failures().is_empty());
    load.goes_on();
    load.stop();
    assert_eq!(running.stat("http.web.downstream_rq_5xx"), 0);
}

#[test]
fn routes_change_for_open_connections_and_clusters_come_and_go() {
    let (a, b) = (Endpoint::start("a"), Endpoint::start("b"));
    let running = dynamic(&[a.address]);
    let mut client = running.client();
    assert_eq!(client.get("/").header("x-endpoint"), Some("a"));
    let more = format!(
        "- {}\n",
        cluster(
            "other",
            &[b.address],
            ", \"@type\": type.googleapis.com/envoy.config.cluster.v3.Cluster"
        )
    );
    running.next_generation(|| replace(&running.file("cds.yaml"), &cds(running.folder.path(), &more)));
    // Written in place this time.
    running.next_generation(|| std::fs::write(running.file("rds.yaml"), rds("other")).unwrap());
    running.await_answer(&mut client, "the other cluster", |r| {
        r.header("x-endpoint") == Some("b")
    });
    assert_eq!(running.stat("cluster_manager.active_clusters"), 2);
    running.await_stat("http.web.rds.routes.update_success", 2);
    running.next_generation(|| replace(&running.file("cds.yaml"), &cds(running.folder.path(), "")));
    running.await_answer(&mut client, "its cluster is gone", |r| r.status() == 503);
    assert_eq!(running.stat("http.web.no_cluster"), 1);
}

#[test]
fn a_changed_listener_takes_over_and_the_old_ones_connections_end_at_their_next_response() {
    let endpoint = Endpoint::start("only");
    let running = dynamic(&[endpoint.address]);
    let old = running.web();
    let mut client = running.client();
    assert_eq!(client.get("/").header("connection"), None);
    running.next_generation(|| replace(&running.file("lds.yaml"), &lds("renamed", running.folder.path())));
    let new = running.proxy.listener_address("renamed").unwrap();
    assert_ne!(old, new);
    assert_eq!(Client::connect(new).get("/").status(), 200);
    await_true("the old listener is closed", || {
        std::net::TcpStream::connect(old).is_err()
    });
    assert_eq!(client.get("/").header("connection"), Some("close"));
    assert!(client.is_closed());
    let dump = running.admin("GET", "/config_dump?include_eds").text();
    assert!(
        dump.contains("\"renamed\"") && dump.contains("dynamic_endpoint_configs"),
        "{dump}"
    );
}

#[test]
fn a_folder_swapped_by_symlink_is_noticed() {
    let (a, b) = (Endpoint::start("a"), Endpoint::start("b"));
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    for (name, endpoint) in [("v1", a.address), ("v2", b.address)] {
        std::fs::create_dir(at.join(name)).unwrap();
        std::fs::write(at.join(name).join("eds.yaml"), eds(name, &[endpoint])).unwrap();
    }
    std::os::unix::fs::symlink("v1", at.join("current")).unwrap();
    std::fs::write(at.join("rds.yaml"), rds("app")).unwrap();
    std::fs::write(at.join("lds.yaml"), lds("web", at)).unwrap();
    let cluster = cds(&at.join("current"), "");
    std::fs::write(at.join("cds.yaml"), cluster).unwrap();
    let bootstrap = format!(
        "dynamic_resources:\n  lds_config: {{path_config_source: {{path: \"{0}/lds.yaml\"}}}}\n  \
         cds_config: {{path_config_source: {{path: \"{0}/cds.yaml\"}}}}\n",
        at.display()
    );
    let running = Running::start_in(folder, &bootstrap, 1);
    assert_eq!(running.client().get("/").header("x-endpoint"), Some("a"));
    running.next_generation(|| {
        std::os::unix::fs::symlink("v2", running.file("fresh")).unwrap();
        std::fs::rename(running.file("fresh"), running.file("current")).unwrap();
    });
    let mut client = running.client();
    running.await_answer(&mut client, "the swapped folder", |r| {
        r.header("x-endpoint") == Some("b")
    });
}

#[test]
fn the_last_request_of_a_changed_listener_goes_where_it_used_to() {
    let (a, b) = (Endpoint::start("a"), Endpoint::start("b"));
    let running = dynamic(&[a.address]);
    let mut client = running.client();
    assert_eq!(client.get("/").header("x-endpoint"), Some("a"));
    // Another cluster takes the place of the only one, and the connection's chain becomes another.
    let other = cluster(
        "other",
        &[b.address],
        ", \"@type\": type.googleapis.com/envoy.config.cluster.v3.Cluster",
    );
    let clusters =
        cds(running.folder.path(), "").replace("resources:\n", &format!("resources:\n- {other}\n"));
    running.next_generation(|| replace(&running.file("cds.yaml"), &clusters));
    let changed = lds("web", running.folder.path()).replace("stat_prefix: web", "stat_prefix: new");
    running.next_generation(|| replace(&running.file("lds.yaml"), &changed));
    running.await_answer(&mut client, "the connection's last answer", |answer| {
        assert_eq!(answer.header("x-endpoint"), Some("a"), "{}", answer.text());
        answer.header("connection") == Some("close")
    });
}
