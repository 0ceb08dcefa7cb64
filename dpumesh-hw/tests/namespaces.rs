//! Namespaces and netlink against the running kernel. Every case is a process in namespaces of its own.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use dpumesh_hw::netlink::{
    Address, LinkChange, LinkIndex, Neighbour, Netlink, Route, RouteKind, RouteMetrics, Rule, VethEnd, sysctl,
};
use dpumesh_hw::netns::process::die_with_parent;
use dpumesh_hw::netns::testing::{self, Case, RunAs};
use dpumesh_hw::netns::user::enter_user_namespace;
use dpumesh_hw::netns::{Namespace, Privilege, ensure_privilege};

const DEADLINE: Duration = Duration::from_secs(10);

/// Environment variable that gives this program another role than running cases.
const ROLE: &str = "NAMESPACES_TEST_ROLE";

fn main() -> ExitCode {
    match std::env::var(ROLE).as_deref() {
        Ok("parent") => return role_parent(),
        Ok("child") => return role_child(),
        Ok("refused") => return role_refused(),
        _ => {}
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
        case(
            "work_runs_inside_and_its_value_comes_back",
            work_runs_inside_and_its_value_comes_back,
        ),
        case(
            "a_panic_inside_goes_on_in_the_caller",
            a_panic_inside_goes_on_in_the_caller,
        ),
        case("a_thread_that_enters_stays", a_thread_that_enters_stays),
        case(
            "a_namespace_is_opened_by_its_path",
            a_namespace_is_opened_by_its_path,
        ),
        case("a_child_inherits_the_namespace", a_child_inherits_the_namespace),
        case("a_killed_process_leaves_nothing", a_killed_process_leaves_nothing),
        nobody(
            "a_refused_user_namespace_names_the_setting",
            a_refused_user_namespace_names_the_setting,
        ),
        case("a_hundred_cycles_leave_nothing", a_hundred_cycles_leave_nothing),
        case("a_veth_pair_carries_udp_and_tcp", a_veth_pair_carries_udp_and_tcp),
        case(
            "a_link_is_renamed_moved_and_deleted",
            a_link_is_renamed_moved_and_deleted,
        ),
        case(
            "routes_are_listed_as_they_were_added",
            routes_are_listed_as_they_were_added,
        ),
        case(
            "rules_and_neighbours_come_and_go",
            rules_and_neighbours_come_and_go,
        ),
        case(
            "refusals_name_operation_object_and_reason",
            refusals_name_operation_object_and_reason,
        ),
        case(
            "settings_belong_to_their_namespace",
            settings_belong_to_their_namespace,
        ),
        nobody(
            "an_ordinary_user_gets_the_rights",
            an_ordinary_user_gets_the_rights,
        ),
        nobody(
            "an_ordinary_users_veth_pair_carries_udp_and_tcp",
            a_veth_pair_carries_udp_and_tcp,
        ),
    ])
}

fn work_runs_inside_and_its_value_comes_back() {
    let namespace = Namespace::create().expect("created");
    let here = Namespace::current().expect("current");
    let inside = namespace
        .run(|| Namespace::current().expect("current").id())
        .expect("ran");
    assert_eq!(inside, namespace.id());
    assert_ne!(inside, here.id());
    assert_eq!(
        Namespace::current().expect("current"),
        here,
        "the caller has not moved"
    );
    let loopback = Netlink::open_in(&namespace)
        .expect("socket")
        .link("lo")
        .expect("lo");
    assert!(loopback.up);
}

fn a_panic_inside_goes_on_in_the_caller() {
    let namespace = Namespace::create().expect("created");
    let outcome = std::panic::catch_unwind(|| namespace.run(|| assert_eq!(1, 2, "on purpose")));
    assert!(outcome.is_err());
}

fn a_thread_that_enters_stays() {
    let namespace = Namespace::create().expect("created");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            assert!(!namespace.is_entered());
            namespace.enter_thread().expect("entered");
            assert!(namespace.is_entered());
            assert_eq!(Namespace::current().expect("current"), namespace);
        });
    });
    assert!(!namespace.is_entered());
}

