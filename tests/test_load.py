"""The load generators of the benchmarks ask what they are told to, and count what they see."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from tests.benchmarks import load


def test_only_answers_with_200_count() -> None:
    sent = np.array([10.0, 11.0, 12.0, 13.0, 14.0])
    answers = load.Answers(1.0, sent, np.array([200, 503, 200, -1, 200]), np.array([1.0, 500.0, 2.0, 500.0, 3.0]))
    assert answers.rate == 1.0
    found = answers.result()
    assert (found.per_second, found.p50, found.bad) == (0.6, 2.0, 2)
    assert found.p99 == pytest.approx(2.98)
    assert answers.between(11, 13).sent.tolist() == [11.0, 12.0]


@contextmanager
def server(status: int = 200) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """A URL, and the paths and bodies that came there."""
    seen: list[tuple[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def answer(self) -> None:
            seen.append((self.path, self.rfile.read(int(self.headers.get("content-length", 0))).decode()))
            self.send_response(status)
            self.send_header("content-length", "0")
            self.end_headers()

        do_GET = do_POST = answer  # noqa: N815 - http.server's names

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listening.daemon_threads = True
    thread = threading.Thread(target=listening.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.server_address[1]}", seen
    finally:
        listening.shutdown()
        thread.join()
        listening.server_close()


USERS = {f"/recommend/u{n}" for n in range(5)}


@pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed")
def test_a_closed_loop_asks_about_all_users() -> None:
    with server() as (url, seen):
        found = load.closed(url, "u", 5, connections=2, seconds=1)
    assert {path for path, _ in seen} == USERS
    assert found.per_second > 0
    assert found.bad == 0


@pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed")
def test_the_bulk_caller_sends_whole_batches() -> None:
    with server(500) as (url, seen):
        found = load.closed(url, "u", 1000, connections=1, seconds=1, request=load.BULK)
    path, body = seen[0]
    assert path == "/recommend/batch"
    assert len(set(json.loads(body)["users"])) == load.BATCH
    assert found.bad > 0


@pytest.mark.skipif(shutil.which("h2load") is None, reason="h2load is not installed")
def test_an_open_loop_sends_at_its_rate_from_the_moment_all_connections_are_open() -> None:
    with server(503) as (url, seen):
        answers = load.steady(url, "u", 5, rate=100, seconds=1, connections=20)
    assert {path for path, _ in seen} == USERS
    assert set(answers.status.tolist()) == {503}
    assert 0 < len(answers.sent) <= 102
    assert np.all(np.diff(answers.sent) >= 0)


@pytest.mark.skipif(shutil.which("h2load") is None, reason="h2load is not installed")
def test_a_loop_with_a_log_tells_each_request() -> None:
    with server() as (url, seen):
        answers = load.looped(url, "u", 5, connections=2, seconds=1)
    assert {path for path, _ in seen} == USERS
    assert len(answers.sent) == len(answers.took) > 0
    assert set(answers.status.tolist()) == {200}
