"""Uploading a prepared set: whole before its manifest, resumed without sending twice, as a function and as a command."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pixart_ds.data import store as store_module
from pixart_ds.data.shards import PreparedSet
from pixart_ds.data.store import upload_folder
from pixart_ds.errors import EXIT_DATA, EXIT_DONE, DataError
from pixart_ds.s3 import StoreError
from tests.helpers.s3 import ROOT, S3Server
from tests.helpers.sets import tiny_set

pytestmark = pytest.mark.store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished set."""
    tiny_set(tmp_path / "set")
    return tmp_path / "set"


def sizes(folder: Path) -> dict[str, int]:
    return {p.relative_to(folder).as_posix(): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}


def puts(s3: S3Server, bucket: str, since: int = 0) -> list[str]:
    """Names of the files sent, in the order that they came in."""
    requests = [
        one for one in s3.requests()[since:] if one.method in ("PUT", "POST") and one.path.startswith(f"/{bucket}/")
    ]
    return [one.path.removeprefix(f"/{bucket}/set/") for one in requests]


def command(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pixart_ds", "upload", *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_shards_come_first_and_the_manifest_last_and_a_second_upload_sends_nothing(
    s3: S3Server, bucket: str, folder: Path
) -> None:
    (folder / ".hidden.123.tmp").write_bytes(b"left by a crash")
    done = upload_folder(folder, f"s3://{bucket}/set")
    wanted = sizes(folder)
    del wanted[".hidden.123.tmp"]
    assert s3.list(bucket, "set/") == {f"set/{name}": size for name, size in wanted.items()}
    assert (done.files, done.sent_files) == (len(wanted), len(wanted))
    assert done.bytes == done.sent_bytes == sum(wanted.values())
    order = puts(s3, bucket)
    assert sorted(order) == sorted(wanted)
    kinds = [2 if name == "manifest.json" else int(not name.endswith(".mds")) for name in order]
    assert kinds == sorted(kinds)
    assert kinds.count(2) == 1
    answered = len(s3.requests())
    again = upload_folder(folder, f"s3://{bucket}/set/")
    assert (again.files, again.bytes) == (done.files, done.bytes)
    assert (again.sent_files, again.sent_bytes) == (0, 0)
    assert puts(s3, bucket, answered) == []


def test_the_set_is_the_same_there(s3: S3Server, bucket: str, folder: Path, tmp_path: Path) -> None:
    upload_folder(folder, f"s3://{bucket}/set")
    for name in sizes(folder):
        copy = tmp_path / "copy" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(s3.get(bucket, f"set/{name}"))
    assert PreparedSet.open(tmp_path / "copy").description == PreparedSet.open(folder).description


def test_a_changed_file_is_sent_again_even_if_its_size_is_the_same(s3: S3Server, bucket: str, folder: Path) -> None:
    upload_folder(folder, f"s3://{bucket}/set")
    shard = next(folder.rglob("part-*.mds"))
    name = shard.relative_to(folder).as_posix()
    content = shard.read_bytes()
    s3.put(bucket, f"set/{name}", bytes(len(content)))  # by somebody else
    (folder / "prompts.json").write_text((folder / "prompts.json").read_text().replace("cat", "dog"))
    done = upload_folder(folder, f"s3://{bucket}/set")
    assert done.sent_files == 2
    assert s3.get(bucket, f"set/{name}") == content
    assert b"dog" in s3.get(bucket, "set/prompts.json")


def test_large_files_go_in_parts_and_are_recognised(
    s3: S3Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "manifest.json").write_text("{}")
    (tmp_path / "set" / "shard.00000.mds").write_bytes(os.urandom(40 << 20))
    lines: list[str] = []
    monkeypatch.setattr(store_module, "_REPORT_SECONDS", 0.0)
    upload_folder(tmp_path / "set", f"s3://{bucket}/set", report=lines.append)
    assert [one.status for one in s3.requests("PUT", f"/{bucket}/set/shard.00000.mds")] == [200] * 3
    assert s3.list(bucket)["set/shard.00000.mds"] == 40 << 20
    assert lines[0] == "1 of 1 files, 41.9 MB sent"
    assert upload_folder(tmp_path / "set", f"s3://{bucket}/set").sent_files == 0


def test_an_interrupted_upload_goes_on(
    s3: S3Server, bucket: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = store_module._Transfer._send

    def failing(self: store_module._Transfer, name: str) -> int | None:
        if name == "prompts.json":
            raise KeyboardInterrupt
        return send(self, name)

    with monkeypatch.context() as interrupted:
        interrupted.setattr(store_module._Transfer, "_send", failing)
        with pytest.raises(KeyboardInterrupt):
            upload_folder(folder, f"s3://{bucket}/set", threads=1)
    there = s3.list(bucket, "set/")
    assert len(there) > 12
    assert "set/manifest.json" not in there
    done = upload_folder(folder, f"s3://{bucket}/set")
    assert done.sent_files == done.files - len(there)
    assert len(s3.list(bucket, "set/")) == done.files
    assert sorted(puts(s3, bucket)) == sorted(sizes(folder))  # none of them twice


def test_a_killed_upload_goes_on(s3: S3Server, bucket: str, folder: Path) -> None:
    for number in range(60):
        (folder / f"more.{number:05}.mds").write_bytes(os.urandom(1 << 18))
    words = [sys.executable, "-m", "pixart_ds", "upload", str(folder), f"s3://{bucket}/set"]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL)
    while len(puts(s3, bucket)) < 5:
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = s3.list(bucket, "set/")
    done = upload_folder(folder, f"s3://{bucket}/set")
    assert (
        len(there) <= done.files - done.sent_files <= len(there) + 8
    )  # those on their way at the kill may still arrive
    assert s3.list(bucket, "set/") == {f"set/{name}": size for name, size in sizes(folder).items()}


