//! A driver whose host is a map: it outlives agents, ends processes when told, and refuses when told.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use tokio::sync::watch;
use warren_node_agent::driver::*;
use warren_node_agent::network::egress::Egress;

/// Clones share the host.
#[derive(Clone, Default)]
pub struct FakeDriver(Arc<Host>);

#[derive(Default)]
struct Host {
    instances: Mutex<BTreeMap<InstanceKey, Presence>>,
    egress: Mutex<BTreeMap<InstanceKey, Egress>>,
    /// What was done, in order: `start a@1`.
    log: Mutex<Vec<String>>,
    refused: Mutex<BTreeSet<String>>,
    bell: watch::Sender<u64>,
    killed: watch::Sender<u64>,
    processes: Mutex<BTreeMap<(InstanceKey, String), FakeProcess>>,
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
        self.0.egress.lock().unwrap().insert(spec.key.clone(), spec.egress.clone());
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

    fn egress(&self, key: &InstanceKey) -> Option<Egress> {
        self.0.egress.lock().unwrap().get(key).cloned()
    }

    async fn set_egress(&self, key: &InstanceKey, egress: &Egress) -> Result<(), DriverError> {
        self.done("egress", key)?;
        self.0.egress.lock().unwrap().insert(key.clone(), egress.clone());
        self.0.bell.send_modify(|n| *n += 1);
        Ok(())
    }

    async fn list(&self) -> Result<Vec<(InstanceKey, Presence)>, DriverError> {
        Ok(self.0.instances.lock().unwrap().clone().into_iter().collect())
    }

    async fn exec(&self, key: &InstanceKey, spec: &ProcessSpec) -> Result<Attachment, DriverError> {
        let process = self.begin(key, spec)?;
        Ok(process.attach(AttachFrom { offset: 0, lossless: true }))
    }

    async fn start_process(&self, key: &InstanceKey, spec: &ProcessSpec) -> Result<ProcessStatus, DriverError> {
        match self.process(key, &spec.id) {
            Ok(process) if process.0.spec == *spec => Ok(process.status()),
            Ok(_) => Err(DriverError::ProcessExists { id: spec.id.clone() }),
            Err(_) => Ok(self.begin(key, spec)?.status()),
        }
    }

    async fn processes(&self, key: &InstanceKey) -> Result<Vec<ProcessStatus>, DriverError> {
        let all = self.0.processes.lock().unwrap();
        Ok(all.iter().filter(|((of, _), _)| of == key).map(|(_, process)| process.status()).collect())
    }

    async fn attach(&self, key: &InstanceKey, id: &str, from: AttachFrom) -> Result<Attachment, DriverError> {
        Ok(self.process(key, id)?.attach(from))
    }

    async fn signal_process(&self, key: &InstanceKey, id: &str, signal: u8) -> Result<(), DriverError> {
        let signal = i32::from(signal);
        self.process(key, id)?.end(Exit { code: 128 + signal, signal, oom_killed: false });
        Ok(())
    }

    async fn resize_process(&self, key: &InstanceKey, id: &str, _: TerminalSize) -> Result<(), DriverError> {
        self.process(key, id).map(drop)
    }

    async fn process_ended(&self, key: &InstanceKey, id: &str) {
        if let Ok(process) = self.process(key, id) {
            process.0.output.subscribe().wait_for(|output| output.exit.is_some()).await.unwrap();
        }
    }
}

impl FakeDriver {
    fn process(&self, key: &InstanceKey, id: &str) -> Result<FakeProcess, DriverError> {
        let all = self.0.processes.lock().unwrap();
        all.get(&(key.clone(), id.to_owned())).cloned().ok_or_else(|| DriverError::ProcessNotFound { id: id.into() })
    }

    /// `cat` echoes until the end of its input and exits with 3; `hang` runs until it is killed or signalled; `big` writes
    /// 1 MiB to stdout and `done` to stderr, and ends.
    fn begin(&self, key: &InstanceKey, spec: &ProcessSpec) -> Result<FakeProcess, DriverError> {
        if self.presence(key) != Some(Presence::Running) {
            return Err(DriverError::NotRunning { key: key.clone() });
        }
        let process =
            FakeProcess(Arc::new(Fake { spec: spec.clone(), output: watch::Sender::default(), driver: self.clone() }));
        match spec.exec.command[0].as_str() {
            "cat" | "hang" => {}
            "big" => {
                process.write(Stream::Stdout, &vec![b'b'; 1 << 20]);
                process.write(Stream::Stderr, b"done");
                process.end(Exit::default());
            }
            other => return Err(DriverError::CommandNotFound { command: other.to_owned() }),
        }
        self.0.processes.lock().unwrap().insert((key.clone(), spec.id.clone()), process.clone());
        Ok(process)
    }
}

