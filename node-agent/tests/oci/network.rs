//! What a sandbox can reach, in a network of the test's own: nothing leaves the machine.
//!
//! ```text
//!  sandboxes ── the host (this thread's namespace) ── up0 ══ net0 "the internet" (another namespace)
//!                11.0.0.1, 10.99.0.1                        11.0.0.2, 11.0.0.3: public hosts
//!                                                           10.99.0.2: a private one, 169.254.169.254: metadata
//! ```

use std::fs::File;
use std::io::Write;
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::process::{Child, Command};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{RData, Record, RecordType};
use nix::sched::{CloneFlags, setns, unshare};
use warren_node_agent::driver::oci::NetworkOptions;
use warren_node_agent::driver::{Driver, DriverError, InstanceKey};
use warren_node_agent::network::egress::{Destination, Egress};

use super::world::*;

/// Says to whom it speaks, and closes. Everywhere in the internet, as `OTHER`, which is the same.
const WEB: u16 = 80;
const OTHER: u16 = 8080;
/// Keeps its last connection for the test to write to.
const STREAM: u16 = 8081;
/// A service of the host.
const HOST_SERVICE: u16 = 7000;

struct Internet {
    holder: Child,
    /// The last connection to `STREAM`.
    stream: Arc<Mutex<Option<TcpStream>>>,
}

impl Drop for Internet {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

fn ip(arguments: &str) {
    let done = Command::new("ip").args(arguments.split_whitespace()).status().expect("ip (install iproute2)");
    assert!(done.success(), "ip {arguments}");
}

impl Internet {
    fn new() -> Self {
        let holder = Command::new("unshare").args(["-n", "sleep", "600"]).spawn().expect("unshare");
        let (pid, own) = (holder.id(), std::fs::read_link("/proc/thread-self/ns/net").expect("namespace"));
        let path = format!("/proc/{pid}/ns/net");
        while std::fs::read_link(&path).expect("namespace") == own {
            thread::yield_now();
        }
        // A new namespace begins with the host's setting.
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "0").expect("writes");
        ip("link set lo up");
        ip(&format!("link add up0 type veth peer name net0 netns {pid}"));
        ip("address add 11.0.0.1/24 dev up0");
        ip("address add 10.99.0.1/24 dev up0");
        ip("link set up0 up");
        ip("route add 169.254.169.254 dev up0");
        let stream = Arc::new(Mutex::new(None));
        let last = Arc::clone(&stream);
        let served = thread::spawn(move || {
            setns(File::open(path).expect("namespace"), CloneFlags::CLONE_NEWNET).expect("enters");
            ip("link set lo up");
            for address in ["11.0.0.2/24", "11.0.0.3/24", "10.99.0.2/24", "169.254.169.254/32"] {
                ip(&format!("address add {address} dev net0"));
            }
            ip("link set net0 up");
            for port in [WEB, OTHER] {
                serve(port, greet);
            }
            serve(STREAM, move |stream| *last.lock().expect("lock") = Some(stream));
        });
        served.join().expect("serves");
        serve(HOST_SERVICE, greet);
        Self { holder, stream }
    }

    fn write(&self, text: &str) -> bool {
        self.stream.lock().expect("lock").as_mut().is_some_and(|stream| stream.write_all(text.as_bytes()).is_ok())
    }
}

fn greet(mut stream: TcpStream) {
    let peer = stream.peer_addr().expect("peer").ip();
    let _ = writeln!(stream, "you are {peer}");
}

/// In this thread's namespace, until the process ends.
fn serve(port: u16, each: impl Fn(TcpStream) + Send + 'static) {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).expect("listens");
    thread::spawn(move || listener.incoming().flatten().for_each(each));
}

/// Answers names as the host's resolver.
fn resolve(socket: &UdpSocket) {
    let mut buffer = [0u8; 512];
    while let Ok((count, from)) = socket.recv_from(&mut buffer) {
        let question = Message::from_vec(&buffer[..count]).expect("a question");
        let query = question.queries[0].clone();
        let mut answer = question.into_response();
        let address = match query.name.to_lowercase().to_ascii().as_str() {
            "allowed.example." => Some([11, 0, 0, 2]),
            "private.example." => Some([10, 99, 0, 2]),
            "other.example." => Some([11, 0, 0, 3]),
            _ => None,
        };
        match address {
            Some(address) if query.query_type == RecordType::A => {
                let data = RData::A(A(Ipv4Addr::from(address)));
                answer.add_answer(Record::from_rdata(query.name, 5, data));
            }
            Some(_) => {}
            None => answer.metadata.response_code = ResponseCode::NXDomain,
        }
        let _ = socket.send_to(&answer.to_vec().expect("bytes"), from);
    }
}

