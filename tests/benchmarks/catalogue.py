"""How answers stay quick and right as the catalogue grows, and as filters leave less and less of it.

    python -m tests.benchmarks.catalogue [--items 4000 20000 200000] [--items 1000000] [--no-http]

For each size and each share of items that a filter leaves: the search path that `auto` takes; microseconds of the
search (200 candidates, 50 seen items) in this process; recall of the best 100 against exact search, mean and worst of
all queries; the fewest items that came back of 100 asked for; and the median over HTTP, one caller at a time, of
services with one worker that all run at once, measured in alternating rounds.

Bundles are made once and kept in --cache: a minute and a half for 200,000 items; a million took 65 minutes beside
other work (an HNSW index takes its time), which is why that size must be asked for. Vectors lie in clusters (see
bundles.py), and so do queries: histories of items that are near each other, through the bundle's own network.
`--bundle` takes a folder of bundles that training has published instead, without HTTP and without shares: made-up
filters are for made-up items.

--memory prints what two workers hold (PSS) of a catalogue of each size, beside the size of its files.
--curve N prints time against recall over what HNSW fetches for 200 candidates, unfiltered, for N items.
"""

from __future__ import annotations

import argparse
import json
import statistics
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
import numpy as np

from shared.bundle import Bundle, current_version
from shared.catalogue import Availability
from shared.encoder import Vectors
from shared.events import BoolArray, IntArray
from shared.retrieval import Candidates, Mode, Retriever, Scope
from shared.times import now
from tests.benchmarks import load, running
from tests.benchmarks.bundles import SHARES, random_bundle
from tests.benchmarks.stack import machine, memory_mb, stack
from tests.benchmarks.timing import median_us

ALLOWED: Final = {"all": "", **{name: f"{name}:0" for name in SHARES}}
CANDIDATES: Final = 200
WANTED: Final = 100
QUERIES: Final = 200
SEEN: Final = 50
WORKERS: Final = 2
FETCHES: Final = (200, 300, 400, 600, 800, 1200, 2000)


@dataclass(frozen=True)
class Field:
    """A bundle to search in, and what is asked of it."""

    bundle: Bundle
    retriever: Retriever  # as the service has it
    exact: Retriever
    queries: Vectors  # (QUERIES, D)
    seen: IntArray  # (QUERIES, SEEN) item indices
    availability: Availability

    @classmethod
    def of(cls, folder: Path) -> Field:
        """From a folder of bundles."""
        bundle = Bundle.load(folder / str(current_version(folder)), Mode.AUTO)
        model = bundle.models[bundle.manifest.default_model]
        vectors = model.retriever.vectors
        # A user who stays in one corner: items near one that was drawn, in any order.
        rng = np.random.default_rng(0)
        near = np.stack([corner(vectors, row) for row in rng.integers(0, len(vectors), QUERIES)])  # (QUERIES, SEEN)
        seen = rng.permuted(near, axis=1) + 1
        times = [np.full(SEEN + 1, now())] * QUERIES
        queries = model.encoder.encode(list(seen), times)
        exact = Retriever(vectors, None, Mode.EXACT)
        return cls(bundle, model.retriever, exact, queries, seen, Availability.of(bundle.catalogue))

    def wanted(self, name: str) -> BoolArray | None:
        """What the filter of this name leaves."""
        if name == "all":
            return None
        wanted = np.zeros(len(self.bundle.catalogue) + 1, bool)
        share = SHARES[name]
        wanted[[r for r, item in enumerate(self.bundle.catalogue.items, 1) if int(item.item_id) % share == 0]] = True
        return wanted

    def scopes(self, name: str) -> list[Scope]:
        """Of each query, behind the filter of this name."""
        wanted = self.wanted(name)
        return [Scope(self.availability, now(), seen, wanted) for seen in self.seen]

    def best(self, scopes: list[Scope]) -> list[IntArray]:
        """The best WANTED of each query."""
        asked = zip(self.queries, scopes, strict=True)
        return [self.exact.retrieve(query, WANTED, scope).items for query, scope in asked]


