//! A driver whose host is a map: it outlives agents, ends processes when told, and refuses when told.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};
use warren_node_agent::driver::*;

/// Clones share the host.
#[derive(Clone, Default)]
pub struct FakeDriver(Arc<Host>);

#[derive(Default)]
struct Host {
    instances: Mutex<BTreeMap<InstanceKey, Presence>>,
    /// What was done, in order: `start a@1`.
    log: Mutex<Vec<String>>,
    refused: Mutex<BTreeSet<String>>,
    bell: watch::Sender<u64>,
    killed: watch::Sender<u64>,
    /// Starts begin and do not end.
    held_back: watch::Sender<bool>,
}

impl FakeDriver {
    pub fn presence(&self, key: &InstanceKey) -> Option<Presence> {
        self.0.instances.lock().unwrap().get(key).cloned()
    }

    pub fn set(&self, key: &InstanceKey, presence: Option<Presence>) {
        let mut instances = self.0.instances.lock().unwrap();
        match presence {
            Some(presence) => drop(instances.insert(key.clone(), presence)),
            None => drop(instances.remove(key)),
        }
        drop(instances);
        self.0.bell.send_modify(|n| *n += 1);
    }

    pub fn log(&self) -> Vec<String> {
        self.0.log.lock().unwrap().clone()
    }

    /// Makes `what`, such as `start a@1`, fail until told otherwise.
    pub fn refuse(&self, what: &str, refuse: bool) {
        let mut refused = self.0.refused.lock().unwrap();
        if refuse {
            refused.insert(what.to_owned());
        } else {
            refused.remove(what);
        }
    }

    /// Lets starts begin without ending, or end.
    pub fn hold_starts(&self, hold: bool) {
        self.0.held_back.send_replace(hold);
    }

    /// Waits until an executing process was killed.
    pub async fn killed(&self) {
        self.0.killed.subscribe().wait_for(|n| *n > 0).await.unwrap();
    }

    fn done(&self, operation: &str, key: &InstanceKey) -> Result<(), DriverError> {
        let what = format!("{operation} {}@{}", key.sandbox.id, key.epoch);
        self.0.log.lock().unwrap().push(what.clone());
        if self.0.refused.lock().unwrap().contains(&what) {
            return Err(DriverError::Runtime { what, output: "told to refuse".into() });
        }
        Ok(())
    }
}

#[async_trait]
impl Driver for FakeDriver {
    fn name(&self) -> &'static str {
        "fake"
    }

    async fn start(&self, spec: &InstanceSpec) -> Result<(), DriverError> {
        assert!(spec.base.join("file").exists(), "the template is unpacked before the start");
        let others = self.0.instances.lock().unwrap().keys().filter(|key| key.sandbox == spec.key.sandbox).count();
        assert_eq!(others, 0, "one live instance");
        self.done("start", &spec.key)?;
        self.0.held_back.subscribe().wait_for(|held| !held).await.unwrap();
        self.set(&spec.key, Some(Presence::Running));
        Ok(())
    }

    async fn wait(&self, key: &InstanceKey) -> Result<Ended, DriverError> {
        let mut bell = self.0.bell.subscribe();
        loop {
            match self.presence(key) {
                Some(Presence::Ended(ended)) => return Ok(ended),
                Some(_) => bell.changed().await.unwrap(),
                None => return Err(DriverError::NotFound(key.clone())),
            }
        }
    }

    async fn freeze(&self, key: &InstanceKey) -> Result<(), DriverError> {
        self.done("freeze", key)?;
        self.set(key, Some(Presence::Frozen));
        Ok(())
    }

    async fn thaw(&self, key: &InstanceKey) -> Result<(), DriverError> {
        self.done("thaw", key)?;
        self.set(key, Some(Presence::Running));
        Ok(())
    }

    async fn remove(&self, key: &InstanceKey) -> Result<(), DriverError> {
        self.done("remove", key)?;
        self.set(key, None);
        Ok(())
    }

    async fn list(&self) -> Result<Vec<(InstanceKey, Presence)>, DriverError> {
        Ok(self.0.instances.lock().unwrap().clone().into_iter().collect())
    }

    /// `cat` echoes until the end of its input and exits with 3; `hang` runs until it is killed or signalled; `big` writes
    /// 1 MiB to stdout and `done` to stderr, and ends before any of it was read; `flood` and `drip` end and leave a child behind
    /// that goes on writing, much at once or a little now and then.
    async fn exec(&self, key: &InstanceKey, spec: &ExecSpec) -> Result<Execution, DriverError> {
        if self.presence(key) != Some(Presence::Running) {
            return Err(DriverError::NotRunning { key: key.clone() });
        }
        let (exit, _) = watch::channel(None);
        let exit = Arc::new(exit);
        let gone = CancellationToken::new();
        let (stdin, mut input) = duplex(1024);
        let (mut output, stdout) = duplex(1024);
        let (mut errors, stderr) = duplex(1024);
        match spec.command[0].as_str() {
            "cat" => {
                let exit = Arc::clone(&exit);
                tokio::spawn(async move {
                    tokio::io::copy(&mut input, &mut output).await.unwrap();
                    exit.send_replace(Some(Exit { code: 3, ..Exit::default() }));
                });
            }
            "big" => {
                exit.send_replace(Some(Exit::default()));
                tokio::spawn(async move {
                    let _ = output.write_all(&vec![b'b'; 1 << 20]).await;
                    let _ = errors.write_all(b"done").await;
                });
            }
            chatty @ ("flood" | "drip") => {
                let (piece, pause) = if chatty == "flood" { (vec![b'f'; 1 << 16], 0) } else { (vec![b'd'], 50) };
                exit.send_replace(Some(Exit { code: 5, ..Exit::default() }));
                tokio::spawn(async move {
                    while output.write_all(&piece).await.is_ok() {
                        tokio::time::sleep(std::time::Duration::from_millis(pause)).await;
                    }
                    drop(errors);
                });
            }
            "hang" => {
                let (killed, gone) = (self.clone(), gone.clone());
                tokio::spawn(async move {
                    gone.cancelled().await;
                    let _ = input.read(&mut [0]).await;
                    killed.0.killed.send_modify(|n| *n += 1);
                    drop((output, errors));
                });
            }
            other => return Err(DriverError::CommandNotFound { command: other.to_owned() }),
        }
        let control = Box::new(FakeControl { exit, _gone: gone.drop_guard() });
        Ok(Execution { stdin: Box::new(stdin), stdout: Box::new(stdout), stderr: Some(Box::new(stderr)), control })
    }
}

struct FakeControl {
    exit: Arc<watch::Sender<Option<Exit>>>,
    _gone: DropGuard,
}

#[async_trait]
impl ExecControl for FakeControl {
    async fn wait(&self) -> Result<Exit, DriverError> {
        let exit = *self.exit.subscribe().wait_for(Option::is_some).await.unwrap();
        Ok(exit.unwrap())
    }

    async fn signal(&self, signal: i32) -> Result<(), DriverError> {
        self.exit.send_replace(Some(Exit { code: 128 + signal, signal, oom_killed: false }));
        Ok(())
    }

    async fn resize(&self, _: TerminalSize) -> Result<(), DriverError> {
        Ok(())
    }
}
