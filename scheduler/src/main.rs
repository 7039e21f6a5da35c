//! A replica of Warren's scheduler.

use std::fmt::Display;
use std::io::IsTerminal;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use clap::Parser;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Certificate, Identity, ServerTlsConfig};
use tracing::{info, warn};
use tracing_subscriber::EnvFilter;
use warren_proto::client::{ClientTls, TlsFiles};
use warren_scheduler::config::{Action, Config, LogFormat, Settings};
use warren_scheduler::controller::{Controller, ControllerConfig, DebugInfo, DebugSource};
use warren_scheduler::disk::DiskUse;
use warren_scheduler::join;
use warren_scheduler::raft::{Member, Replica, ReplicaConfig, offline};
use warren_scheduler::secrets::Sealer;
use warren_scheduler::signer::Signer;
use warren_scheduler::{api, http, metrics};

/// Creates are many small allocations on one thread that are freed on another.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// How long calls under way may take to end when the replica stops.
const STOP_PATIENCE: Duration = Duration::from_secs(5);

/// An error is said in one line: what cannot be done, and what would help.
fn main() {
    if let Err(error) = start() {
        eprintln!("error: {error:#}");
        std::process::exit(1);
    }
}

fn start() -> anyhow::Result<()> {
    let config = Settings::parse().load().unwrap_or_else(|error| {
        eprintln!("error: {error}");
        std::process::exit(2);
    });
    init_log(&config)?;
    if let Some(action) = &config.action {
        return offline(&config, action);
    }
    let runtime = tokio::runtime::Runtime::new().context("start threads")?;
    let result = runtime.block_on(run(config));
    runtime.shutdown_timeout(STOP_PATIENCE);
    result
}

/// Works on the data directory, and says what came of it and what to do next.
fn offline(config: &Config, action: &Action) -> anyhow::Result<()> {
    std::fs::create_dir_all(&config.data_dir)
        .with_context(|| format!("data_dir: make {}", config.data_dir.display()))?;
    let _lock = lock(&config.data_dir)?;
    let member = Member {
        peer_address: config.peer_advertise.clone(),
        api_address: config.api_advertise.clone(),
        standby: false,
    };
    let renewed = match action {
        Action::Restore { backup } => offline::restore(backup, &config.data_dir, config.replica_id, member)?,
        Action::RecoverQuorum => offline::recover_quorum(&config.data_dir, config.replica_id, member)?,
    };
    let of = renewed.predecessor.map(|id| id.to_string()).unwrap_or_else(|| "an unopened ledger".to_owned());
    println!("ledger      {} (made of {of}, up to revision {})", renewed.ledger_id, renewed.revision);
    println!("holds       {} sandboxes, {} nodes", renewed.sandboxes, renewed.nodes);
    if let Some(kept) = renewed.kept {
        println!("before      kept in {}", kept.display());
    }
    println!("next        start replica {} on this directory, without --initial-members", config.replica_id);
    println!("            start two more with new ids, empty directories and --join {}", config.api_advertise);
    println!("            look at `warrenctl doctor` and `warrenctl node orphans`; placement and moves are paused");
    println!("            then `warrenctl region resume placement moves`");
    Ok(())
}

fn init_log(config: &Config) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(format!("{},openraft=warn,sled=warn", config.log_level))
        .with_context(|| format!("log_level: `{}` is no log filter", config.log_level))?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let builder = builder.with_ansi(std::io::stderr().is_terminal());
    match config.log_format {
        LogFormat::Text => builder.init(),
        LogFormat::Json => builder.json().init(),
    }
    Ok(())
}

