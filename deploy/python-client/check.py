"""Uses Warren as a foreign program would: through its .proto files, or through reflection alone.

Each check prints a line; the last line counts them. The cluster is a child process that ends with its standard input.
"""

import json
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import grpc
from warren.v1 import (
    cluster_pb2,
    cluster_pb2_grpc,
    data_plane_pb2,
    data_plane_pb2_grpc,
    sandbox_pb2,
    sandbox_pb2_grpc,
)

TENANT = "tenants/default"
# A call, a start of a sandbox or the end of the cluster that takes longer hangs.
PATIENCE_S = 60
SKIPPED = 77


def spec(template):
    """A small sandbox; the template's main process waits."""
    return sandbox_pb2.Sandbox(
        template=template,
        environment={"GREETING": "hello"},
        resources={"cpu_milli": 50, "memory_bytes": 32 << 20, "disk_bytes": 64 << 20, "pids": 32},
    )


def uuid7():
    """A UUIDv7: milliseconds since the Unix epoch, then random bits. Older Pythons have none."""
    bits = (int(time.time() * 1000) << 80) | int.from_bytes(os.urandom(10), "big")
    bits = bits & ~(0xF << 76) | (7 << 76)
    return str(uuid.UUID(int=bits & ~(0b11 << 62) | (0b10 << 62)))


def await_running(api, name):
    """Watches until the sandbox runs."""
    watch = api.WatchSandboxes(sandbox_pb2.WatchSandboxesRequest(parent=TENANT), timeout=PATIENCE_S)
    for event in watch:
        sandbox = event.sandbox
        if sandbox.name != name:
            continue
        if sandbox.state == sandbox_pb2.SANDBOX_STATE_RUNNING:
            watch.cancel()
            return
        if sandbox.state == sandbox_pb2.SANDBOX_STATE_FAILED:
            raise AssertionError(f"{name}: {sandbox.reason.code} {sandbox.reason.message}")
    raise AssertionError("the watch ended")


def execute(api, name, command, stdin=b""):
    """Connects and executes; gives back the exit code and what was written to standard output."""
    place = api.ConnectSandbox(sandbox_pb2.ConnectSandboxRequest(name=name), timeout=PATIENCE_S)
    messages = [
        data_plane_pb2.ExecRequest(start=data_plane_pb2.ExecStart(command=command)),
        data_plane_pb2.ExecRequest(stdin=stdin),
        data_plane_pb2.ExecRequest(close_stdin=data_plane_pb2.CloseStdin()),
    ]
    written = b""
    with grpc.insecure_channel(place.address) as channel:
        data = data_plane_pb2_grpc.SandboxDataServiceStub(channel)
        metadata = [("authorization", f"Bearer {place.token}")]
        for answer in data.Exec(iter(messages), metadata=metadata, timeout=PATIENCE_S):
            kind = answer.WhichOneof("message")
            if kind == "stdout":
                written += answer.stdout
            elif kind == "exit":
                return answer.exit.code, written
    raise AssertionError("the stream ended before the process")


class Python:
    """grpcio with generated stubs."""

    def __init__(self, cluster):
        self.template = cluster["template"]
        self.channel = grpc.insecure_channel(cluster["endpoints"][0])
        self.api = sandbox_pb2_grpc.SandboxServiceStub(self.channel)
        self.name = ""

    def create(self):
        request = sandbox_pb2.CreateSandboxRequest(
            parent=TENANT, sandbox=spec(self.template), request_id=uuid7()
        )
        self.name = self.api.CreateSandbox(request, timeout=PATIENCE_S).name
        again = self.api.CreateSandbox(request, timeout=PATIENCE_S)
        assert again.name == self.name, f"the same request made {again.name} too"
        await_running(self.api, self.name)

    def execute(self):
        code, written = execute(self.api, self.name, ["sh", "-c", "echo $GREETING $((6 * 7)); cat; exit 5"], b"in\n")
        assert (code, written) == (5, b"hello 42\nin\n"), (code, written)

    def status(self):
        service = cluster_pb2_grpc.ClusterServiceStub(self.channel)
        status = service.GetClusterStatus(cluster_pb2.GetClusterStatusRequest(), timeout=PATIENCE_S)
        assert len(status.members) == 3 and status.leader_id, status

    def wrong_token(self):
        place = self.api.ConnectSandbox(sandbox_pb2.ConnectSandboxRequest(name=self.name), timeout=PATIENCE_S)
        with grpc.insecure_channel(place.address) as channel:
            data = data_plane_pb2_grpc.SandboxDataServiceStub(channel)
            start = data_plane_pb2.ExecRequest(start=data_plane_pb2.ExecStart(command=["true"]))
            try:
                list(data.Exec(iter([start]), metadata=[("authorization", "Bearer wt1.e30.e30")], timeout=PATIENCE_S))
            except grpc.RpcError as error:
                assert error.code() == grpc.StatusCode.UNAUTHENTICATED, error
            else:
                raise AssertionError("a forged token was accepted")

    def delete(self):
        self.api.DeleteSandbox(sandbox_pb2.DeleteSandboxRequest(name=self.name), timeout=PATIENCE_S)
        try:
            while True:
                # Bounded by the deadline of the watch: the record goes once the node said that nothing is left.
                token = self.api.ListSandboxes(
                    sandbox_pb2.ListSandboxesRequest(parent=TENANT), timeout=PATIENCE_S
                ).watch_token
                self.api.GetSandbox(sandbox_pb2.GetSandboxRequest(name=self.name), timeout=PATIENCE_S)
                watch = self.api.WatchSandboxes(
                    sandbox_pb2.WatchSandboxesRequest(parent=TENANT, watch_token=token), timeout=PATIENCE_S
                )
                next(event for event in watch if event.sandbox.name == self.name)
                watch.cancel()
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.NOT_FOUND, error


