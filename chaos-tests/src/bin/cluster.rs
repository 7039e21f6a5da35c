//! A throw-away cluster for clients that are not written in Rust.
//!
//! Prints one line of JSON once everything is ready, runs until its standard input ends, and then puts the host back. Exit
//! code 0 means that nothing was left; 77 that no cluster can run on this host.

use std::io::Write;
use std::process::ExitCode;

use anyhow::Context;
use tokio::io::AsyncReadExt;
use warren_chaos::cluster::{self, Cluster, Options, TEMPLATE};
use warren_chaos::image::Image;

/// What test harnesses take for `skipped`.
const SKIPPED: u8 = 77;

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    if let Some(what) = cluster::missing() {
        eprintln!("SKIPPED: {what}");
        return Ok(ExitCode::from(SKIPPED));
    }
    let cluster = Cluster::start(Options { agents: 1, ..Options::default() }, &Image::busybox()?).await?;
    let line = serde_json::json!({ "endpoints": cluster.endpoints(), "template": format!("templates/{TEMPLATE}") });
    let mut stdout = std::io::stdout();
    writeln!(stdout, "{line}").and_then(|()| stdout.flush()).context("tell that the cluster is ready")?;
    tokio::io::stdin().read_to_end(&mut Vec::new()).await.context("wait for the end of standard input")?;
    cluster.finish().await?;
    Ok(ExitCode::SUCCESS)
}
