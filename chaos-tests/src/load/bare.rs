//! The same container without Warren: a runtime called by hand, with the bundle that Warren's driver made for a sandbox.

use std::fs;
use std::io::Read;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use serde_json::Value;
use tokio::time::Instant;

/// Where a container's root user is on the host: any range will do.
const FIRST_ID: u32 = 1_900_000_000;

/// A runtime and a bundle.
#[derive(Debug)]
pub struct Bare {
    runtime: String,
    root: PathBuf,
    bundle: PathBuf,
}

impl Bare {
    /// A bundle in `directory` like the one at `config`, over a copy of the files in `rootfs`.
    pub fn prepare(runtime: &str, directory: &Path, config: &Path, rootfs: &Path, group: &str) -> anyhow::Result<Self> {
        let bundle = directory.join("bundle");
        fs::create_dir_all(&bundle)?;
        let copied = bundle.join("rootfs");
        let status = Command::new("cp").arg("-a").arg(rootfs).arg(&copied).status().context("copy the template")?;
        ensure!(status.success(), "cp of the template: {status}");
        chown(&copied, Some(FIRST_ID), Some(FIRST_ID))?;
        // The container's root user walks through.
        for path in [directory, &bundle, &copied] {
            fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
        }
        let text = fs::read(config).with_context(|| format!("read {}", config.display()))?;
        let mut value: Value = serde_json::from_slice(&text)?;
        value["root"]["path"] = copied.display().to_string().into();
        value["linux"]["cgroupsPath"] = group.into();
        for kind in ["uidMappings", "gidMappings"] {
            value["linux"][kind][0]["hostID"] = FIRST_ID.into();
        }
        for namespace in value["linux"]["namespaces"].as_array_mut().context("namespaces")? {
            namespace.as_object_mut().context("a namespace")?.remove("path");
        }
        fs::write(bundle.join("config.json"), value.to_string())?;
        Ok(Self { runtime: runtime.to_owned(), root: directory.join("run"), bundle })
    }

    /// Runs a container in the background.
    pub fn run(&self, id: &str) -> anyhow::Result<()> {
        // Files, not pipes: the container keeps what it is given.
        let log = fs::File::create(self.bundle.join("output"))?;
        let mut command = self.command(&["run", "--detach", "--bundle"]);
        command.arg(&self.bundle).arg(id).stdout(log.try_clone()?).stderr(log);
        let status = command.status().with_context(|| format!("run {}", self.runtime))?;
        if !status.success() {
            let said = fs::read_to_string(self.bundle.join("output")).unwrap_or_default();
            bail!("{} run: {status}: {said}", self.runtime);
        }
        Ok(())
    }

    /// Executes `echo` and answers how long the first byte of output took.
    pub fn exec(&self, id: &str) -> anyhow::Result<Duration> {
        let begun = Instant::now();
        let mut command = self.command(&["exec", id, "/bin/echo", "x"]);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        let first = first_byte(&mut child);
        let took = begun.elapsed();
        let status = child.wait()?;
        first.with_context(|| format!("{} exec: {status}", self.runtime))?;
        Ok(took)
    }

    pub fn delete(&self, id: &str) -> anyhow::Result<()> {
        let output = self.command(&["delete", "--force", id]).stderr(Stdio::piped()).output()?;
        ensure!(output.status.success(), "{} delete: {}", self.runtime, String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    /// An empty pipe as input: crun gives /dev/null away to the container's user.
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.runtime);
        command.arg("--root").arg(&self.root).args(arguments).stdin(Stdio::piped());
        command
    }
}

fn first_byte(child: &mut Child) -> anyhow::Result<()> {
    let mut stdout = child.stdout.take().context("no pipe")?;
    stdout.read_exact(&mut [0]).context("no output")
}