def corner(vectors: Vectors, row: int) -> IntArray:
    """Rows of the SEEN vectors that point most nearly where that of `row` does; of the first 100,000."""
    some = vectors[:100_000]
    cosines = some @ vectors[row] / np.maximum(np.linalg.norm(some, axis=1), 1e-9)
    return np.argpartition(-cosines, SEEN)[:SEEN].astype(np.int64)


def kept(items: int, cache: Path) -> Path:
    """A folder with a bundle of this size, made now where it was not."""
    folder = (cache / str(items) / "bundles").resolve()
    if not (folder / "CURRENT").exists():
        print(f"making a bundle of {items:,} items in {folder}", flush=True)
        random_bundle(folder, items)
    return folder


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[4000, 20000, 200000])
    parser.add_argument("--cache", type=Path, default=Path("var/catalogue"))
    parser.add_argument("--bundle", type=Path, help="a folder of bundles, as `trainer run` leaves it")
    parser.add_argument("--curve", type=int, metavar="N", help="time against recall for N items, and nothing else")
    parser.add_argument("--memory", action="store_true", help="of the workers for each size, and nothing else")
    parser.add_argument("--no-http", action="store_true")
    parser.add_argument("--seconds", type=int, default=1, help="of one HTTP measurement")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "catalogue", "machine": machine()}
    if asked.curve or asked.bundle:
        field = Field.of(asked.bundle or kept(asked.curve, asked.cache))
        print(f"{machine()}; {len(field.bundle.catalogue):,} items of width {field.queries.shape[1]}")
        result["curve"] = curve(field)
    elif asked.memory:
        result["rows"] = [memory(items, kept(items, asked.cache)) for items in asked.items]
    else:
        folders = {items: kept(items, asked.cache) for items in asked.items}
        rows = [row for items, folder in folders.items() for row in in_process(Field.of(folder), items)]
        if not asked.no_http:
            over_http(folders, rows, asked.seconds, asked.rounds)
        report(rows)
        result["rows"] = rows
    print(json.dumps(result))


def in_process(field: Field, items: int) -> list[dict[str, Any]]:
    """A row for each share."""
    rows = []
    for name in ALLOWED:
        scopes = field.scopes(name)
        found = [field.retriever.candidates(q, CANDIDATES, s) for q, s in zip(field.queries, scopes, strict=True)]
        given = [(query, CANDIDATES, scope) for query, scope in zip(field.queries, scopes, strict=True)]
        rows.append({
            "items": items, "share": name, "path": "/".join(sorted({one.path for one in found})),
            "search_us": median_us(field.retriever.candidates, given, 0.5), **quality(field, scopes, found),
        })  # fmt: skip
    return rows


def quality(field: Field, scopes: list[Scope], found: list[Candidates]) -> dict[str, float]:
    """Recall of the best WANTED once `found` are ranked; and how few came back, of those that could."""
    recalls, missing = [], 0
    for query, one, best in zip(field.queries, found, field.best(scopes), strict=True):
        answer = field.retriever.rank(query, one.items, WANTED).items
        recalls.append(np.isin(best, answer).mean() if len(best) else 1.0)
        missing = max(missing, len(best) - len(answer))
    return {"recall": float(np.mean(recalls)), "worst_recall": float(min(recalls)), "missing": missing}


def over_http(folders: dict[int, Path], rows: list[dict[str, Any]], seconds: int, rounds: int) -> None:
    """Put the medians over HTTP into the rows."""
    with ExitStack() as closing:
        urls = {}
        for items, folder in folders.items():
            service = closing.enter_context(stack("sqlite", workers=1, bundles=folder))
            running.fill(service.database_url, items, (SEEN,))
            urls[items] = service.url
        for row in rows:
            row["returned"] = fewest(urls[row["items"]], ALLOWED[row["share"]])
        seen: dict[int, list[float]] = {at: [] for at in range(len(rows))}
        for _ in range(rounds):
            for at, row in enumerate(rows):
                category = ALLOWED[row["share"]]
                request = load.GET[:-1] + (f' .. "?filter={category}")' if category else ")")
                one = load.closed(
                    urls[row["items"]], running.prefix(SEEN), running.USERS, connections=1, seconds=seconds,
                    request=request,
                )  # fmt: skip
                if one.bad:
                    raise SystemExit(f"{one.bad} requests failed: {row}")
                seen[at].append(one.p50)
        for at, row in enumerate(rows):
            row["http_ms"] = statistics.median(seen[at])


