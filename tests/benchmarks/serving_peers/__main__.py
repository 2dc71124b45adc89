"""Upnext beside a bare prototype, an app with the same duties written by hand, and LitServe: one run, equal parts.

    python -m tests.benchmarks.serving_peers [--workers 2] [--seconds 5] [--rounds 3]

All have the same ONNX encoder, item vectors, users, Redis and load (wrk), the same number of worker processes, uvloop,
httptools, and one thread for arithmetic each. Peers are held still while another one is loaded, since LitServe's queues
spin when idle; a round goes through all, so that noise meets all alike, and medians over rounds count. Users ask again
without doing anything in between, for which Upnext remembers query vectors; a second row and the last column are of
Upnext when it encodes each request.
Before, answers are compared: the app written by hand must return Upnext's items, the others what Upnext returns with
`exclude_seen=false`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
from redis import Redis

from tests.benchmarks import load, running
from tests.benchmarks.bundles import random_bundle
from tests.benchmarks.serving_peers.parts import key_of
from tests.benchmarks.stack import ROOT, Stack, machine, stack
from tests.benchmarks.venvs import python_with
from tests.servers import free_port

LENGTH: Final = 50
CONNECTIONS: Final = (8, 1)
LITSERVE: Final = (
    "litserve==0.2.19", "onnxruntime==1.31.*", "redis[hiredis]==8.1.0", "pyzmq", "orjson", "uvloop", "httptools",
)  # fmt: skip
HERE: Final = "tests.benchmarks.serving_peers"
POST: Final = (
    'wrk.format("POST", "/predict", {{["Content-Type"] = "application/json"}}, '
    "'{{\"user_id\":\"{users}' .. n % {count} .. '\"}}')"
)


@dataclass(frozen=True)
class Peer:
    """A server to ask. `module` is an app for uvicorn, or of "lit" a program."""

    name: str
    module: str | None  # None: Upnext, which runs already
    excludes_seen: bool
    request: str = load.GET
    tuned: bool = True  # or with the queue and the event loop that the library chooses by itself


UPNEXT: Final = Peer("Upnext", None, excludes_seen=True)
FORGETFUL: Final = Peer("Upnext, each request encoded", None, excludes_seen=True)
PEERS: Final = (
    UPNEXT,
    FORGETFUL,
    Peer("prototype, each request alone", "prototype", excludes_seen=False),
    Peer("prototype, coalesced", "coalesced", excludes_seen=False),
    Peer("same duties, by hand", "handwritten", excludes_seen=True),
    Peer("LitServe, tuned", "lit", excludes_seen=False, request=POST),
    Peer("LitServe, its own queue", "lit", excludes_seen=False, request=POST, tuned=False),
)


def main() -> None:
    """Measure; print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=3700)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--venvs", type=Path, default=Path("var/peers"), help="where LitServe is installed")
    asked = parser.parse_args()
    with ExitStack() as closing:
        folder = Path(closing.enter_context(tempfile.TemporaryDirectory(prefix="upnext-bench-")))
        bundle = random_bundle(folder / "bundles", asked.items)
        upnext = closing.enter_context(stack("sqlite", workers=asked.workers, bundles=folder / "bundles"))
        running.fill(upnext.database_url, asked.items, (LENGTH,))
        fill_redis(upnext, asked.items)
        urls, groups = {}, dict[Peer, int]()
        # The same service for users who do something before they ask again: it may remember no query vectors.
        forgetful = closing.enter_context(
            stack("sqlite", workers=asked.workers, bundles=folder / "bundles", query_vectors=0)
        )
        running.fill(forgetful.database_url, asked.items, (LENGTH,))
        own = {UPNEXT: upnext.url, FORGETFUL: forgetful.url}
        for peer in PEERS:
            if peer in own:
                urls[peer] = own[peer]
            else:
                urls[peer], groups[peer] = start(peer, upnext, bundle, asked, closing)
        compare_answers(urls)
        found = measure(urls, groups, asked.seconds, asked.rounds)
    report(found)
    print(
        json.dumps(
            {"benchmark": "serving_peers", "machine": machine(), "items": asked.items, "workers": asked.workers,
             "rows": found}
        )
    )  # fmt: skip


def fill_redis(upnext: Stack, items: int) -> None:
    """The histories that Upnext has in its log, where the peers look for them."""
    with Redis(unix_socket_path=str(upnext.redis.socket)) as redis:
        pipe = redis.pipeline(transaction=False)
        for user, history in enumerate(running.histories(items, LENGTH).tolist()):
            pipe.rpush(key_of(f"{running.prefix(LENGTH)}{user}"), *history)
        pipe.execute()