def test_an_unfinished_set_is_refused_before_the_store_is_asked(s3: S3Server, bucket: str, folder: Path) -> None:
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match="there is no finished set: manifest.json is missing"):
        upload_folder(folder, f"s3://{bucket}/set")
    with pytest.raises(DataError, match="there is no finished set"):
        upload_folder(folder / "nowhere", f"s3://{bucket}/set")
    assert s3.list(bucket) == {}


def test_another_finished_set_is_not_written_over(s3: S3Server, bucket: str, folder: Path, tmp_path: Path) -> None:
    upload_folder(folder, f"s3://{bucket}/set")
    tiny_set(tmp_path / "other", source="elsewhere")
    with pytest.raises(DataError, match=f"another finished set is at s3://{bucket}/set") as caught:
        upload_folder(tmp_path / "other", f"s3://{bucket}/set")
    assert "choose another prefix" in str(caught.value)
    assert s3.get(bucket, "set/manifest.json") == (folder / "manifest.json").read_bytes()


def test_what_is_wrong_with_the_store_is_said(
    s3: S3Server, bucket: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StoreError, match="there is no bucket there-is-none") as caught:
        upload_folder(folder, "s3://there-is-none/set")
    assert "make the bucket" in str(caught.value)
    with pytest.raises(DataError, match="write it as s3://bucket/prefix"):
        upload_folder(folder, "gs://bucket/set")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StoreError, match="the store refuses") as caught:
        upload_folder(folder, f"s3://{bucket}/set")
    assert "AWS_SECRET_ACCESS_KEY" in str(caught.value)


def test_a_store_that_stops_in_the_middle_names_the_file(
    own_server: S3Server, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = store_module._Transfer._send

    def stopping(self: store_module._Transfer, name: str) -> int | None:
        if name == "prompts.json":
            own_server.kill()
        return send(self, name)

    monkeypatch.setattr(store_module._Transfer, "_send", stopping)
    with pytest.raises(StoreError, match=r"the store did not take prompts.json: EndpointConnectionError") as caught:
        upload_folder(folder, "s3://own/set", threads=1)
    assert not caught.value.final
    assert own_server.endpoint in str(caught.value)


def test_a_bucket_that_goes_away_in_the_middle_is_said(
    s3: S3Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "manifest.json").write_text("{}")
    (tmp_path / "set" / "shard.00000.mds").write_bytes(b"content")
    send = store_module._Transfer._send

    def removing(self: store_module._Transfer, name: str) -> int | None:
        if name.startswith("shard"):
            s3.client().delete_bucket(Bucket=bucket)
        return send(self, name)

    monkeypatch.setattr(store_module._Transfer, "_send", removing)
    with pytest.raises(StoreError, match=f"there is no bucket {bucket}") as caught:
        upload_folder(tmp_path / "set", f"s3://{bucket}/set")
    assert caught.value.final


def test_the_command(s3: S3Server, bucket: str, folder: Path) -> None:
    url = f"s3://{bucket}/set"
    planned = command(folder, url, "--dry-run", "--json")
    assert planned.returncode == EXIT_DONE, planned.stderr
    count, total = len(sizes(folder)), sum(sizes(folder).values())
    wanted = {"url": url, "files": count, "bytes": total, "sent_files": count, "sent_bytes": total, "dry_run": True}
    assert json.loads(planned.stdout) == wanted
    assert s3.list(bucket) == {}
    done = command(folder, url)
    assert done.returncode == EXIT_DONE, done.stderr
    assert f"sent {count} of {count} files" in done.stdout
    assert len(s3.list(bucket)) == count
    shutil.rmtree(folder / "parts")
    again = command(folder, url)
    assert f"sent 0 of {count - 6} files (0 B) to {url}; {count - 6} were there" in again.stdout


def test_the_command_says_what_is_wrong(s3: S3Server, bucket: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for words, text in (
        ((tmp_path / "empty", f"s3://{bucket}/set"), "there is no finished set"),
        ((folder, "s3://there-is-none/set"), "there is no bucket there-is-none"),
        ((folder, "bucket/set"), "write it as s3://bucket/prefix"),
    ):
        answer = command(*words)
        assert (answer.returncode, "Traceback" in answer.stderr) == (EXIT_DATA, False)
        assert text in answer.stderr