fn a_namespace_is_opened_by_its_path() {
    let namespace = Namespace::create().expect("created");
    assert_eq!(Namespace::open(namespace.path()).expect("opened"), namespace);
    assert_eq!(namespace.try_clone().expect("cloned"), namespace);
    let error = Namespace::open("/proc/self/ns/absent")
        .expect_err("no such file")
        .to_string();
    assert!(
        error.contains("open network namespace /proc/self/ns/absent"),
        "{error}"
    );
    let no_namespace = Namespace::open("/proc/self/status").expect("any file opens");
    let error = no_namespace
        .run(|| ())
        .expect_err("cannot be entered")
        .to_string();
    assert!(error.contains("not a network namespace"), "{error}");
}

fn a_child_inherits_the_namespace() {
    let namespace = Namespace::create().expect("created");
    for _ in 0..2 {
        let mut command = Command::new("readlink");
        command.arg("/proc/self/ns/net").stdout(Stdio::piped());
        let output = namespace
            .spawn(command)
            .expect("started")
            .wait_with_output()
            .expect("ended");
        assert_eq!(
            String::from_utf8_lossy(&output.stdout).trim(),
            namespace.id().to_string()
        );
    }
    let missing = namespace
        .spawn(Command::new("/no/such/program"))
        .expect_err("cannot start")
        .to_string();
    assert!(missing.contains("/no/such/program"), "{missing}");
}

fn a_hundred_cycles_leave_nothing() {
    let home = Namespace::create().expect("created");
    let mut netlink = Netlink::open_in(&home).expect("socket");
    let open_files = || fs::read_dir("/proc/self/fd").expect("listed").count();
    let before = open_files();
    for _ in 0..100 {
        let pod = Namespace::create().expect("created");
        let far = VethEnd::new("eth0").in_namespace(&pod);
        netlink.create_veth(&VethEnd::new("near0"), &far).expect("veth");
        assert_eq!(
            pod.run(|| Namespace::current().expect("current").id())
                .expect("ran"),
            pod.id()
        );
        drop(pod);
        // The near end goes when the kernel has taken the namespace down.
        until("the veth pair is gone", || {
            netlink.links().expect("listed").len() == 1
        });
    }
    assert_eq!(open_files(), before);
}

/// A process makes a namespace, a veth pair into it and a child in it, and is killed: the child and the pair go.
fn a_killed_process_leaves_nothing() {
    let home = Namespace::create().expect("created");
    let mut netlink = Netlink::open_in(&home).expect("socket");
    let before = netlink.snapshot().expect("listed");
    let mut command = Command::new("/proc/self/exe");
    command.env(ROLE, "parent").stdout(Stdio::piped());
    let mut parent = home.spawn(command).expect("started");
    let mut said = parent.stdout.take().expect("piped");
    let mut ready = [0; 6];
    said.read_exact(&mut ready).expect("the child is up");
    assert_eq!(&ready, b"ready\n");
    let between = before.difference(&netlink.snapshot().expect("listed"));
    assert!(
        between.gone.is_empty() && between.new.iter().any(|line| line.contains("near0")),
        "{between}"
    );
    parent.kill().expect("killed");
    parent.wait().expect("ended");
    // Both hold the pipe: its end means that the child is gone too.
    assert_eq!(said.read(&mut ready).expect("end"), 0);
    until("the veth pair is gone", || {
        before.difference(&netlink.snapshot().expect("listed")).is_empty()
    });
}

fn role_parent() -> ExitCode {
    die_with_parent().expect("the case is alive");
    let pod = Namespace::create().expect("created");
    let far = VethEnd::new("eth0").in_namespace(&pod);
    Netlink::open()
        .expect("socket")
        .create_veth(&VethEnd::new("near0"), &far)
        .expect("veth");
    let mut command = Command::new("/proc/self/exe");
    command.env(ROLE, "child");
    let mut child = pod.spawn(command).expect("started");
    child.wait().expect("not before the kill");
    ExitCode::FAILURE
}