def fewest(url: str, category: str) -> int:
    """How many items come back at least, of WANTED asked for; also fills the cache of histories."""
    asked = {"n": WANTED} | ({"filter": category} if category else {})
    with httpx.Client(base_url=url) as client:
        users = [f"{running.prefix(SEEN)}{n}" for n in range(running.USERS)]
        answers = [client.get(f"/recommend/{user}", params=asked).raise_for_status().json() for user in users]
        return min(len(answer["items"]) for answer in answers)


def memory(items: int, folder: Path) -> dict[str, float]:
    """Megabytes of all workers together after questions of every kind, and of the files that they serve."""
    row = {"items": items, "files": sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 2**20}
    with stack("sqlite", workers=WORKERS, bundles=folder) as service:
        running.fill(service.database_url, items, (SEEN,))
        for category in ALLOWED.values():
            fewest(service.url, category)
        with httpx.Client(
            base_url=service.url, headers={"Connection": "close"}
        ) as client:  # so that each worker has some
            for item in range(1, 101):
                for path in (f"/items/{item}/similar", f"/recommend/nobody-{item}"):
                    client.get(path).raise_for_status()
        sizes = [memory_mb(pid) for pid in service.workers()]
    row |= {kind.lower(): sum(size[kind] for size in sizes) for kind in ("Pss", "Anonymous", "Rss")}
    row["floor"] = 200 * WORKERS + 1.3 * row["files"]
    print(
        f"{items:9,} items, {row['files']:5.0f} MB of files: {row['pss']:5.0f} MB of {WORKERS} workers, "
        f"{row['anonymous']:5.0f} of them anonymous (bound {row['floor']:5.0f})",
        flush=True,
    )
    return row


def report(rows: list[dict[str, Any]]) -> None:
    """The table."""
    print(f"{machine()}; recall@{WANTED} against exact search, of {QUERIES} queries")
    print(
        f"{'items':>9} {'left by filter':16}{'path':18}{'search us':>10}{'recall':>8}{'worst':>7}{'missing':>9}"
        f"{'HTTP p50 ms':>13}{'returned':>10}"
    )
    for row in rows:
        over = f"{row['http_ms']:13.2f}{row['returned']:10}" if "http_ms" in row else ""
        print(
            f"{row['items']:9,} {row['share']:16}{row['path']:18}{row['search_us']:10.0f}{row['recall']:8.4f}"
            f"{row['worst_recall']:7.2f}{row['missing']:9}{over}"
        )


def curve(field: Field) -> list[dict[str, float]]:
    """What more fetching costs and brings, unfiltered, beside exact search."""
    scopes = field.scopes("all")
    index = field.retriever.index
    assert index is not None
    rows = []
    print(f"{'fetched':>9}{'search us':>11}{'recall':>8}{'worst':>7}")
    for fetch in FETCHES:

        def search(query: Vectors, scope: Scope, fetch: int = fetch) -> Candidates:
            labels, _ = index.knn_query(query, k=fetch, num_threads=1)  # ef is what is fetched, where that is more
            found = labels[0].astype(np.int64) + 1
            return field.retriever._narrowed(query, found[scope.permits(found)], CANDIDATES, "hnsw")

        given = list(zip(field.queries, scopes, strict=True))
        row = {"fetched": fetch, "search_us": median_us(search, given, 0.5)}
        row |= quality(field, scopes, [search(*one) for one in given])
        rows.append(row)
        print(f"{fetch:9}{row['search_us']:11.0f}{row['recall']:8.4f}{row['worst_recall']:7.2f}")
    counted = [(query, CANDIDATES, scope) for query, scope in zip(field.queries, scopes, strict=True)]
    rows.append({"fetched": 0, "search_us": median_us(field.exact.candidates, counted, 0.5), "recall": 1.0})
    print(f"{'exact':>9}{rows[-1]['search_us']:11.0f}{1:8.4f}{1:7.2f}")
    return rows


if __name__ == "__main__":
    main()
