"""The skew alarm, with a real service over HTTP: silent while both sides are one, loud as soon as they are not."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from shared.bundle import MANIFEST, point_current
from shared.times import DAY, SECOND
from tests.servers import free_port
from tests.test_cli import Done, call, events_file, preset, trainer
from tests.test_service_launcher import launched, wait_ready
from tests.trained import cyclic_events, world
from tests.worlds import BORN, cyclic, write_bundle
from trainer.replay import Compared, Expected, Place, difference, replay_table

KEY = "k" * 32
ROW = re.compile(r"^(brought|log) +(\d+) +(\d+) +(\d+) +([0-9.e+-]+)$", re.M)


# --- what counts as a difference ------------------------------------------------------------------------


SCORES = {"a": 3.0, "b": 2.0, "c": 2.00005, "d": 1.0}
OFFLINE = Expected([Place("a", 3.0), Place("b", 2.0)], lambda item: SCORES.get(item, math.nan))


@pytest.mark.parametrize(
    "answer",
    [
        [("a", 3.0), ("b", 2.0)],
        [("a", 3.00009), ("b", 1.99991)],
        [("a", 3.0), ("c", 2.00005)],  # a tie
    ],
)
def test_rounding_and_ties_are_no_difference(answer: list[tuple[str, float]]) -> None:
    assert difference(OFFLINE, [Place(*place) for place in answer]) is None


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ([("a", 3.0)], "returns 1 items, offline 2"),
        ([("a", 3.0), ("a", 2.0)], "twice"),
        ([("a", 3.0), ("b", 2.0002)], r"place 2: the service has b \(2\.0002\), offline b \(2\)"),
        ([("b", 2.0), ("a", 3.0)], "place 1"),
        ([("a", 3.0), ("d", 2.0)], "place 2"),  # right score, wrong item
        ([("a", 3.0), ("hidden", 2.0)], "place 2"),
        ([("a", 3.0), ("b", math.nan)], "place 2"),  # popular where a model should answer
    ],
)
def test_all_else_is_a_difference(answer: list[tuple[str, float]], said: str) -> None:
    assert re.search(said, str(difference(OFFLINE, [Place(*place) for place in answer])))


def test_popular_items_have_an_order_and_no_scores() -> None:
    popular = Expected([Place("a", math.nan), Place("b", math.nan)], lambda _: math.nan)
    assert difference(popular, [Place("a", math.nan), Place("b", math.nan)]) is None
    assert difference(popular, [Place("b", math.nan), Place("a", math.nan)]) is not None
    assert difference(popular, [Place("a", math.nan), Place("b", 1.0)]) is not None


def test_the_table() -> None:
    shown = replay_table({"brought": Compared(10, 2, 0.5, ["user u: place 1"]), "log": Compared()})
    assert ROW.findall(shown) == [("brought", "10", "8", "2", "5.0e-01")]
    assert "brought: user u: place 1" in shown
    assert "nobody" in shown


# --- with a service ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A running service, its bundles, and a preset with the histories."""

    folder: Path
    preset: Path
    client: httpx.Client
    port: int

    def replay(self, *words: str, bundles: Path | None = None, key: str | None = KEY) -> Done:
        keys = () if key is None else ("--api-key", key)
        where = ("--url", f"http://127.0.0.1:{self.port}", "--bundles", str(bundles or self.folder / "bundles"))
        return call("replay", self.preset, *where, *keys, *words)

    def tampered(self, **encoder: Any) -> Path:
        """A copy of the bundles under the same version, in which the encoders are described otherwise."""
        target = self.folder / "tampered"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(self.folder / "bundles", target)
        (file,) = target.glob(f"*/{MANIFEST}")
        manifest = json.loads(file.read_text())
        for model in manifest["models"].values():
            model["encoder"] |= encoder
        file.write_text(json.dumps(manifest))
        return target


def rows(done: Done) -> dict[str, tuple[int, int, int, float]]:
    """way -> users, equal, differing, largest score difference."""
    return {way: (int(a), int(b), int(c), float(d)) for way, a, b, c, d in ROW.findall(done.out)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    """A trained model; the first half of the users is in the log."""
    folder = tmp_path_factory.mktemp("run")
    bundle = world("sasrec").bundle
    shutil.copytree(bundle.path, folder / "bundles" / bundle.version)
    point_current(folder / "bundles", bundle.version)
    events = cyclic_events()
    log = [event for event in events if int(event[0][1:]) < 100]
    database = f"sqlite:///{folder / 'log.db'}"
    (folder / "log").mkdir()
    half = preset(folder / "log", events_file(folder / "log" / "events.csv", log))
    trainer("data", "load", half, "--database-url", database)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with (
        launched(folder, port, database_url=database, api_key=KEY, log_level="warning"),
        httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}) as client,
    ):
        wait_ready(client)
        yield Setting(folder, preset(folder, events_file(folder / "events.csv", events)), client, port)


