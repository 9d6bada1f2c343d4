"""An object store on this machine: one node of OpenStack Swift with its S3 API, for the tests and for `make demo STORE=s3`.

    .venv-swift/bin/python tools/s3_server.py ROOT [--port N] [--key ACCOUNT:USER --secret WORDS] [--region NAME]
                                              [--certificate FILE --private-key FILE]

Run by the python of Swift's own environment (tools/s3_setup.sh). Prints `READY http://127.0.0.1:PORT` when it answers, and stops
at SIGTERM, at SIGINT, and at the end of the process that started it, however that ends. What was stored lies under ROOT and is
there again when a server starts on the same ROOT. Each request is one line of ROOT/requests.log: a JSON object with method, path,
status and the bytes of the two bodies.

Account, container, object server and proxy are processes forked from one that has imported Swift and holds their sockets: nothing
waits for a port, and all of them end with it. No root, no memcached, no Keystone.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import ctypes
import fcntl
import json
import os
import re
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

HOST = "127.0.0.1"
WORKERS = {"account": 1, "container": 1, "object": 2, "proxy": 2}
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LOCK_SECONDS = 3.0  # for the processes of a killed server on the same ROOT
_WORD = re.compile(r"[\w+/=.-]+", re.ASCII)

_SWIFT = """\
[swift-hash]
swift_hash_path_prefix = pixart_ds
swift_hash_path_suffix = pixart_ds
[storage-policy:0]
name = disk
default = yes
"""
# The time-outs are a busy machine's: Swift's own half second for a connection, and one second after which a listing is left to a
# daemon that does not run here, would lose objects from listings.
_COMMON = """\
[DEFAULT]
swift_dir = {etc}
devices = {disks}
mount_check = false
log_level = WARNING
log_address = {etc}/no-syslog
conn_timeout = 30
node_timeout = 120
container_update_timeout = 120
fallocate_reserve = 0
disable_fallocate = true
"""
_BACKEND = """\
[pipeline:main]
pipeline = {role}-server
[app:{role}-server]
use = egg:swift#{role}
"""
# `copy` stands before `slo`: behind it, a copy of an object uploaded in parts would be a copy of its list of parts.
_PROXY = """\
[pipeline:main]
pipeline = record catch_errors gatekeeper listing_formats bulk s3api tempauth copy slo dlo versioned_writes proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
allow_account_management = true
[filter:record]
paste.filter_factory = s3_server:record_requests
path = {requests}
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:gatekeeper]
use = egg:swift#gatekeeper
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:bulk]
use = egg:swift#bulk
[filter:s3api]
use = egg:swift#s3api
location = {region}
[filter:tempauth]
use = egg:swift#tempauth
user64_{account}_{user} = {secret} .admin
[filter:copy]
use = egg:swift#copy
[filter:slo]
use = egg:swift#slo
[filter:dlo]
use = egg:swift#dlo
[filter:versioned_writes]
use = egg:swift#versioned_writes
allow_versioned_writes = true
"""


def main() -> NoReturn:
    """Serves until a signal comes, the starter ends, or one of the server's processes does."""
    _end_with(os.getppid())
    options = _parser().parse_args()
    root = options.root.resolve()
    for name in ("etc", "disks/disk", "log"):
        (root / name).mkdir(parents=True, exist_ok=True)
    _check_attributes(root / "disks")
    lock = _lock(root)
    sockets = {role: _listen(options.port if role == "proxy" else 0) for role in WORKERS}
    _configure(root, {role: bound.getsockname()[1] for role, bound in sockets.items()}, options)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)
    children: dict[int, str] = {}
    try:
        _start(root, sockets, options, children)
        scheme = "https" if options.certificate else "http"
        print(f"READY {scheme}://{HOST}:{sockets['proxy'].getsockname()[1]}", flush=True)
        pid, _ = os.wait()
        sys.exit(f"the {children.pop(pid)} server has ended; see {root / 'log'}")
    finally:
        for pid in children:  # what they have confirmed is synced, so there is nothing to say goodbye for
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in children:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        lock.close()