/// Clones are the same process.
#[derive(Clone)]
struct FakeProcess(Arc<Fake>);

struct Fake {
    spec: ProcessSpec,
    output: watch::Sender<Written>,
    driver: FakeDriver,
}

#[derive(Default)]
struct Written {
    pieces: Vec<(Stream, Vec<u8>)>,
    exit: Option<Exit>,
    attached: usize,
}

impl FakeProcess {
    fn write(&self, stream: Stream, bytes: &[u8]) {
        self.0.output.send_modify(|output| output.pieces.push((stream, bytes.to_vec())));
    }

    fn end(&self, exit: Exit) {
        self.0.output.send_modify(|output| {
            output.exit.get_or_insert(exit);
        });
    }

    fn status(&self) -> ProcessStatus {
        let (spec, output) = (&self.0.spec, self.0.output.borrow());
        ProcessStatus {
            id: spec.id.clone(),
            command: spec.exec.command.clone(),
            working_directory: "/".into(),
            user: spec.exec.user.clone(),
            terminal: spec.exec.terminal.is_some(),
            kill_on_disconnect: spec.kill_on_disconnect,
            timeout: spec.timeout,
            started_ms: 1,
            ended_ms: output.exit.map(|_| 2),
            exit: output.exit,
            timed_out: false,
            output_start: 0,
            output_end: output.pieces.iter().map(|(_, piece)| piece.len() as u64).sum(),
            attached: output.attached > 0,
        }
    }

    fn attach(&self, from: AttachFrom) -> Attachment {
        self.0.output.send_modify(|output| output.attached += 1);
        let hold = Arc::new(Hold(self.clone()));
        let output = FakeOutput { seen: self.0.output.subscribe(), next: 0, at: 0, from, hold: Arc::clone(&hold) };
        Attachment { status: self.status(), output: Box::new(output), input: Box::new(FakeInput(hold)) }
    }
}

/// Both halves of an attachment hold it.
struct Hold(FakeProcess);

impl Drop for Hold {
    fn drop(&mut self) {
        let Fake { spec, output, driver } = &*self.0.0;
        output.send_modify(|output| output.attached -= 1);
        let left = output.borrow().attached == 0 && output.borrow().exit.is_none();
        if left && spec.kill_on_disconnect {
            self.0.end(Exit { code: 137, signal: 9, oom_killed: false });
            driver.0.killed.send_modify(|n| *n += 1);
        }
    }
}

struct FakeOutput {
    seen: watch::Receiver<Written>,
    next: usize,
    at: u64,
    from: AttachFrom,
    hold: Arc<Hold>,
}

#[async_trait]
impl ProcessOutput for FakeOutput {
    async fn next(&mut self) -> Result<Event, DriverError> {
        loop {
            let next = self.next;
            let written =
                self.seen.wait_for(|output| output.pieces.len() > next || output.exit.is_some()).await.unwrap();
            let Some((stream, piece)) = written.pieces.get(next).cloned() else {
                drop(written);
                return Ok(Event::Exited(Box::new(self.hold.0.status())));
            };
            drop(written);
            let skipped = (self.from.offset.saturating_sub(self.at)).min(piece.len() as u64);
            let offset = self.at + skipped;
            (self.next, self.at) = (next + 1, self.at + piece.len() as u64);
            if skipped < piece.len() as u64 {
                return Ok(Event::Output { offset, stream, data: piece[skipped as usize..].to_vec() });
            }
        }
    }
}

struct FakeInput(Arc<Hold>);

#[async_trait]
impl ProcessInput for FakeInput {
    async fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        match self.0.0.0.spec.exec.command[0].as_str() {
            "cat" => self.0.0.write(Stream::Stdout, bytes),
            // It never reads.
            _ => std::future::pending().await,
        }
        Ok(())
    }

    async fn close(&mut self) -> std::io::Result<()> {
        if self.0.0.0.spec.exec.command[0] == "cat" {
            self.0.0.end(Exit { code: 3, ..Exit::default() });
        }
        Ok(())
    }
}
