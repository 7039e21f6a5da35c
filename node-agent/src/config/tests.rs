//! What is accepted, what is refused, and what the refusal says.

use clap::Parser;

use super::*;

fn minimal() -> Layer {
    Layer {
        node_id: Some("n1".into()),
        data_dir: Some("/d".into()),
        schedulers: Some("127.0.0.1:1,localhost:2".into()),
        ..Layer::default()
    }
}

/// The one problem of `layer`.
fn problem(layer: Layer) -> String {
    let problems = Config::resolve(layer).expect_err("must be refused").0;
    assert_eq!(problems.len(), 1, "{problems:?}");
    problems.into_iter().next().unwrap_or_default()
}

#[test]
fn little_is_needed_and_the_rest_has_defaults() {
    let config = Config::resolve(minimal()).expect("valid");
    assert_eq!(config.schedulers, ["127.0.0.1:1", "localhost:2"]);
    assert_eq!(config.listen.to_string(), "127.0.0.1:7080");
    assert_eq!(config.http_listen.to_string(), "127.0.0.1:7081");
    assert_eq!(config.drivers, [DriverKind::Oci]);
    assert_eq!((config.runtime.as_str(), config.log_format), ("runc", LogFormat::Text));
    assert_eq!((config.cpu, config.memory, config.disk), (None, None, None));
}

#[test]
fn every_problem_is_named_at_once_with_what_would_be_right() {
    let ConfigError(problems) = Config::resolve(Layer::default()).expect_err("empty");
    let keys: Vec<_> = problems.iter().map(|p| p.split(':').next().unwrap_or_default()).collect();
    assert_eq!(keys, ["node_id", "data_dir", "schedulers"]);
    assert!(problems[0].contains("--node-id") && problems[0].contains("WARREN_NODE_ID"), "{}", problems[0]);
    assert!(problem(Layer { memory: Some("8GB?".into()), ..minimal() }).starts_with("memory: `8GB?` is not a size"));
    assert!(problem(Layer { drivers: Some("oci,vm".into()), ..minimal() }).contains("write oci or sim"));
    assert!(problem(Layer { labels: Some("a".into()), ..minimal() }).contains("key=value"));
    assert!(problem(Layer { cpu_milli: Some("4.5".into()), ..minimal() }).contains("4000 for 4 vCPU"));
    assert!(problem(Layer { log_format: Some("xml".into()), ..minimal() }).contains("text or json"));
    assert!(problem(Layer { tls_cert: Some("c".into()), ..minimal() }).starts_with("tls_key"));
    assert!(problem(Layer { schedulers: Some("nowhere".into()), ..minimal() }).contains("host:port"));
    assert!(problem(Layer { sandbox_network: Some("10.0.0.0/30".into()), ..minimal() }).contains("10.224.0.0/14"));
    assert!(problem(Layer { dns_upstream: Some("dns.example".into()), ..minimal() }).contains("10.0.0.53"));
}

#[test]
fn plain_text_is_for_loopback_only() {
    let listen = |listen: &str| Layer { listen: Some(listen.into()), ..minimal() };
    assert!(problem(listen("10.0.0.1:7080")).contains("--tls-cert"));
    assert!(problem(Layer { http_listen: Some("0.0.0.0:1".into()), ..minimal() }).starts_with("http_listen"));
    assert!(problem(Layer { schedulers: Some("10.0.0.1:1".into()), ..minimal() }).contains("--tls-ca"));
    let tls = |layer: Layer| Layer { tls_cert: Some("c".into()), tls_key: Some("k".into()), ..layer };
    assert!(Config::resolve(tls(listen("10.0.0.1:7080"))).expect("valid").serves_tls());
    assert!(problem(tls(listen("0.0.0.0:7080"))).starts_with("advertise"));
}

#[test]
fn resolvers_are_given_with_or_without_a_port() {
    let layer = Layer { dns_upstream: Some("10.0.0.53, 127.0.0.1:5353".into()), ..minimal() };
    let upstreams = Config::resolve(layer).expect("valid").network.upstreams;
    assert_eq!(upstreams, ["10.0.0.53:53", "127.0.0.1:5353"].map(|text| text.parse().expect("an address")));
}

#[test]
fn sizes_read_as_people_write_them() {
    for (text, bytes) in
        [("1", 1), ("2KiB", 2048), ("3 MiB", 3 << 20), ("8GiB", 8 << 30), ("8g", 8 << 30), ("1TiB", 1 << 40)]
    {
        assert_eq!(parse::size(text), Ok(Bytes(bytes)), "{text}");
    }
    for text in ["", "GiB", "-1", "1.5GiB", "0", "9999999999GiB", "8 GiBs"] {
        assert!(parse::size(text).is_err(), "{text}");
    }
}

#[test]
fn a_flag_goes_over_the_file() {
    let directory = tempfile::tempdir().expect("directory");
    let path = directory.path().join("agent.toml");
    let toml = "node_id = 'file'\ndata_dir = '/d'\nschedulers = ['127.0.0.1:1', '127.0.0.1:2']\ncpu_milli = 4000\n[labels]\nzone = 'a'\n";
    std::fs::write(&path, toml).expect("write");
    let config = ["agent", "--node-id", "flag", "--config", &path.to_string_lossy()];
    let loaded = Config::load(Args::try_parse_from(config).expect("flags").layer).expect("valid");
    assert_eq!(loaded.node_id.as_str(), "flag");
    assert_eq!((loaded.schedulers.len(), loaded.cpu), (2, Some(MilliCpu(4000))));
    assert_eq!(loaded.labels["zone"], "a");
    std::fs::write(&path, "nodeid = 'x'").expect("write");
    let error = Config::load(Args::try_parse_from(config).expect("flags").layer).expect_err("unknown key");
    assert!(error.to_string().contains("nodeid"), "{error}");
}

#[test]
fn run_is_the_default_and_clean_takes_the_same_flags() {
    assert_eq!(Args::try_parse_from(["agent"]).expect("flags").command, None);
    let args = Args::try_parse_from(["agent", "clean", "--data-dir", "/d"]).expect("flags");
    assert_eq!((args.command, args.layer.data_dir.as_deref()), (Some(Command::Clean), Some("/d")));
}
