"""Prometheus metrics: counted in the process, brought to prometheus_client once a second and before each scrape.

A request touches a dozen series, and prometheus_client takes locks and writes to a file shared between workers for
each: 50 us a request, a tenth of all. Added up first, they cost a tenth of that. A worker that is killed takes what it
counted in its last second with it.
"""

from __future__ import annotations

import asyncio
import os
from bisect import bisect_left
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

FLUSH_SECONDS: Final = 1.0
_BUCKETS: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
SHARED: Final = "PROMETHEUS_MULTIPROC_DIR"
"""Environment variable that names the folder which the workers of a host share."""

Labels = tuple[str, ...]


class Metrics:
    """All metrics of a worker. With PROMETHEUS_MULTIPROC_DIR set, `render` adds up all workers."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Histogram(
            "upnext_request_seconds", "Time to answer.", ["method", "route", "status"],
            buckets=_BUCKETS, registry=registry,
        )  # fmt: skip
        self.stages = Histogram(
            "upnext_stage_seconds", "Time in one stage of a request.", ["stage"], buckets=_BUCKETS, registry=registry
        )
        self.recommendations = Counter(
            "upnext_recommendations_total", "Answers, by how they came about.",
            ["model", "strategy", "history_source"], registry=registry,
        )  # fmt: skip
        self.retrievals = Counter(
            "upnext_retrievals_total", "Searches, by the path that answered.", ["path"], registry=registry
        )
        self.history_items = Counter(
            "upnext_history_items_total",
            "Items of histories that were read (the newest of each), by whether the live bundle knows them.",
            ["known"], registry=registry,
        )  # fmt: skip
        self.query_vectors = Counter(
            "upnext_query_vectors_total", "Query vectors, by whether they were encoded or remembered.", ["source"],
            registry=registry,
        )  # fmt: skip
        self.events = Counter("upnext_events_total", "Events taken, by outcome.", ["status"], registry=registry)
        self.erasures = Counter("upnext_erasures_total", "Users erased.", registry=registry)
        self.refused = Counter(
            "upnext_refused_requests_total", "Requests refused because too many were in flight.", registry=registry
        )
        self.dependency_failures = Counter(
            "upnext_dependency_failures_total", "Calls to Redis or the database that failed.", ["dependency"],
            registry=registry,
        )  # fmt: skip
        self.starts = Counter("upnext_worker_starts_total", "Workers that started.", registry=registry)
        self.load_failures = Counter(
            "upnext_bundle_load_failures_total", "Published bundles that could not be served.", registry=registry
        )
        self.bundle_workers = Gauge(
            "upnext_bundle_workers", "Workers that answer from this bundle.", ["version"],
            registry=registry, multiprocess_mode="livesum",
        )  # fmt: skip
        self.bundle_current = Gauge(
            "upnext_bundle_current", "1 while every worker answers from the bundle that CURRENT names, else 0.",
            registry=registry, multiprocess_mode="livemin",
        )  # fmt: skip
        self.index_failed = Gauge(
            "upnext_index_failed", "1 while an HNSW index of a worker is left because a search failed, else 0.",
            registry=registry, multiprocess_mode="livemax",
        )  # fmt: skip
        self.bundle_created = Gauge(
            "upnext_bundle_created_timestamp_seconds", "When the oldest live bundle was made.",
            registry=registry, multiprocess_mode="livemin",
        )  # fmt: skip
        self.bundle_loaded = Gauge(
            "upnext_bundle_loaded_timestamp_seconds", "When the newest bundle of any worker went live.",
            registry=registry, multiprocess_mode="max",
        )  # fmt: skip
        self.coverage = Gauge(
            "upnext_answer_coverage_ratio",
            "Share of the live bundle's items that were in an answer since it went live, of any worker.",
            registry=registry, multiprocess_mode="livemax",
        )  # fmt: skip
        self.catalogue_revision = Gauge(
            "upnext_catalogue_revision", "Revision of the live catalogue that the slowest worker follows.",
            registry=registry, multiprocess_mode="livemin",
        )  # fmt: skip
        self._counted: dict[tuple[Counter, Labels], float] = {}
        self._observed: dict[tuple[Histogram, Labels], _Observed] = {}

    def count(self, counter: Counter, *labels: str, amount: float = 1) -> None:
        """Add to a counter."""
        key = (counter, labels)
        self._counted[key] = self._counted.get(key, 0) + amount

    def failed(self, dependency: str) -> None:
        """Count a call to `redis` or the `database` that failed."""
        self.count(self.dependency_failures, dependency)

    def observe(self, histogram: Histogram, value: float, *labels: str) -> None:
        """Add one value (seconds) to a histogram."""
        key = (histogram, labels)
        if (observed := self._observed.get(key)) is None:
            observed = self._observed[key] = _Observed(histogram.labels(*labels))
        observed.add(value)

    def flush(self) -> None:
        """Bring what was counted to prometheus_client."""
        counted, self._counted = self._counted, {}
        for (counter, labels), amount in counted.items():
            (counter.labels(*labels) if labels else counter).inc(amount)
        for observed in self._observed.values():
            observed.flush()

    def render(self) -> bytes:
        """The text format."""
        self.flush()
        if SHARED not in os.environ:
            return generate_latest(self.registry)
        together = CollectorRegistry()
        MultiProcessCollector(together)  # type: ignore[no-untyped-call]
        return generate_latest(together)

    @asynccontextmanager
    async def flushing(self) -> AsyncIterator[None]:
        """Flush now and then, and at the end."""
        forget_dead_workers()
        task = asyncio.create_task(self._flush_for_ever())
        try:
            yield
        finally:
            task.cancel()
            self.flush()

    async def _flush_for_ever(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            self.flush()


class _Observed:
    """What came to one series of a histogram since the last flush."""

    __slots__ = ("bounds", "child", "counts", "total")

    def __init__(self, child: Histogram) -> None:
        # prometheus_client has no public way to add several observations at once; a test compares with `observe`.
        self.child = child
        self.bounds: list[float] = child._upper_bounds
        self.counts, self.total = [0] * len(self.bounds), 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def flush(self) -> None:
        if not any(self.counts):
            return
        for bucket, count in zip(self.child._buckets, self.counts, strict=True):
            if count:
                bucket.inc(count)
        self.child._sum.inc(self.total)
        self.counts, self.total = [0] * len(self.bounds), 0.0


def forget_dead_workers() -> None:
    """Remove what workers that are no more said of themselves: one that crashed cannot say that it is gone."""
    if SHARED not in os.environ:
        return
    for file in Path(os.environ[SHARED]).glob("gauge_live*_*.db"):
        pid = file.stem.rpartition("_")[2]
        if pid.isdigit() and not Path("/proc", pid).exists() and Path("/proc/self").exists():
            file.unlink(missing_ok=True)
