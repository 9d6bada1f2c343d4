"""A real S3 server for tests: OpenStack Swift in an environment and processes of its own (tools/s3_server.py)."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SWIFT = ROOT / ".venv-swift"
KEY, SECRET, REGION = "tests:tester", "testing", "us-east-1"
_START_SECONDS = 60
_OTHERS = ("S3_ENDPOINT_URL", "AWS_ENDPOINT_URL", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_REGION", "AWS_CA_BUNDLE")
"""What a developer's own environment may say of another store."""


def swift_python() -> Path:
    """The python of Swift's environment, which the first call makes (about ten seconds)."""
    answer = subprocess.run(
        ["bash", str(ROOT / "tools" / "s3_setup.sh"), str(SWIFT)],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    return SWIFT / "bin" / "python"


@dataclass(frozen=True)
class Request:
    """One request that a server has answered; `received` and `sent` are the bytes of the two bodies."""

    method: str
    path: str
    status: int
    received: int
    sent: int


class S3Server:
    """A server on a folder; it keeps its port and what it stores over restarts.

    It ends with the thread that started it, so start it from one that lives as long as the test.

    Args:
        root: Folder of what is stored.
        https: With a certificate of a private authority, whose own is in `environment` as AWS_CA_BUNDLE.
    """

    def __init__(self, root: Path, *, https: bool = False) -> None:
        self.root = root
        self.port = 0
        self.authority: Path | None = None
        self._process: subprocess.Popen[str] | None = None
        self._client: Any = None
        self._answered: list[Request] = []
        self._log_read = 0
        self._options = ["--key", KEY, "--secret", SECRET, "--region", REGION]
        if https:
            self.authority = self._certify()

    @property
    def endpoint(self) -> str:
        return f"{'https' if self.authority else 'http'}://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs that uses the server as boto3 does."""
        values = {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "NO_PROXY": "127.0.0.1",
        }
        return values | ({"AWS_CA_BUNDLE": str(self.authority)} if self.authority else {})

    def use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Makes it the store of this process and its children."""
        for name in _OTHERS:
            monkeypatch.delenv(name, raising=False)
        for name, value in self.environment.items():
            monkeypatch.setenv(name, value)

    def start(self) -> S3Server:
        """Starts it, and returns when it answers."""
        assert self._process is None
        words = [swift_python(), ROOT / "tools" / "s3_server.py", self.root, "--port", self.port, *self._options]
        self._process = subprocess.Popen(
            list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        alarm = threading.Timer(_START_SECONDS, self._process.kill)
        alarm.start()
        ready = self._process.stdout.readline().split()
        alarm.cancel()
        if len(ready) != 2 or ready[0] != "READY":
            self.kill()
            raise AssertionError(f"the S3 server did not start: {ready} {self._process_error}")
        self.port = int(ready[1].rpartition(":")[2])
        return self

    def stop(self) -> None:
        """SIGTERM, and waits; nothing happens if it does not run."""
        if self._process is not None:
            self.thaw()
            self._process.terminate()
            self._wait()

    def kill(self) -> None:
        """SIGKILL to the process that was started; its children end with it."""
        if self._process is not None:
            self._process.kill()
            self._wait()

    def restart(self) -> None:
        """Stops it and starts it on the same port."""
        self.stop()
        self.start()

    def freeze(self) -> None:
        """SIGSTOP to all its processes: connections are taken and never answered."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """The end of `freeze`."""
        self._signal(signal.SIGCONT)

    def processes(self) -> list[int]:
        """The ids of all its processes, the first one started first."""
        if self._process is None:
            return []
        first = self._process.pid
        return [first, *map(int, Path(f"/proc/{first}/task/{first}/children").read_text().split())]

    def client(self, **changes: Any) -> Any:
        """A boto3 client with the right keys, kept; or a new one with other arguments."""
        if not changes and self._client is not None and self._client.meta.endpoint_url == self.endpoint:
            return self._client
        from boto3.session import Session
        from botocore.config import Config

        values = {
            "endpoint_url": self.endpoint,
            "aws_access_key_id": KEY,
            "aws_secret_access_key": SECRET,
            "region_name": REGION,
            "verify": str(self.authority) if self.authority else None,
            "config": Config(retries={"total_max_attempts": 1}, proxies={}),
        }
        client = Session().client("s3", **(values | changes))
        if not changes:
            self._client = client
        return client

    def make_bucket(self, bucket: str) -> None:
        self.client().create_bucket(Bucket=bucket)

    def put_folder(self, folder: Path, bucket: str, prefix: str = "") -> None:
        """Copies all files of a folder, as they are."""
        client, begin = self.client(), f"{prefix.strip('/')}/" if prefix.strip("/") else ""

        def put(path: Path) -> None:
            client.put_object(Bucket=bucket, Key=begin + path.relative_to(folder).as_posix(), Body=path.read_bytes())

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(put, [path for path in sorted(folder.rglob("*")) if path.is_file()]))

    def put(self, bucket: str, key: str, content: bytes) -> None:
        self.client().put_object(Bucket=bucket, Key=key, Body=content)

    def get(self, bucket: str, key: str) -> bytes:
        content: bytes = self.client().get_object(Bucket=bucket, Key=key)["Body"].read()
        return content

    def delete(self, bucket: str, key: str) -> None:
        self.client().delete_object(Bucket=bucket, Key=key)

    def list(self, bucket: str, prefix: str = "") -> dict[str, int]:
        """Bytes of each object, by key."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return {item["Key"]: item["Size"] for page in pages for item in page.get("Contents", [])}

    def requests(self, method: str | None = None, path: str = "") -> list[Request]:
        """What it has answered so far: with this method, and with this in the path (`/bucket/key`)."""
        log = self.root / "requests.log"
        if log.exists():
            with open(log, "rb") as file:
                file.seek(self._log_read)  # tests ask again and again, and the log of a session is long
                new = [line for line in file if line.endswith(b"\n")]
            self._log_read += sum(map(len, new))
            self._answered += [Request(**json.loads(line)) for line in new]
        return [one for one in self._answered if method in (None, one.method) and path in one.path]

    def _signal(self, number: int) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _wait(self) -> None:
        assert self._process is not None
        _, self._process_error = self._process.communicate(timeout=30)
        self._process = None

    def _certify(self) -> Path:
        """Makes a private authority and the server's certificate; returns the authority's."""
        self.root.mkdir(parents=True, exist_ok=True)
        script = ROOT / "tests" / "store" / "private_authority.py"
        subprocess.run([swift_python(), script, self.root], check=True)
        self._options += [
            "--certificate",
            str(self.root / "server.pem"),
            "--private-key",
            str(self.root / "server.key"),
        ]
        return self.root / "authority.pem"


def gone(pids: list[int], seconds: float = 10.0) -> bool:
    """Whether all these processes have ended, at the latest in a while."""
    deadline = time.monotonic() + seconds
    while any(_runs(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