@pytest.mark.slow
def test_one_bundle_gives_one_answer(trained: Setting) -> None:
    # What changes between training and question is no skew: new events, items that go, items that come.
    trained.client.post("/events", json={"user_id": "u1", "item_id": "3", "event_type": "view"})
    assert trained.client.put("/items/7", json={"withdrawn": True}).status_code == 200
    assert trained.client.put("/items/new", json={"title": "New"}).status_code == 200
    done = trained.replay("--users", "150", "--seed", "3")
    assert done.code == 0, done.out + done.err
    found = rows(done)
    assert found["brought"][:3] == (150, 150, 0)
    assert found["log"][0] == found["log"][1] > 50
    assert 0 <= max(found["brought"][3], found["log"][3]) < 1e-4


@pytest.mark.slow
def test_another_packing_raises_the_alarm(trained: Setting) -> None:
    done = trained.replay("--users", "60", bundles=trained.tampered(max_length=6))
    assert done.code == 1, done.out + done.err
    asked, equal, differing, largest = rows(done)["brought"]
    assert (asked, equal + differing) == (60, 60)
    assert differing > 30  # most histories are longer than that
    assert largest > 1e-4
    assert re.search(r"brought: user u\d+ as of 20.*: place \d+: the service has \d+ \(", done.out)
    assert rows(done)["log"][2] > 0
    allowed = trained.replay("--users", "60", "--allow", "1", bundles=trained.folder / "tampered")
    assert allowed.code == 0
    assert rows(allowed) == rows(done)


@pytest.mark.slow
def test_another_version_cannot_be_compared(trained: Setting, tmp_path: Path) -> None:
    write_bundle(tmp_path, cyclic(), version="other")
    done = trained.replay(bundles=tmp_path)
    assert done.code == 2
    assert "answers from" in done.err
    assert "not from other" in done.err
    assert not rows(done)


@pytest.mark.slow
@pytest.mark.parametrize(("key", "said"), [(None, "--api-key"), ("wrong" * 8, "UPNEXT_API_KEY")])
def test_a_key_that_is_missing_or_wrong(trained: Setting, key: str | None, said: str) -> None:
    done = trained.replay(key=key)
    assert done.code == 2
    assert said in done.err


def test_without_a_bundle_nobody_can_tell(tmp_path: Path) -> None:
    done = call("replay", "sasrec-quick", "--bundles", str(tmp_path))
    assert done.code == 2
    assert "nothing is published" in done.err


@pytest.mark.slow
def test_no_service_is_there(trained: Setting) -> None:
    done = trained.replay("--url", f"http://127.0.0.1:{free_port()}")
    assert done.code == 2
    assert "python -m service" in done.err
    assert trained.replay("--url", "here").code == 2


@pytest.mark.slow
def test_times_unknown_items_and_ties_are_the_same_on_both_sides(tmp_path_factory: pytest.TempPathFactory) -> None:
    """An encoder that reads times, users of whom nothing is known, and several events at a time."""
    folder = tmp_path_factory.mktemp("run")
    write_bundle(folder / "bundles", cyclic(12, clock="query"))
    events = [
        *[(f"tie{n}", str(1 + (n + i) % 12), BORN + (n + 3) * DAY) for n in range(6) for i in (5, 1, 3)],
        *[(f"apart{n}", str(1 + (n + i) % 12), BORN + (n + i) * DAY + 250_000) for n in range(6) for i in range(9)],
        ("nobody", "unheard", BORN + 5 * DAY),
        ("early", "12", BORN + 2 * DAY + SECOND),  # before the item was born
    ]
    file = preset(folder, events_file(folder / "events.csv", events))
    database = f"sqlite:///{folder / 'log.db'}"
    trainer("data", "load", file, "--database-url", database)
    port = free_port()
    with (
        launched(folder, port, database_url=database, log_level="warning"),
        httpx.Client(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        wait_ready(client)
        for model in ("sasrec", "bert4rec"):
            done = Setting(folder, file, client, port).replay("--model", model, "--k", "5", key=None)
            assert done.code == 0, done.out + done.err
            assert [row[:3] for row in rows(done).values()] == [(14, 14, 0), (14, 14, 0)]