def record_requests(defaults: Mapping[str, str], **options: str) -> Callable[[Any], Any]:
    """A paste filter factory: each request becomes a line of the file `path`."""
    del defaults
    log = os.open(options["path"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def wrap(app: Any) -> Any:
        def recorded(environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
            line = {"method": environ["REQUEST_METHOD"], "path": environ["PATH_INFO"], "status": 0}
            sent, told = 0, False

            def start(status: str, *rest: Any) -> Any:
                line["status"] = int(status.split(maxsplit=1)[0])
                return start_response(status, *rest)

            def tell() -> None:
                nonlocal told
                if not told:
                    received = int(environ.get("CONTENT_LENGTH") or 0)
                    os.write(log, (json.dumps({**line, "received": received, "sent": sent}) + "\n").encode())
                told = True

            body: Iterable[bytes] = ()
            held: bytes | None = None
            try:
                body = app(environ, start)
                for piece in filter(None, body):
                    if held is not None:
                        sent += len(held)
                        yield held
                    held = piece
                if held is not None:
                    sent += len(held)
                    tell()  # before the last piece: who has read the answer finds its line
                    yield held
            finally:
                if hasattr(body, "close"):
                    body.close()
                tell()

        return recorded

    return wrap


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="One node of OpenStack Swift with its S3 API.", allow_abbrev=False)
    parser.add_argument("root", type=Path, help="folder of everything that is stored")
    parser.add_argument("--port", type=int, default=0, help="default: any that is free")
    parser.add_argument("--key", type=_access_key, default="demo:demo", help="access key, of the form ACCOUNT:USER")
    parser.add_argument("--secret", type=_word, default="secret")
    parser.add_argument("--region", type=_word, default="us-east-1", help="the region that requests are signed for")
    parser.add_argument("--certificate", type=Path, help="PEM chain; makes it an https server")
    parser.add_argument("--private-key", type=Path, help="PEM key of the certificate")
    return parser


def _word(text: str) -> str:
    if not _WORD.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} holds something else than letters, digits and _ + / = . -")
    return text


def _access_key(text: str) -> str:
    if [bool(_WORD.fullmatch(part)) for part in text.split(":")] != [True, True]:
        raise argparse.ArgumentTypeError(f"{text!r} is not ACCOUNT:USER")
    return text


def _leave(*_: object) -> NoReturn:
    sys.exit(0)


def _end_with(parent: int) -> None:
    """Asks the kernel for SIGKILL when the parent ends; a stopped process (SIGSTOP) obeys nothing less."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it ended before we asked
        os._exit(1)


def _check_attributes(folder: Path) -> None:
    """Swift keeps what it knows of an object in the attributes of its file."""
    try:
        os.setxattr(folder, "user.swift.test", b"x" * 1024)
    except OSError as cause:
        sys.exit(f"{folder}: its file system has no user attributes ({cause.strerror}); name a folder on another one")


def _lock(root: Path) -> Any:
    """Two servers on one folder would ruin it. The processes of a server hold its lock: it is free when all of them have ended."""
    file = open(root / "lock", "w", encoding="ascii")  # noqa: SIM115 - open as long as the process lives
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                sys.exit(f"another server runs on {root}")
            time.sleep(0.05)


def _listen(port: int) -> socket.socket:
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((HOST, port))
    except OSError as cause:
        sys.exit(f"port {port}: {cause.strerror}")
    bound.listen(1024)
    return bound


def _configure(root: Path, ports: Mapping[str, int], options: argparse.Namespace) -> None:
    """Writes Swift's configuration, and rings that name this start's ports."""
    from swift.common.ring import RingBuilder  # type: ignore[import-not-found]

    etc = root / "etc"
    common = _COMMON.format(etc=etc, disks=root / "disks")
    (etc / "swift.conf").write_text(_SWIFT)
    account, user = (base64.b64encode(part.encode()).decode().rstrip("=") for part in options.key.split(":"))
    proxy = _PROXY.format(
        requests=root / "requests.log", region=options.region, account=account, user=user, secret=options.secret
    )
    for role, port in ports.items():
        (etc / f"{role}.conf").write_text(common + (proxy if role == "proxy" else _BACKEND.format(role=role)))
        if role != "proxy":
            builder = RingBuilder(4, 1, 1)  # 2⁴ parts, one copy of each, on one disk
            place = {"region": 1, "zone": 1, "ip": HOST, "port": port, "device": "disk", "weight": 1}
            builder.add_dev(place | {"replication_ip": HOST, "replication_port": port})
            builder.rebalance()
            builder.get_ring().save(str(etc / f"{role}.ring.gz"))


def _start(
    root: Path, sockets: Mapping[str, socket.socket], options: argparse.Namespace, children: dict[int, str]
) -> None:
    """Forks the servers into `children` and waits until each of them says that it serves."""
    from swift.common import utils  # type: ignore[import-not-found]

    utils.SWIFT_CONF_FILE = str(
        root / "etc" / "swift.conf"
    )  # before anything else of Swift is imported: it is read then
    from swift.common import wsgi  # noqa: F401 - imported once, for all children

    reading, writing = os.pipe()
    me = os.getpid()
    for role, count in WORKERS.items():
        for _ in range(count):
            pid = os.fork()
            if pid == 0:
                _child(me, root, role, sockets[role], options, writing)
            children[pid] = role
    os.close(writing)
    waiting = len(children)
    while waiting:
        if select.select([reading], [], [], 0.05)[0]:
            waiting -= len(os.read(reading, waiting))
        ended, _ = os.waitpid(-1, os.WNOHANG)
        if ended:
            role = children.pop(ended)
            sys.exit(f"the {role} server did not start:\n{(root / 'log' / role).read_text()[-2000:]}")
    os.close(reading)


def _child(
    parent: int, root: Path, role: str, bound: socket.socket, options: argparse.Namespace, ready: int
) -> NoReturn:
    """One server process. Nothing of the parent's stack runs in it."""
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        _end_with(parent)
        log = os.open(root / "log" / role, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        os.dup2(log, 1)
        os.dup2(log, 2)
        _serve(root / "etc" / f"{role}.conf", role, bound, options, ready)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _serve(conf_path: Path, role: str, bound: socket.socket, options: argparse.Namespace, ready: int) -> None:
    """What Swift's own run_wsgi does in a worker, on a socket that is there already."""
    from eventlet.green import ssl  # type: ignore[import-not-found]
    from eventlet.greenio import GreenSocket  # type: ignore[import-not-found]
    from swift.common import utils, wsgi

    utils.monkey_patch()
    wsgi.validate_configuration()
    conf = wsgi.appconfig(str(conf_path), name=f"{role}-server")
    utils.FALLOCATE_RESERVE, utils.FALLOCATE_IS_PERCENT = 0, False
    utils.disable_fallocate()
    served = GreenSocket(bound)
    if role == "proxy" and options.certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(options.certificate, options.private_key)
        served = context.wrap_socket(served, server_side=True)
    names = {"log_name": f"{role}-server"}
    if role == "object":
        from swift.obj.server import global_conf_callback  # type: ignore[import-not-found]

        global_conf_callback(conf, names)
    logger = utils.get_logger(conf, f"{role}-server", log_to_console=True)
    wsgi.run_server(conf, logger, served, global_conf=names, ready_callback=lambda: os.write(ready, b"+"))


if __name__ == "__main__":
    main()