fn role_child() -> ExitCode {
    assert!(die_with_parent().expect("the parent is alive"));
    println!("ready");
    loop {
        std::thread::park();
    }
}

fn a_refused_user_namespace_names_the_setting() {
    // The limit belongs to the case's own user namespace.
    fs::write("/proc/sys/user/max_user_namespaces", "0").expect("limited");
    let output = Command::new("/proc/self/exe")
        .env(ROLE, "refused")
        .output()
        .expect("ran");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        said.contains("create a user namespace") && said.contains("user.max_user_namespaces is 0"),
        "{said}"
    );
}

fn role_refused() -> ExitCode {
    println!("{}", enter_user_namespace().expect_err("refused"));
    ExitCode::SUCCESS
}

/// Two namespaces with addresses on a veth pair.
struct Pair {
    left: Namespace,
    right: Namespace,
}

fn pair() -> Pair {
    let (left, right) = (
        Namespace::create().expect("created"),
        Namespace::create().expect("created"),
    );
    let mut netlink = Netlink::open_in(&left).expect("socket");
    let near = VethEnd::new("v0").mtu(9000).mac([2, 0, 0, 0, 0, 1]);
    let far = VethEnd::new("v0")
        .mtu(9000)
        .mac([2, 0, 0, 0, 0, 2])
        .in_namespace(&right);
    netlink.create_veth(&near, &far).expect("veth");
    for (namespace, host) in [(&left, 1), (&right, 2)] {
        let mut netlink = Netlink::open_in(namespace).expect("socket");
        let link = netlink.link("v0").expect("v0");
        assert_eq!(
            (link.mtu, link.mac, link.kind.as_deref()),
            (9000, Some([2, 0, 0, 0, 0, host]), Some("veth"))
        );
        netlink
            .change_link(link.index, &LinkChange::new().up())
            .expect("up");
        for net in [format!("10.0.0.{host}/24"), format!("fd00::{host}/64")] {
            netlink
                .add_address(&Address {
                    link: link.index,
                    net: net.parse().expect("net"),
                })
                .expect("address");
        }
    }
    for namespace in [&left, &right] {
        let mut netlink = Netlink::open_in(namespace).expect("socket");
        until("it passes packets", || netlink.link("v0").expect("v0").running);
    }
    Pair { left, right }
}

fn a_veth_pair_carries_udp_and_tcp() {
    let Pair { left, right } = pair();
    for server in ["10.0.0.2:0", "[fd00::2]:0"] {
        let server: SocketAddr = server.parse().expect("address");
        let receiver = right
            .run(|| UdpSocket::bind(server))
            .expect("ran")
            .expect("bound at once: no DAD");
        receiver.set_read_timeout(Some(DEADLINE)).expect("timeout");
        let to = receiver.local_addr().expect("address");
        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let sender = left.run(|| UdpSocket::bind(any)).expect("ran").expect("bound");
        sender.send_to(b"hello", to).expect("sent");
        let mut buffer = [0; 16];
        assert_eq!(receiver.recv(&mut buffer).expect("received"), 5);

        let listener = right
            .run(|| TcpListener::bind(server))
            .expect("ran")
            .expect("bound");
        let to = listener.local_addr().expect("address");
        let mut client = left
            .run(|| TcpStream::connect_timeout(&to, DEADLINE))
            .expect("ran")
            .expect("connected");
        let (mut accepted, _) = listener.accept().expect("accepted");
        client.write_all(b"over tcp").expect("written");
        drop(client);
        let mut text = String::new();
        accepted.read_to_string(&mut text).expect("read");
        assert_eq!(text, "over tcp");
    }
    let statistics = Netlink::open_in(&right)
        .expect("socket")
        .link("v0")
        .expect("v0")
        .statistics;
    assert!(
        statistics.rx_packets >= 10 && statistics.rx_octets > 500,
        "{statistics:?}"
    );
}