class Reflection:
    """`buf curl`, which knows nothing but the addresses."""

    def __init__(self, cluster, buf):
        self.buf = buf
        self.template = cluster["template"]
        self.endpoint = cluster["endpoints"][1]
        self.name = ""

    def call(self, address, method, *messages, token=None):
        """Calls a method with JSON messages and gives back the answers."""
        command = [self.buf, "curl", "--protocol", "grpc", "--http2-prior-knowledge", "--data", "@-"]
        if token:
            command += ["--header", f"authorization: Bearer {token}", "--reflect-header", "*"]
        command.append(f"http://{address}/warren.v1.{method}")
        text = "\n".join(json.dumps(message) for message in messages)
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=PATIENCE_S)
        assert done.returncode == 0, f"{method}: {done.stderr}"
        decoder, rest, answers = json.JSONDecoder(), done.stdout.strip(), []
        while rest:
            answer, end = decoder.raw_decode(rest)
            answers.append(answer)
            rest = rest[end:].lstrip()
        return answers

    def create(self):
        sandbox = {"template": self.template, "resources": {"cpuMilli": 50, "memoryBytes": 32 << 20}}
        request = {"parent": TENANT, "sandboxId": "by-reflection", "sandbox": sandbox}
        [created] = self.call(self.endpoint, "SandboxService/CreateSandbox", request)
        self.name = created["name"]
        with grpc.insecure_channel(self.endpoint) as channel:
            await_running(sandbox_pb2_grpc.SandboxServiceStub(channel), self.name)

    def execute(self):
        [place] = self.call(self.endpoint, "SandboxService/ConnectSandbox", {"name": self.name})
        answers = self.call(
            place["address"],
            "SandboxDataService/Exec",
            {"start": {"command": ["sh", "-c", "exit $((2 + 1))"]}},
            {"closeStdin": {}},
            token=place["token"],
        )
        assert answers[-1]["exit"]["code"] == 3, answers

    def delete(self):
        [deleted] = self.call(self.endpoint, "SandboxService/DeleteSandbox", {"name": self.name})
        assert deleted["name"] == self.name, deleted


def main(buf, program):
    cluster_process = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    line = cluster_process.stdout.readline()
    if not line:
        if cluster_process.wait() == SKIPPED:
            print("0 passed, 0 failed: skipped")
            return 0
        print("FAIL the cluster did not start")
        return 1
    cluster = json.loads(line)
    python, reflection = Python(cluster), Reflection(cluster, buf)
    checks = [
        ("python: a sandbox is created, once, and seen to run by a watch", python.create),
        ("python: a command's output and exit code come back", python.execute),
        ("python: the cluster's status", python.status),
        ("python: a forged token is refused", python.wrong_token),
        ("python: the sandbox is deleted", python.delete),
        ("buf curl: a sandbox is created by reflection", reflection.create),
        ("buf curl: a command's exit code comes back", reflection.execute),
        ("buf curl: the sandbox is deleted", reflection.delete),
        ("the cluster ends and leaves nothing on the host", lambda: end(cluster_process)),
    ]
    failed = 0
    for name, check in checks:
        try:
            check()
            print(f"PASS {name}")
        except Exception as error:  # every check reports, whatever it met
            failed += 1
            print(f"FAIL {name}: {type(error).__name__}: {error}")
    print(f"{len(checks) - failed} passed, {failed} failed")
    return 1 if failed else 0


def end(process):
    process.stdin.close()
    assert process.wait(PATIENCE_S) == 0, "the cluster left something: see above"


if __name__ == "__main__":
    sys.exit(main(str(Path(sys.argv[1])), str(Path(sys.argv[2]))))
