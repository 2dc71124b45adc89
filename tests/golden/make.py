"""Write the golden bundle of the format version that this source writes, and the answers it must give.

    python -m tests.golden.make

Run it once for a new format version and commit what it writes; never run it again over an old one: the point is that
bundles written by older releases stay readable.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import httpx

from service.redis_child import start_redis
from service.settings import Settings
from shared.bundle import SCHEMA_VERSION
from shared.catalogue import Item
from shared.times import BEGINNING, DAY
from tests.serving import fresh_database, running
from tests.worlds import BORN, World, cyclic, write_bundle

HERE = Path(__file__).parent
AS_OF = "2000-03-01T00:00:00Z"
QUESTIONS: list[dict[str, Any]] = [
    {"history": ["3"], "n": 20, "as_of": AS_OF},
    {"history": ["3"], "n": 5, "as_of": AS_OF, "model": "bert4rec"},
    {"history": ["1", "2"], "n": 20, "as_of": "2000-01-06T00:00:00Z"},
    {"history": ["9"], "n": 3, "as_of": AS_OF, "exclude_seen": False, "exclude": ["10"]},
    {"history": ["5"], "candidates": ["1", "7", "14"], "as_of": AS_OF},
    {"history": [], "n": 20, "as_of": AS_OF},
    {"history": [{"item_id": "3", "timestamp": "2000-02-29T23:59:00Z"}], "n": 3, "as_of": AS_OF},
    {"history": [{"item_id": "3", "timestamp": "2000-02-29T20:00:00Z"}], "n": 3, "as_of": AS_OF},
    {"history": [{"item_id": "3", "timestamp": "2000-02-29T20:00:00Z"}], "n": 3, "as_of": "last_event"},
]


def world() -> World:
    """A cyclic world of 14 items with each kind of availability in it, and models that read times."""
    plain = cyclic(14)
    special = {
        "4": Item("4", "Gone in February", ("parity:even",), BORN + 4 * DAY, BORN + 40 * DAY),
        "6": Item("6", "Withdrawn", ("parity:even",), BORN + 6 * DAY, withdrawn=True),
        "8": Item("8", None, (), BEGINNING),
        "14": Item("14", "Not yet – 2001", ("parity:even",), BORN + 366 * DAY),
    }
    items = tuple(special.get(item.item_id, item) for item in plain.items)
    return World(items, plain.views, clock="query")


async def answers(bundles: Path, folder: Path) -> list[dict[str, Any]]:
    """What the service answers to QUESTIONS from the live bundle of `bundles`; state goes to `folder`."""
    url = f"sqlite:///{folder / 'golden.db'}"
    await fresh_database(folder / "golden.db")
    with start_redis() as redis:
        settings = Settings(redis_url=redis, database_url=url, bundles=bundles)
        async with running(settings) as upnext:
            found = [await upnext.http.post("/recommend", json=question) for question in QUESTIONS]
    return [comparable(response) for response in found]


def comparable(response: httpx.Response) -> dict[str, Any]:
    """An answer without what differs each time."""
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    del body["recommendation_id"]
    return body


def main() -> None:
    """Write the bundle and `expected-v<format>.json` beside it."""
    version = f"bundle-v{SCHEMA_VERSION}"
    shutil.rmtree(HERE / version, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        path = write_bundle(Path(folder), world(), version=version)
        shutil.copytree(path, HERE / version)
        found = asyncio.run(answers(Path(folder), Path(folder)))
    expected = [{"question": q, "answer": a} for q, a in zip(QUESTIONS, found, strict=True)]
    (HERE / f"expected-v{SCHEMA_VERSION}.json").write_text(json.dumps(expected, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
