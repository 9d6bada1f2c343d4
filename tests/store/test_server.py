"""The S3 server that the other tests trust: that it checks keys, keeps data, and leaves nothing running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import ClientError

from tests.helpers.s3 import KEY, ROOT, S3Server, gone

pytestmark = pytest.mark.store


def code_of(call: Any, **arguments: Any) -> str:
    """The error code that a request is answered with."""
    with pytest.raises(ClientError) as caught:
        call(**arguments)
    return str(caught.value.response["Error"]["Code"])


def test_wrong_secrets_unknown_keys_and_unsigned_requests_are_refused(s3: S3Server, bucket: str) -> None:
    s3.put(bucket, "key", b"content")
    wanted = {"Bucket": bucket, "Key": "key"}
    assert s3.client().get_object(**wanted)["Body"].read() == b"content"
    wrong = s3.client(aws_secret_access_key="wrong")
    assert code_of(wrong.get_object, **wanted) == "SignatureDoesNotMatch"
    assert code_of(wrong.put_object, **wanted, Body=b"other") == "SignatureDoesNotMatch"
    assert code_of(s3.client(aws_access_key_id="tests:nobody").get_object, **wanted) == "SignatureDoesNotMatch"
    unsigned = s3.client(config=Config(signature_version=UNSIGNED, proxies={}))
    with pytest.raises(ClientError) as caught:
        unsigned.get_object(**wanted)
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] in (400, 401, 403)
    assert s3.get(bucket, "key") == b"content"


def test_only_the_first_conditional_put_succeeds(s3: S3Server, bucket: str) -> None:
    s3.client().put_object(Bucket=bucket, Key="key", Body=b"first", IfNoneMatch="*")
    assert (
        code_of(s3.client().put_object, Bucket=bucket, Key="key", Body=b"second", IfNoneMatch="*")
        == "PreconditionFailed"
    )
    assert s3.get(bucket, "key") == b"first"


def test_ranges(s3: S3Server, bucket: str) -> None:
    s3.put(bucket, "key", b"0123456789")

    def part(words: str) -> bytes:
        content: bytes = s3.client().get_object(Bucket=bucket, Key="key", Range=words)["Body"].read()
        return content

    assert [part("bytes=2-4"), part("bytes=7-"), part("bytes=-3")] == [b"234", b"789", b"789"]
    assert code_of(s3.client().get_object, Bucket=bucket, Key="key", Range="bytes=10-") == "InvalidRange"


def test_uploads_in_parts_and_their_copies_are_whole(s3: S3Server, bucket: str) -> None:
    client, content = s3.client(), os.urandom(6 << 20)
    pieces = [content[: 5 << 20], content[5 << 20 :]]
    wanted = {"Bucket": bucket, "Key": "parts"}
    upload = client.create_multipart_upload(**wanted, Metadata={"word": "value"})["UploadId"]
    parts = [
        {"PartNumber": n, "ETag": client.upload_part(**wanted, UploadId=upload, PartNumber=n, Body=piece)["ETag"]}
        for n, piece in enumerate(pieces, 1)
    ]
    assert s3.list(bucket) == {}
    client.complete_multipart_upload(**wanted, UploadId=upload, MultipartUpload={"Parts": parts})
    assert s3.get(bucket, "parts") == content
    assert client.head_object(**wanted)["Metadata"] == {"word": "value"}
    client.copy_object(Bucket=bucket, Key="copy", CopySource={"Bucket": bucket, "Key": "parts"})
    assert s3.get(bucket, "copy") == content
    given_up = client.create_multipart_upload(Bucket=bucket, Key="given-up")["UploadId"]
    client.abort_multipart_upload(Bucket=bucket, Key="given-up", UploadId=given_up)
    assert s3.list(bucket) == {"copy": len(content), "parts": len(content)}


def test_listings_have_pages(s3: S3Server, bucket: str) -> None:
    for number in range(5):
        s3.put(bucket, f"a/{number}", b"x" * number)
    answer = s3.client().list_objects_v2(Bucket=bucket, MaxKeys=2)
    assert (answer["KeyCount"], answer["IsTruncated"]) == (2, True)
    assert s3.list(bucket, "a/") == {f"a/{number}": number for number in range(5)}


def test_requests_are_counted(s3: S3Server, bucket: str) -> None:
    s3.put(bucket, "key", b"x" * 1000)
    s3.client().get_object(Bucket=bucket, Key="key", Range="bytes=0-99")["Body"].read()
    (put,) = s3.requests("PUT", f"/{bucket}/key")
    (get,) = s3.requests("GET", f"/{bucket}/key")
    assert (put.status, put.received >= 1000) == (200, True)
    assert (get.status, get.sent) == (206, 100)


def test_data_survive_a_stop_and_a_kill(own_server: S3Server) -> None:
    own_server.put("own", "first", b"1")
    endpoint = own_server.endpoint
    own_server.restart()
    own_server.put("own", "second", b"22")
    own_server.kill()
    own_server.start()
    assert own_server.endpoint == endpoint
    assert own_server.list("own") == {"first": 1, "second": 2}
    assert own_server.get("own", "first") == b"1"


def test_nothing_is_left_after_a_stop_or_a_kill_even_when_frozen(own_server: S3Server) -> None:
    first = own_server.processes()
    assert len(first) > 4
    own_server.freeze()
    own_server.stop()
    assert gone(first)
    second = own_server.start().processes()
    own_server.freeze()
    own_server.kill()
    assert gone(second)


def test_nothing_is_left_when_its_starter_is_killed(tmp_path: Path) -> None:
    code = (
        "import time\nfrom pathlib import Path\nfrom tests.helpers.s3 import S3Server\n"
        f"print(*S3Server(Path({str(tmp_path / 's3')!r})).start().processes(), flush=True)\ntime.sleep(600)\n"
    )
    starter = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    pids = list(map(int, starter.stdout.readline().split()))
    assert len(pids) > 4
    starter.send_signal(signal.SIGKILL)
    starter.wait()
    starter.stdout.close()
    assert gone(pids)


def test_a_server_that_loses_a_process_ends(own_server: S3Server) -> None:
    pids = own_server.processes()
    os.kill(pids[-1], signal.SIGKILL)
    assert gone(pids)
    own_server.kill()


def test_a_second_server_on_the_same_folder_or_port_says_so(own_server: S3Server, tmp_path: Path) -> None:
    other = S3Server(own_server.root)
    with pytest.raises(AssertionError, match="another server runs on"):
        other.start()
    other = S3Server(tmp_path / "other")
    other.port = own_server.port
    with pytest.raises(AssertionError, match=f"port {other.port}: Address already in use"):
        other.start()


def test_frozen_it_takes_connections_and_thawed_it_answers(own_server: S3Server) -> None:
    from botocore.exceptions import ReadTimeoutError

    own_server.put("own", "key", b"content")
    own_server.freeze()
    impatient = Config(read_timeout=0.3, retries={"total_max_attempts": 1}, proxies={})
    began = time.monotonic()
    with pytest.raises(ReadTimeoutError):
        own_server.client(config=impatient).get_object(Bucket="own", Key="key")
    assert time.monotonic() - began > 0.2
    own_server.thaw()
    assert own_server.get("own", "key") == b"content"


def test_keys_that_swift_would_misread_are_refused(tmp_path: Path) -> None:
    from tests.helpers.s3 import swift_python

    for option, value in (("--key", "nocolon"), ("--key", "a:b c"), ("--secret", "two words"), ("--secret", "%x")):
        words = [swift_python(), ROOT / "tools" / "s3_server.py", tmp_path / "s3", option, value]
        answer = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False)
        assert (answer.returncode, value in answer.stderr) == (2, True)
    assert KEY.count(":") == 1