fn a_link_is_renamed_moved_and_deleted() {
    let (here, there) = (
        Namespace::create().expect("created"),
        Namespace::create().expect("created"),
    );
    let mut netlink = Netlink::open_in(&here).expect("socket");
    netlink
        .create_veth(&VethEnd::new("a0"), &VethEnd::new("b0"))
        .expect("veth");
    let taken = netlink
        .create_veth(&VethEnd::new("a0"), &VethEnd::new("c0"))
        .expect_err("name taken");
    assert!(taken.is_exists(), "{taken}");
    let index = netlink.link("b0").expect("b0").index;
    netlink
        .change_link(
            index,
            &LinkChange::new()
                .name("eth0")
                .mtu(1400)
                .mac([2, 0, 0, 0, 0, 9])
                .arp(false),
        )
        .expect("changed");
    let changed = netlink.link("eth0").expect("eth0");
    assert_eq!(
        (changed.mtu, changed.mac, changed.noarp, changed.up),
        (1400, Some([2, 0, 0, 0, 0, 9]), true, false)
    );
    netlink
        .change_link(index, &LinkChange::new().namespace(&there))
        .expect("moved");
    assert!(netlink.link("eth0").expect_err("moved away").is_missing());
    let mut elsewhere = Netlink::open_in(&there).expect("socket");
    let moved = elsewhere.link("eth0").expect("arrived");
    elsewhere
        .change_link(moved.index, &LinkChange::new().up().arp(true))
        .expect("up");
    assert!(elsewhere.link("eth0").expect("eth0").up && !elsewhere.link("eth0").expect("eth0").noarp);
    let near = netlink.link("a0").expect("a0");
    netlink.delete_link(near.index).expect("deleted");
    assert!(netlink.delete_link(near.index).expect_err("gone").is_missing());
    assert!(
        elsewhere
            .link("eth0")
            .expect_err("its other end went too")
            .is_missing()
    );
}

fn routes_are_listed_as_they_were_added() {
    let Pair { left, .. } = pair();
    let mut netlink = Netlink::open_in(&left).expect("socket");
    let link = netlink.link("v0").expect("v0").index;
    let ip = |text: &str| text.parse::<IpAddr>().expect("address");
    let net = |text: &str| text.parse().expect("net");
    let metrics = RouteMetrics {
        mtu: Some(1400),
        mtu_lock: true,
        congestion: Some("cubic".into()),
        advertised_mss: Some(1360),
    };
    let mut routes = vec![
        Route::new(net("10.96.0.0/16"))
            .via(ip("169.254.1.1"))
            .on(link)
            .onlink()
            .source(ip("10.0.0.1")),
        Route::new(net("10.97.0.0/16")).on(link).metrics(metrics.clone()),
        Route::new(net("fd96::/112")).via(ip("fe80::1")).on(link).onlink(),
        Route::new(net("fd97::/112")).on(link).metrics(metrics),
        Route::new(net("10.98.0.0/16")).kind(RouteKind::Blackhole),
        Route::new(net("10.99.0.0/16")).kind(RouteKind::Unreachable),
        Route::new(net("0.0.0.0/0"))
            .kind(RouteKind::Local)
            .on(LinkIndex(1))
            .table(1000),
        Route::new(net("::/0"))
            .kind(RouteKind::Local)
            .on(LinkIndex(1))
            .table(1000),
    ];
    for route in &routes {
        netlink.add_route(route).expect("added");
        assert!(netlink.add_route(route).expect_err("there already").is_exists());
        netlink.replace_route(route).expect("replaced by itself");
    }
    let listed = netlink.routes(None).expect("listed");
    for route in &mut routes {
        // The kernel gives every IPv6 route a priority.
        if route.destination.addr().is_ipv6() {
            route.priority = 1024;
        }
        assert!(listed.contains(route), "{route:?}\nnot in {listed:#?}");
    }
    for route in &routes {
        netlink.delete_route(route).expect("deleted");
        assert!(netlink.delete_route(route).expect_err("gone").is_missing());
    }
    assert!(netlink.routes(Some(1000)).expect("listed").is_empty());
}