/// Runs `test` for each runtime that has a network, in a network namespace of its own, and checks that nothing is left in that.
fn in_laboratory<F: Future<Output = ()> + Send + 'static>(
    name: &'static str,
    test: impl Fn(Arc<World>, Arc<Internet>) -> F + Send + 'static,
) {
    if !rustix::process::geteuid().is_root() || Command::new("nft").arg("--version").output().is_err() {
        eprintln!("SKIPPED {name}: not root, or no nft (install nftables)");
        return;
    }
    let laboratory = thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace");
        let internet = Arc::new(Internet::new());
        let socket = UdpSocket::bind(RESOLVER).expect("binds");
        thread::spawn(move || resolve(&socket));
        with_runtimes(&["runc", "crun"], name, |world| test(world, Arc::clone(&internet)));
        let listed = |program: &str, arguments: &[&str]| {
            let output = Command::new(program).args(arguments).output().expect("runs");
            String::from_utf8_lossy(&output.stdout).into_owned()
        };
        assert_eq!(listed("nft", &["list", "tables"]), "", "rules are left");
        assert!(!listed("ip", &["-o", "link"]).contains("wrn"), "links are left");
        assert!(!listed("ip", &["address"]).contains("10.224."), "addresses are left");
        assert_eq!(std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward").expect("reads").trim(), "0");
    });
    if let Err(panicked) = laboratory.join() {
        std::panic::resume_unwind(panicked);
    }
}

fn list(entries: &[&str]) -> Egress {
    Egress::List(entries.iter().map(|entry| Destination::parse(entry).expect("an entry")).collect())
}

async fn start(world: &World, name: &str, egress: Egress) -> InstanceKey {
    let command = ["/bin/sh", "-c", "while :; do echo in | nc -l -p 9000 > /tmp/heard; done"];
    let spec = warren_node_agent::driver::InstanceSpec { egress, ..world.spec(name, &command) };
    world.driver.start(&spec).await.unwrap_or_else(|e| panic!("start {name} with {}: {e}", world.runtime));
    spec.key
}

/// Which of the places the sandbox reaches, `address port` each.
async fn reached(world: &World, key: &InstanceKey, places: &[String]) -> Vec<String> {
    let one = |place: &String| {
        format!(
            "(nc -w 1 {place} < /dev/null > /tmp/{0} 2>/dev/null; [ -s /tmp/{0} ] && echo '{place}') &",
            place.replace(' ', "-")
        )
    };
    let script: Vec<String> = places.iter().map(one).collect();
    let output = world.sh(key, &format!("{}\nwait", script.join("\n"))).await;
    let mut reached: Vec<String> = output.text().lines().map(str::to_owned).collect();
    reached.sort();
    reached
}

async fn address(world: &World, key: &InstanceKey) -> String {
    let output = world.sh(key, "ip -o -4 addr show eth0").await;
    output.text().split_whitespace().nth(3).expect("an address").trim_end_matches("/32").to_owned()
}

async fn gateway(world: &World, key: &InstanceKey) -> String {
    let output = world.sh(key, "cat /etc/resolv.conf").await;
    output.text().split_whitespace().nth(1).expect("a nameserver").to_owned()
}

#[test]
fn a_sandbox_reaches_what_its_policy_says_and_nothing_else() {
    in_laboratory("egress", |world, _internet| async move {
        let none = start(&world, "none", Egress::None).await;
        let public = start(&world, "public", Egress::Public).await;
        let some = start(&world, "some", list(&["10.99.0.2:80", "10.99.0.0/30:80", "11.0.0.3"])).await;
        let all = start(&world, "all", list(&["0.0.0.0/0", "10.0.0.0/8", "169.254.169.254"])).await;
        let neighbour = address(&world, &none).await;
        let host = gateway(&world, &none).await;
        let mut places: Vec<String> =
            ["11.0.0.2 80", "11.0.0.3 8080", "10.99.0.2 80", "10.99.0.2 8080", "169.254.169.254 80"]
                .map(str::to_owned)
                .to_vec();
        places.extend(["11.0.0.1", "10.99.0.1", &host].map(|address| format!("{address} {HOST_SERVICE}")));
        places.push(format!("{neighbour} 9000"));
        assert_eq!(reached(&world, &public, &places).await, ["11.0.0.2 80", "11.0.0.3 8080"]);
        assert!(reached(&world, &none, &places[..8]).await.is_empty());
        assert_eq!(reached(&world, &some, &places).await, ["10.99.0.2 80", "11.0.0.3 8080"]);
        let outside = ["10.99.0.2 80", "10.99.0.2 8080", "11.0.0.2 80", "11.0.0.3 8080"];
        assert_eq!(reached(&world, &all, &places).await, outside);
        let seen = world.sh(&public, "nc -w 2 11.0.0.2 80 < /dev/null").await;
        assert_eq!(seen.text(), "you are 11.0.0.1", "the host stands for it");
        let stats = world.driver.network_stats(&public).await.expect("stats");
        assert!(stats.denied_packets >= 6 && stats.received_bytes > 0 && stats.sent_packets > 6, "{stats:?}");
        let loopback = world.sh(&none, "nc -w 2 127.0.0.1 9000 < /dev/null").await;
        assert_eq!(loopback.text(), "in", "it can speak to itself");
    });
}

