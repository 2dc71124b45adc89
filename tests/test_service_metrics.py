"""Metrics that are added up first say what prometheus_client would have said."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from service.metrics import _BUCKETS, Metrics, forget_dead_workers
from tests.servers import RedisServer
from tests.serving import ids_of, json_of, serving, until
from tests.worlds import cyclic, write_bundle


@given(st.lists(st.lists(st.one_of(st.floats(0, 5), st.sampled_from(_BUCKETS)), max_size=20), max_size=4))
@settings(max_examples=50)
def test_a_histogram_added_up_first_is_the_same(rounds: list[list[float]]) -> None:
    metrics, registry = Metrics(), CollectorRegistry()
    plain = Histogram("upnext_stage_seconds", "Time in one stage of a request.", ["stage"], buckets=_BUCKETS,
                      registry=registry)  # fmt: skip
    for values in rounds:
        for value in values:
            metrics.observe(metrics.stages, value, "read")
            plain.labels("read").observe(value)
        metrics.flush()
    texts = generate_latest(registry), metrics.render()
    wanted, found = (series(text.decode(), "upnext_stage_seconds_") for text in texts)
    assert found == pytest.approx(wanted)


def series(text: str, prefix: str) -> dict[str, float]:
    """The lines that begin so, and their values."""
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if line.startswith(prefix) and "_created" not in line]
    return {name: float(value) for name, value in lines}


def test_counts_add_up() -> None:
    metrics = Metrics()
    for _ in range(3):
        metrics.count(metrics.events, "accepted", amount=2)
    metrics.count(metrics.refused)
    for _ in range(2):  # a second scrape counts nothing twice
        text = metrics.render().decode().splitlines()
        assert 'upnext_events_total{status="accepted"} 6.0' in text
        assert "upnext_refused_requests_total 1.0" in text


async def test_what_the_bundle_knows_and_what_it_answers(tmp_path: Path, redis_server: RedisServer) -> None:
    async with serving(tmp_path, redis_server, cyclic(10), bundle_poll_seconds=0.02) as upnext:
        await upnext.view("u", "3", "never-heard-of")
        await upnext.ask("u", n=4)
        lines = (await upnext.http.get("/metrics")).text.splitlines()
        assert 'upnext_history_items_total{known="true"} 1.0' in lines
        assert 'upnext_history_items_total{known="false"} 1.0' in lines
        assert 'upnext_bundle_workers{version="2000-03-01T00-00-00Z-test"} 1.0' in lines
        assert "upnext_bundle_created_timestamp_seconds 9.518688e+08" in lines
        metrics = upnext.services.metrics
        await until(lambda: "upnext_answer_coverage_ratio 0.4" in metrics.render().decode())
        similar = json_of(await upnext.http.get("/items/10/similar?n=1"))
        assert ids_of(similar) == ["1"]
        body = {"users": ["u", "nobody"], "n": 2}
        results = json_of(await upnext.http.post("/recommend/batch", json=body))["results"]
        assert [ids_of(result) for result in results] == [["4", "5"], ["1", "2"]]
        await until(lambda: "upnext_answer_coverage_ratio 0.6" in metrics.render().decode())  # of 4 to 7, 1 and 2
        write_bundle(upnext.settings.bundles, cyclic(10), version="2000-03-02")
        await until(lambda: 'upnext_bundle_workers{version="2000-03-02"} 1.0' in metrics.render().decode())
        await until(lambda: "upnext_answer_coverage_ratio 0.0" in metrics.render().decode())
        assert 'upnext_bundle_workers{version="2000-03-01T00-00-00Z-test"} 0.0' in metrics.render().decode()


def test_a_worker_that_is_gone_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crashed worker must not keep the minimum of all workers where it was."""
    code = (
        "from service.metrics import Metrics; m = Metrics(); m.catalogue_revision.set(3); m.count(m.refused); m.flush()"
    )
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    subprocess.run([sys.executable, "-c", code], env=dict(os.environ), check=True)
    assert b"upnext_catalogue_revision 3.0" in Metrics().render()
    forget_dead_workers()
    text = Metrics().render()
    assert b"upnext_catalogue_revision 3.0" not in text
    assert b"upnext_refused_requests_total 1.0" in text  # what it counted has happened