fn rules_and_neighbours_come_and_go() {
    let Pair { left, .. } = pair();
    let mut netlink = Netlink::open_in(&left).expect("socket");
    let before = netlink.rules().expect("listed");
    let rules = [
        Rule::incoming(false, "v0", 1000, 50),
        Rule::incoming(true, "v0", 1000, 50),
    ];
    for rule in &rules {
        netlink.add_rule(rule).expect("added");
        assert!(netlink.add_rule(rule).expect_err("there already").is_exists());
        assert!(netlink.rules().expect("listed").contains(rule));
    }
    for rule in &rules {
        netlink.delete_rule(rule).expect("deleted");
    }
    assert_eq!(netlink.rules().expect("listed"), before);

    let link = netlink.link("v0").expect("v0").index;
    for address in ["10.0.0.77", "fd00::77"] {
        let neighbour = Neighbour::permanent(link, address.parse().expect("address"), [2, 0, 0, 0, 0, 0x77]);
        netlink.set_neighbour(&neighbour).expect("set");
        assert!(netlink.neighbours().expect("listed").contains(&neighbour));
        netlink.delete_neighbour(&neighbour).expect("deleted");
        assert!(!netlink.neighbours().expect("listed").contains(&neighbour));
    }
    let addresses = netlink.addresses().expect("listed");
    let ours: Vec<_> = addresses.iter().filter(|address| address.link == link).collect();
    assert!(
        ours.iter()
            .any(|address| address.net.to_string() == "10.0.0.1/24"),
        "{ours:?}"
    );
    let gone = Address {
        link,
        net: "fd00::1/64".parse().expect("net"),
    };
    netlink.delete_address(&gone).expect("deleted");
    assert!(netlink.delete_address(&gone).expect_err("gone").is_missing());
}

fn refusals_name_operation_object_and_reason() {
    let namespace = Namespace::create().expect("created");
    let mut netlink = Netlink::open_in(&namespace).expect("socket");
    let unreachable = Route::new("10.96.0.0/16".parse().expect("net")).via("192.0.2.1".parse().expect("ip"));
    let says = netlink
        .add_route(&unreachable)
        .expect_err("no way to the gateway")
        .to_string();
    assert!(says.contains("add route 10.96.0.0/16 via 192.0.2.1"), "{says}");
    assert!(
        says.contains("Nexthop has invalid gateway"),
        "the kernel's own sentence: {says}"
    );
    let long = "a-name-of-sixteen";
    let says = netlink
        .create_veth(&VethEnd::new(long), &VethEnd::new("b0"))
        .expect_err("too long")
        .to_string();
    assert!(says.contains(long), "{says}");
    assert!(netlink.link("absent0").expect_err("absent").is_missing());
}

fn settings_belong_to_their_namespace() {
    let (one, other) = (
        Namespace::create().expect("created"),
        Namespace::create().expect("created"),
    );
    sysctl::set(&one, "ipv4/ip_local_port_range", "2000 3000").expect("set");
    assert_eq!(
        sysctl::get(&one, "ipv4/ip_local_port_range").expect("read"),
        "2000\t3000"
    );
    assert_ne!(
        sysctl::get(&other, "ipv4/ip_local_port_range").expect("read"),
        "2000\t3000"
    );
    let says = sysctl::set(&one, "ipv4/conf/absent0/rp_filter", "0")
        .expect_err("absent")
        .to_string();
    assert!(says.contains("net/ipv4/conf/absent0/rp_filter = \"0\""), "{says}");
}

fn an_ordinary_user_gets_the_rights() {
    // The harness has entered the user namespace before this case; asking again finds them there.
    assert_eq!(ensure_privilege().expect("has them"), Privilege::Root);
    let map = fs::read_to_string("/proc/self/uid_map").expect("read");
    let fields: Vec<&str> = map.split_whitespace().collect();
    assert_eq!(
        (fields[0], fields[2]),
        ("0", "1"),
        "root here, one ordinary user outside: {map}"
    );
    assert_ne!(fields[1], "0", "not root outside: {map}");
    Namespace::create().expect("created");
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < DEADLINE, "not in {DEADLINE:?}: {what}");
        std::thread::yield_now();
    }
}