#[test]
fn a_change_of_policy_ends_what_it_forbids_and_nothing_else() {
    in_laboratory("live change", |world, internet| async move {
        let key = start(&world, "a", Egress::Public).await;
        world.sh(&key, &format!("(sleep 1000 | nc 11.0.0.2 {STREAM} > /tmp/got 2>&1) > /dev/null 2>&1 &")).await;
        assert_eq!(world.driver.egress(&key), Some(Egress::Public));
        let heard = async |text: &str| world.sh(&key, "cat /tmp/got").await.text().contains(text);
        let places = ["11.0.0.2 80".to_owned(), "11.0.0.3 80".to_owned()];
        while !internet.write("one\n") || !heard("one").await {
            look_again().await;
        }
        let driver = &world.driver;
        driver.set_egress(&key, &list(&["11.0.0.2"])).await.expect("changes");
        assert_eq!(reached(&world, &key, &places).await, ["11.0.0.2 80"]);
        while !internet.write("two\n") || !heard("two").await {
            look_again().await;
        }
        driver.set_egress(&key, &Egress::None).await.expect("changes");
        assert!(reached(&world, &key, &places).await.is_empty());
        internet.write("three\n");
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert!(!heard("three").await, "the connection goes on");
        // Another agent finds what was last asked for.
        assert_eq!(world.restarted().egress(&key), Some(Egress::None));
        assert!(reached(&world, &key, &places).await.is_empty());
        for _ in 0..2 {
            driver.set_egress(&key, &Egress::Public).await.expect("changes");
        }
        assert_eq!(reached(&world, &key, &places).await, places);
    });
}

#[test]
fn names_are_answered_by_the_policy_and_allow_what_they_have() {
    in_laboratory("names", |world, _internet| async move {
        let listed = start(&world, "listed", list(&["allowed.example:80", "private.example"])).await;
        let public = start(&world, "public", Egress::Public).await;
        let none = start(&world, "none", Egress::None).await;
        let asked = async |key: &InstanceKey, name: &str| {
            let output = world.sh(key, &format!("nslookup -type=a {name} 2>&1")).await;
            output.text().to_owned()
        };
        let places = ["11.0.0.2 80", "11.0.0.2 8080", "10.99.0.2 80"].map(str::to_owned);
        // The agent may just be taking its address.
        while !asked(&public, "allowed.example").await.contains("11.0.0.2") {
            look_again().await;
        }
        assert!(reached(&world, &listed, &places).await.is_empty(), "nobody asked yet");
        assert!(asked(&listed, "Allowed.example").await.contains("11.0.0.2"));
        assert!(asked(&listed, "private.example").await.contains("10.99.0.2"));
        assert_eq!(reached(&world, &listed, &places).await, ["11.0.0.2 80"], "a name does not open a private address");
        for (key, name) in [(&listed, "other.example"), (&none, "allowed.example")] {
            let answer = asked(key, name).await;
            assert!(answer.contains("REFUSED") && !answer.contains("11.0.0"), "{answer}");
        }
        assert!(asked(&public, "other.example").await.contains("11.0.0.3"));
        assert!(asked(&public, "nowhere.example").await.contains("NXDOMAIN"));
        world.driver.set_egress(&listed, &list(&["allowed.example:8080"])).await.expect("changes");
        assert!(reached(&world, &listed, &places).await.is_empty(), "what was learnt went with the policy");
        assert!(asked(&listed, "allowed.example").await.contains("11.0.0.2"));
        assert_eq!(reached(&world, &listed, &places).await, ["11.0.0.2 8080"]);
    });
}