def start(peer: Peer, upnext: Stack, bundle: Path, asked: argparse.Namespace, closing: ExitStack) -> tuple[str, int]:
    """Start the peer's server and wait until it answers; its URL, and its group of processes."""
    port = free_port()
    metrics = closing.enter_context(tempfile.TemporaryDirectory(prefix="upnext-bench-"))
    environment = os.environ | {
        "PEER_BUNDLE": str(bundle), "PEER_REDIS_SOCKET": str(upnext.redis.socket), "PEER_PORT": str(port),
        "PEER_WORKERS": str(asked.workers), "PEER_TUNED": str(int(peer.tuned)),
        "PROMETHEUS_MULTIPROC_DIR": metrics, "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
    }  # fmt: skip
    if peer.module == "lit":
        command = [str(python_with("litserve", LITSERVE, asked.venvs).absolute()), "-m", f"{HERE}.lit"]
    else:
        command = [
            sys.executable, "-m", "uvicorn", f"{HERE}.{peer.module}:app", "--port", str(port), "--loop", "uvloop",
            "--http", "httptools", "--workers", str(asked.workers), "--no-access-log", "--log-level", "warning",
        ]  # fmt: skip
    said = upnext.folder / f"{peer.module}-{peer.tuned}.log"
    log = closing.enter_context(said.open("wb"))
    # A session of its own: LitServe leaves its workers behind when it is told to stop.
    process = subprocess.Popen(
        command, cwd=upnext.folder, env=environment, stdout=log, stderr=log, start_new_session=True
    )
    closing.callback(stop, process)
    ask = asker(peer, f"http://127.0.0.1:{port}")
    deadline = time.monotonic() + 60
    while True:
        try:
            ask(f"{running.prefix(LENGTH)}0")
            return f"http://127.0.0.1:{port}", process.pid
        except (httpx.HTTPError, KeyError):
            if time.monotonic() > deadline or process.poll() is not None:
                words = said.read_text()[-2_000:]
                raise RuntimeError(f"{peer.name} does not answer; its last words:\n{words}") from None
            time.sleep(0.1)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End it and all that it started."""
    os.killpg(process.pid, signal.SIGTERM)
    os.killpg(process.pid, signal.SIGCONT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(5)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def asker(peer: Peer, url: str) -> Callable[..., list[str]]:
    """A function from a user id and query parameters to item ids. Raises httpx.HTTPError."""

    def ask(user_id: str, **parameters: Any) -> list[str]:
        if peer.request == POST:
            response = httpx.post(f"{url}/predict", json={"user_id": user_id})
        else:
            response = httpx.get(f"{url}/recommend/{user_id}", params=parameters)
        return [item["item_id"] for item in response.raise_for_status().json()["items"]]

    return ask


def compare_answers(urls: dict[Peer, str], users: int = 50) -> None:
    """End the run if a peer does not answer what Upnext answers where it has the same duties."""
    upnext = asker(PEERS[0], urls[PEERS[0]])
    for peer in PEERS[1:]:
        ask = asker(peer, urls[peer])
        for number in range(users):
            user = f"{running.prefix(LENGTH)}{number}"
            expected, found = upnext(user, exclude_seen=peer.excludes_seen), ask(user)
            if found != expected:
                raise SystemExit(f"{peer.name} answers {found} for {user}, Upnext {expected}")


def hold_all_but(peer: Peer, groups: dict[Peer, int]) -> None:
    """Let this peer run and no other."""
    for other, group in groups.items():
        os.killpg(group, signal.SIGCONT if other is peer else signal.SIGSTOP)


def measure(urls: dict[Peer, str], groups: dict[Peer, int], seconds: int, rounds: int) -> list[dict[str, Any]]:
    """One row a peer."""
    users = running.prefix(LENGTH)
    results: dict[tuple[Peer, int], list[load.Result]] = {(peer, c): [] for c in CONNECTIONS for peer in urls}
    for turn in range(rounds + 1):  # the first one, which fills caches, does not count
        for (peer, connections), seen in results.items():
            hold_all_but(peer, groups)
            one = load.closed(
                urls[peer], users, running.USERS, connections=connections, seconds=seconds if turn else 2,
                request=peer.request,
            )  # fmt: skip
            seen.extend([one] if turn else [])
    rows = []
    for peer in urls:
        at_8, alone = (load.median(results[peer, c]) for c in CONNECTIONS)
        rows.append({
            "peer": peer.name, "per_second": at_8.per_second, "p50": at_8.p50, "p99": at_8.p99, "p50_alone": alone.p50,
            "failed": at_8.bad + alone.bad,
        })  # fmt: skip
    return rows


def report(rows: list[dict[str, Any]]) -> None:
    """The table."""
    print(f"{machine()}; history {LENGTH}; times in ms")
    print(
        f"{'':30}{'requests/s':>11}{'p50':>7}{'p99':>7}{'p50 at 1':>10}{'failed':>8}{'Upnext is':>11}{'encoding':>10}"
    )
    for row in rows:
        times = [own["per_second"] / row["per_second"] for own in rows[:2]]  # with and without remembered vectors
        print(
            f"{row['peer']:30}{row['per_second']:11.0f}{row['p50']:7.2f}{row['p99']:7.2f}{row['p50_alone']:10.2f}"
            f"{row['failed']:8}{times[0]:10.2f}x{times[1]:9.2f}x"
        )


if __name__ == "__main__":
    main()
