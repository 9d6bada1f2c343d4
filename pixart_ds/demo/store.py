"""The demo's own object store: OpenStack Swift from tools/, with the prepared set in it, for as long as the demo trains."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType

from pixart_ds.data.store import Upload, upload_folder
from pixart_ds.errors import MachineError
from pixart_ds.log import Log
from pixart_ds.s3 import s3_client

CHECKOUT = Path(__file__).resolve().parents[2]
_BUCKET = "demo"
_KEY, _SECRET, _REGION = "demo:demo", "secret", "us-east-1"
_OTHERS = ("S3_ENDPOINT_URL", "AWS_ENDPOINT_URL", "AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REGION")
"""What the user's environment may say of another store."""


class DemoStore:
    """A server that runs inside the `with`; the environment of this process and its children names it as boto3 wants it.

    It has a session of its own, so that a Ctrl-C of the terminal lets the ranks save before it stops, and it ends with this
    process, however that ends.

    Args:
        root: Folder of what is stored; it is used again by the next run.
        log: Is told how the upload goes.
    """

    url = f"s3://{_BUCKET}/data"

    def __init__(self, root: Path, log: Log) -> None:
        self.root, self.log = root, log
        self._before: dict[str, str | None] = {}

    def __enter__(self) -> DemoStore:
        python = _swift_python()
        self.root.mkdir(parents=True, exist_ok=True)
        words = [
            python,
            CHECKOUT / "tools" / "s3_server.py",
            self.root,
            "--key",
            _KEY,
            "--secret",
            _SECRET,
            "--region",
            _REGION,
        ]
        with open(self.root / "server.log", "ab") as log:
            self._process = subprocess.Popen(
                list(map(str, words)), stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
            )
        try:
            endpoint = self._endpoint()
            self._set_environment(
                {
                    **dict.fromkeys(_OTHERS),
                    "AWS_ENDPOINT_URL_S3": endpoint,
                    "AWS_ACCESS_KEY_ID": _KEY,
                    "AWS_SECRET_ACCESS_KEY": _SECRET,
                    "AWS_DEFAULT_REGION": _REGION,
                    "NO_PROXY": ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1"])),
                }
            )
            client = s3_client()
            with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou):  # from an earlier run
                client.create_bucket(Bucket=_BUCKET)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        self.log.event(f"   OpenStack Swift answers at {endpoint}; what it stores lies in {self.root}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._set_environment(self._before)
        self._process.terminate()
        self._process.communicate()

    def upload(self, folder: Path) -> Upload:
        """Sends a prepared set to `url`, as far as it is not there."""
        done = upload_folder(folder, self.url, report=lambda words: self.log.event(f"   {words}"))
        self.log.event(f"   {done}")
        return done

    def _endpoint(self) -> str:
        assert self._process.stdout is not None
        ready = self._process.stdout.readline().split()
        if ready[:1] != ["READY"]:
            self._process.wait()
            told = (self.root / "server.log").read_text(errors="replace").strip()
            raise MachineError(f"the object store did not start:\n{told[-2000:]}", where=self.root)
        return ready[1]

    def _set_environment(self, values: dict[str, str | None]) -> None:
        """Sets variables, or removes those that are None, and keeps what they were."""
        for name, value in list(values.items()):
            self._before[name] = os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _swift_python() -> Path:
    """The python of Swift's environment beside .venv, which is made if it is not there."""
    script, folder = CHECKOUT / "tools" / "s3_setup.sh", CHECKOUT / ".venv-swift"
    if not script.exists():
        raise MachineError(
            "the demo's object store is not in the installed package",
            remedy="run `make demo STORE=s3` in a checkout, or leave --store away",
        )
    if subprocess.run(
        ["bash", str(script), str(folder)], env={**os.environ, "PYTHON": sys.executable}, check=False
    ).returncode:
        raise MachineError("the environment of the object store could not be made", where=folder, remedy="see above")
    return folder / "bin" / "python"