#[test]
fn packets_from_another_s_address_are_denied() {
    in_laboratory("spoofing", |world, _internet| async move {
        let key = start(&world, "a", Egress::Public).await;
        let other = start(&world, "b", Egress::Public).await;
        let neighbour = address(&world, &other).await;
        let directory = world.dir.path().join("oci/instances/acme.a.1");
        let pid = std::fs::read_to_string(directory.join("started")).expect("pid");
        // As its root could if it got the capability that it lacks.
        let send = move || {
            setns(File::open(format!("/proc/{}/ns/net", pid.trim())).expect("namespace"), CloneFlags::CLONE_NEWNET)
                .expect("enters");
            for source in ["11.0.0.77", &neighbour] {
                ip(&format!("address add {source}/32 dev eth0"));
                let socket = UdpSocket::bind((source, 0)).expect("binds");
                socket.send_to(b"from somebody else", ("11.0.0.2", WEB)).expect("sends");
            }
        };
        let before = world.driver.network_stats(&key).await.expect("stats").denied_packets;
        thread::spawn(send).join().expect("sends");
        while world.driver.network_stats(&key).await.expect("stats").denied_packets < before + 2 {
            look_again().await;
        }
        assert_eq!(reached(&world, &key, &["11.0.0.2 80".to_owned()]).await.len(), 1, "its own address still does");
    });
}

#[test]
fn a_new_agent_makes_rules_whole_and_sweeps_what_is_left() {
    in_laboratory("leftovers", |world, _internet| async move {
        let place = ["11.0.0.2 80".to_owned(), "10.99.0.2 80".to_owned()];
        let key = start(&world, "a", Egress::Public).await;
        let link = world.sh(&key, "echo").await.exit;
        assert_eq!(link, code(0));
        let links = Command::new("ip").args(["-o", "link"]).output().expect("ip").stdout;
        let links = String::from_utf8_lossy(&links).into_owned();
        let its = links.split_whitespace().find(|word| word.starts_with("wrn")).expect("its link");
        let prefix = &its[..9];
        ip(&format!("link add {prefix}07fe type veth peer name stray"));
        assert!(Command::new("nft").args(["flush", "ruleset"]).status().expect("nft").success());
        let restarted = world.restarted();
        assert_eq!(reached(&world, &key, &place).await, ["11.0.0.2 80"]);
        let links = Command::new("ip").args(["-o", "link"]).output().expect("ip").stdout;
        assert!(!String::from_utf8_lossy(&links).contains("07fe"), "a link that nobody has is swept");
        // A start that the flush did not prepare: the table is made anew on the way.
        assert!(Command::new("nft").args(["flush", "ruleset"]).status().expect("nft").success());
        let second = start(&world, "b", list(&["10.99.0.2"])).await;
        assert_eq!(reached(&world, &second, &place).await, ["10.99.0.2 80"]);
        assert_eq!(reached(&world, &key, &place).await, ["11.0.0.2 80"]);
        restarted.remove(&key).await.expect("removes");
        world.driver.remove(&key).await.expect("removes again");
        let links = Command::new("ip").args(["-o", "link"]).output().expect("ip").stdout;
        assert!(!String::from_utf8_lossy(&links).contains(its.split('@').next().expect("a name")));
    });
}

#[test]
fn two_nodes_of_one_host_do_not_meet() {
    in_laboratory("two nodes", |world, _internet| async move {
        let second = World::new(&world.runtime);
        let a = start(&world, "a", list(&["0.0.0.0/0"])).await;
        let b = start(&second, "a", list(&["0.0.0.0/0"])).await;
        let [in_a, in_b] = [address(&world, &a).await, address(&second, &b).await];
        let internet = "11.0.0.2 80";
        assert_eq!(reached(&world, &a, &[internet.to_owned(), format!("{in_b} 9000")]).await, [internet]);
        assert_eq!(reached(&second, &b, &[internet.to_owned(), format!("{in_a} 9000")]).await, [internet]);
        second.driver.clean().await.expect("cleans");
        second.assert_nothing_left();
        assert_eq!(reached(&world, &a, &[internet.to_owned()]).await, [internet]);
    });
}

#[test]
fn without_a_network_only_sandboxes_that_need_none_are_started() {
    in_laboratory("no network", |world, _internet| async move {
        let range = "10.225.0.0/21".parse().expect("a range");
        ip("address add 10.225.0.9/21 dev up0");
        let without = World::with_network(&world.runtime, NetworkOptions { range, upstreams: Vec::new() });
        ip("address delete 10.225.0.9/21 dev up0");
        let spec = |egress| warren_node_agent::driver::InstanceSpec { egress, ..without.spec("a", &[]) };
        let refused = without.driver.start(&spec(Egress::Public)).await.expect_err("refused");
        assert!(
            matches!(&refused, DriverError::Runtime { output, .. } if output.contains("--sandbox-network")),
            "{refused}"
        );
        without.driver.start(&spec(Egress::None)).await.expect("starts");
        let links = without.sh(&key("a"), "ip -o link").await;
        assert_eq!(links.text().lines().count(), 1, "loopback alone: {}", links.text());
        assert_eq!(without.driver.egress(&key("a")), None);
        without.driver.clean().await.expect("cleans");
        without.assert_nothing_left();
    });
}