async fn run(config: Config) -> anyhow::Result<()> {
    let exporter = metrics::install().context("install metrics")?;
    let client_tls = ClientTls::load(&config.tls).context("TLS")?;
    let server_tls = server_tls(&config.tls)?;
    std::fs::create_dir_all(&config.data_dir)
        .with_context(|| format!("data_dir: make {}", config.data_dir.display()))?;
    let _lock = lock(&config.data_dir)?;
    let signer = Signer::load_or_create(&config.data_dir, config.replica_id)?;
    let api_listener = bind("api_listen", config.api_listen).await?;
    let peer_listener = bind("peer_listen", config.peer_listen).await?;
    let http_listener = bind("http_listen", config.http_listen).await?;

    let stop = CancellationToken::new();
    let sealer = config.secrets_key_file.as_deref().map(Sealer::load).transpose()?;
    let disk = DiskUse::watch(&config.data_dir, config.disk_full_percent, stop.clone());
    let replica = Replica::start(replica_config(&config, client_tls.clone())).await?;
    replica.serve_peers(peer_listener, server_tls.clone()).context("serve peers")?;
    if !replica.is_member() {
        tokio::select! {
            asked = join::ask(&config, &client_tls, &replica) => asked?,
            cause = replica.failed() => bail!(cause),
        }
    }
    let controller = Controller::start(
        replica.clone(),
        signer,
        ControllerConfig {
            lease: config.lease,
            api_advertise: config.api_advertise.clone(),
            replica_grace: config.replica_grace,
            sealer,
            disk,
            debug: debug_source(&config, exporter.clone()),
            stop: stop.clone(),
        },
    );
    info!(replica = %config.replica_id, api = %config.api_listen, peers = %config.peer_listen, http = %config.http_listen, "serving");

    let api = api::serve(controller.clone(), api_listener, server_tls, client_tls, stop.clone());
    let api = tokio::spawn(ending(replica.clone(), stop.clone(), "the API", api));
    let http = http::serve(controller.clone(), exporter, http_listener, stop.clone());
    let http = tokio::spawn(ending(replica.clone(), stop.clone(), "the HTTP port", http));
    tokio::select! {
        told = wait_for_signal() => told?,
        _ = replica.failed() => {}
    }
    info!("stopping");
    stop.cancel();
    let served = async { (api.await, http.await) };
    if tokio::time::timeout(STOP_PATIENCE, served).await.is_err() {
        warn!("calls were still under way");
    }
    replica.shutdown().await;
    replica.failure().map_or(Ok(()), |cause| Err(anyhow!(cause)))
}

/// Serves; where that ends although nobody asked for it, the replica cannot go on.
async fn ending<E: Display>(
    replica: Replica,
    stop: CancellationToken,
    what: &str,
    serving: impl Future<Output = Result<(), E>>,
) {
    match serving.await {
        Err(error) => replica.fail(format!("serve {what}: {error}")),
        Ok(()) if !stop.is_cancelled() => replica.fail(format!("{what} is served no more")),
        Ok(()) => {}
    }
}

/// No value here is a secret: keys stand in files, and only their paths are told.
fn debug_source(config: &Config, exporter: metrics_exporter_prometheus::PrometheusHandle) -> DebugSource {
    let config = config.shown();
    DebugSource::new(move || DebugInfo { config: config.clone(), metrics: exporter.render() })
}

fn replica_config(config: &Config, tls: ClientTls) -> ReplicaConfig {
    ReplicaConfig {
        id: config.replica_id,
        data_dir: config.data_dir.clone(),
        initial_members: config.initial_members.clone(),
        heartbeat: config.heartbeat,
        election_timeout: config.election_timeout,
        tls,
        checkpoint_every: config.checkpoint_every,
    }
}

/// Two replicas on one directory would destroy it.
fn lock(data_dir: &Path) -> anyhow::Result<std::fs::File> {
    let path = data_dir.join("lock");
    let file = std::fs::File::create(&path).with_context(|| format!("make {}", path.display()))?;
    file.try_lock().with_context(|| format!("data_dir: {} is used by another process", data_dir.display()))?;
    Ok(file)
}

fn server_tls(files: &TlsFiles) -> anyhow::Result<Option<ServerTlsConfig>> {
    let (Some(certificate), Some(key), Some(ca)) = (&files.certificate, &files.key, &files.ca) else {
        return Ok(None);
    };
    let read = |path: &Path| std::fs::read(path).with_context(|| format!("read TLS file {}", path.display()));
    let identity = Identity::from_pem(read(certificate)?, read(key)?);
    Ok(Some(ServerTlsConfig::new().identity(identity).client_ca_root(Certificate::from_pem(read(ca)?))))
}

async fn bind(key: &str, address: std::net::SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("{key}: listen on {address}"))
}

async fn wait_for_signal() -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("wait for signals")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("wait for signals")?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}
