"""Where the search paths cross on this machine: what the constants of shared/retrieval.py are to be set by.

    python -m tests.benchmarks.thresholds [--items 200000] [--bundle FOLDER]

1. exact search over a prefix of so many items, beside HNSW over all     EXACT_ITEMS
2. multiplying all and masking, beside gathering what a filter leaves    GATHER_SHARE
3. exact search beside HNSW behind a filter that leaves a share          EXACT_SHARE, MAX_FETCH, OVER_FETCH

Microseconds for 200 candidates with 50 seen items, medians; recall of the best 100; and how often HNSW left too few, so
that exact search came on top. On a made-up bundle (kept by the catalogue benchmark), or on one that training published.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from shared import retrieval
from shared.events import BoolArray
from shared.retrieval import Mode, Retriever, Scope
from tests.benchmarks.catalogue import CANDIDATES, Field, kept, quality
from tests.benchmarks.stack import machine
from tests.benchmarks.timing import median_us

PREFIXES: Final = (2_000, 5_000, 10_000, 20_000, 30_000, 50_000, 75_000, 100_000, 150_000, 200_000, 500_000, 1_000_000)
GATHERED: Final = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
FILTERED: Final = (1.0, 0.75, 0.5, 0.3, 0.2, 0.15, 0.1, 0.05)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=200_000)
    parser.add_argument("--bundle", type=Path, help="a folder of bundles, as `trainer run` leaves it")
    parser.add_argument("--cache", type=Path, default=Path("var/catalogue"))
    parser.add_argument("--seconds", type=float, default=0.5, help="of each measurement")
    asked = parser.parse_args()
    field = Field.of(asked.bundle or kept(asked.items, asked.cache))
    items, width = field.exact.vectors.shape
    print(f"{machine()}; {items:,} items of width {width}")
    found = {
        "prefixes": prefixes(field, asked.seconds),
        "gathering": gathering(field, asked.seconds),
        "filtered": filtered(field, asked.seconds),
    }
    print(json.dumps({"benchmark": "thresholds", "machine": machine(), "items": items, "width": width} | found))


def prefixes(field: Field, seconds: float) -> list[dict[str, float]]:
    """Exact search grows with the prefix, HNSW hardly does."""
    scopes = field.scopes("all")
    hnsw = took(Retriever(field.exact.vectors, field.retriever.index, Mode.HNSW), field, scopes, seconds)
    rows = []
    print(f"\nHNSW over all {hnsw:.0f} us; exact over the first")
    for n in (n for n in PREFIXES if n <= len(field.exact.vectors)):
        some = Retriever(field.exact.vectors[:n], None, Mode.EXACT)
        availability = replace(field.availability, numbering=field.availability.numbering[:n])
        exact = took(some, field, [replace(scope, availability=availability) for scope in scopes], seconds)
        rows.append({"items": n, "exact_us": exact, "hnsw_us": hnsw})
        print(f"{n:12,}{exact:10.0f} us")
    return rows


def gathering(field: Field, seconds: float) -> list[dict[str, float]]:
    """A product with all rows reads them in order; gathering jumps, and copies."""
    rows = []
    print(f"\n{'left by filter':>15}{'multiply and mask us':>22}{'gather us':>11}")
    for share in GATHERED:
        scopes = behind(field, share)
        with constant("GATHER_SHARE", -1.0):
            product = took(field.exact, field, scopes, seconds)
        with constant("GATHER_SHARE", 1.0):
            gathered = took(field.exact, field, scopes, seconds)
        rows.append({"share": share, "product_us": product, "gather_us": gathered})
        print(f"{share:15.0%}{product:22.0f}{gathered:11.0f}")
    return rows


def filtered(field: Field, seconds: float) -> list[dict[str, Any]]:
    """The less a filter leaves, the more HNSW must fetch."""
    rows = []
    forced = Retriever(field.exact.vectors, field.retriever.index, Mode.HNSW)
    print(f"\n{'left by filter':>15}{'exact us':>10}{'HNSW us':>9}{'recall':>8}{'too few':>9}")
    for share in FILTERED:
        scopes = behind(field, share)
        found = [forced.candidates(q, CANDIDATES, s) for q, s in zip(field.queries, scopes, strict=True)]
        row = {
            "share": share,
            "exact_us": took(field.exact, field, scopes, seconds),
            "hnsw_us": took(forced, field, scopes, seconds),
            "too_few": float(np.mean([one.path != "hnsw" for one in found])),
            **quality(field, scopes, found),
        }
        rows.append(row)
        print(f"{share:15.0%}{row['exact_us']:10.0f}{row['hnsw_us']:9.0f}{row['recall']:8.4f}{row['too_few']:9.0%}")
    return rows


def took(retriever: Retriever, field: Field, scopes: list[Scope], seconds: float) -> float:
    """The median for CANDIDATES."""
    given = [(query, CANDIDATES, scope) for query, scope in zip(field.queries, scopes, strict=True)]
    return median_us(retriever.candidates, given, seconds)


def behind(field: Field, share: float) -> list[Scope]:
    """Scopes in which a share of all items, drawn by chance, is wanted."""
    wanted: BoolArray = np.random.default_rng(0).random(len(field.bundle.catalogue) + 1) < share
    return [replace(scope, wanted=wanted if share < 1 else None) for scope in field.scopes("all")]


@contextmanager
def constant(name: str, value: float) -> Iterator[None]:
    """Another value for a constant of shared/retrieval.py."""
    kept_value = getattr(retrieval, name)
    setattr(retrieval, name, value)
    try:
        yield
    finally:
        setattr(retrieval, name, kept_value)


if __name__ == "__main__":
    main()
