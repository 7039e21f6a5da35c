//! What a sandbox goes through when nothing fails.

use std::collections::BTreeMap;

use anyhow::{Context, ensure};
use warren_chaos::client::small_sandbox;
use warren_chaos::cluster::Options;
use warren_proto::v1::{Resources, Sandbox, SandboxState};

use crate::{create_many, delete_all, exec_in_each, scenario};

const MANY: usize = 100;

#[test]
fn a_hundred_sandboxes_run_on_three_nodes_answer_and_leave_nothing() {
    // 40 sandboxes fill a node.
    let options = Options { cpu_milli: 2000, ..Options::default() };
    scenario("a hundred", options, async |cluster| {
        let client = cluster.client()?;
        let names = create_many(&client, MANY).await?;
        client.await_running(&names).await?;
        let found = cluster.traces().of_sandboxes();
        for kind in ["control group", "runtime state", "process"] {
            let count = found.iter().filter(|line| line.starts_with(kind)).count();
            ensure!(count >= MANY, "only {count} traces of kind {kind}: the look at the host is blind");
        }

        let sandboxes = client.list().await?;
        ensure!(sandboxes.len() == MANY, "{} are known", sandboxes.len());
        let mut by_node: BTreeMap<&str, usize> = BTreeMap::new();
        for sandbox in &sandboxes {
            *by_node.entry(&sandbox.node).or_default() += 1;
        }
        let used: Vec<&str> = by_node.keys().copied().collect();
        ensure!(used == cluster.nodes(), "they are on {by_node:?}, the nodes are {:?}", cluster.nodes());
        for node in client.nodes().await? {
            ensure!(node.orphans.is_empty(), "{} has orphans: {:?}", node.name, node.orphans);
            let count = by_node.get(node.name.as_str()).copied().unwrap_or_default();
            ensure!(usize::try_from(node.sandbox_count)? == count, "{} counts {}", node.name, node.sandbox_count);
            let (capacity, assigned) = (node.capacity.unwrap_or_default(), node.assigned.unwrap_or_default());
            ensure!(assigned.cpu_milli <= capacity.cpu_milli, "{} is oversold: {assigned:?}", node.name);
            ensure!(assigned.cpu_milli == 50 * i64::from(node.sandbox_count), "{}: {assigned:?}", node.name);
        }

        exec_in_each(&client, &names).await?;
        delete_all(&client, &names).await?;
        ensure!(client.list().await?.is_empty(), "some are still known");
        let left = cluster.traces().of_sandboxes();
        ensure!(left.is_empty(), "left on the host:\n{}", left.join("\n"));
        Ok(())
    });
}

#[test]
fn exec_passes_input_output_and_the_exit_code() {
    scenario("exec", Options { agents: 1, ..Options::default() }, async |cluster| {
        let client = cluster.client()?;
        let names = create_many(&client, 1).await?;
        client.await_running(&names).await?;
        // More than one message in each direction.
        let input: Vec<u8> = (0..3_000_000u32).map(|n| (n % 251) as u8).collect();
        let echoed = client.exec(&names[0], &["cat"], &input).await?;
        ensure!(echoed.stdout == input, "{} bytes of {} came back", echoed.stdout.len(), input.len());
        let failed = client.exec(&names[0], &["sh", "-c", "echo out; echo err >&2; exit 7"], &[]).await?;
        ensure!(failed.stdout == b"out\n" && failed.stderr == b"err\n" && failed.exit.code == 7, "{failed:?}");
        Ok(())
    });
}

#[test]
fn a_main_process_that_ends_is_reported_with_its_code_and_output() {
    scenario("stopped", Options { agents: 1, ..Options::default() }, async |cluster| {
        let client = cluster.client()?;
        let command = ["sh", "-c", "echo last words; exit 3"].map(str::to_owned).to_vec();
        let name = client.create(Sandbox { command, ..small_sandbox() }).await?.name;
        let mut watcher = client.watch(String::new());
        let ended = loop {
            let sandbox = watcher.next().await?.sandbox.unwrap_or_default();
            if sandbox.name == name && sandbox.state() == SandboxState::Stopped {
                break sandbox;
            }
            ensure!(sandbox.state() != SandboxState::Failed, "{:?}", sandbox.reason);
        };
        let exit = ended.exit_status.context("no exit status")?;
        ensure!(exit.code == 3 && ended.output_tail == b"last words\n", "{exit:?} {:?}", ended.output_tail);
        delete_all(&client, &[name]).await
    });
}

#[test]
fn a_sandbox_without_room_waits_with_a_reason_and_starts_when_room_frees() {
    let options = Options { agents: 2, memory: "1GiB".to_owned(), ..Options::default() };
    scenario("pending", options, async |cluster| {
        let client = cluster.client()?;
        let large = || {
            let resources =
                Resources { cpu_milli: 50, memory_bytes: 700 << 20, disk_bytes: 64 << 20, pids: 32, gpus: 0 };
            Sandbox { resources: Some(resources), ..small_sandbox() }
        };
        let first = client.create(large()).await?.name;
        let second = client.create(large()).await?.name;
        client.await_running(&[first.clone(), second.clone()]).await?;

        let waiting = client.create(large()).await?;
        ensure!(waiting.state() == SandboxState::Pending && waiting.node.is_empty(), "{waiting:?}");
        let reason = waiting.reason.context("it waits without a reason")?;
        ensure!(reason.code == "SHORT_OF_MEMORY" && !reason.message.is_empty(), "{reason:?}");

        // What fits nowhere says so, and does not stand in the way of what does.
        let huge = Resources { memory_bytes: 64 << 30, ..small_sandbox().resources.unwrap_or_default() };
        let never = client.create(Sandbox { resources: Some(huge), ..small_sandbox() }).await?;
        let reason = never.reason.context("it waits without a reason")?;
        ensure!(reason.code == "TOO_LARGE", "{reason:?}");

        delete_all(&client, &[first]).await?;
        client.await_running(std::slice::from_ref(&waiting.name)).await?;
        delete_all(&client, &[second, waiting.name, never.name]).await
    });
}
