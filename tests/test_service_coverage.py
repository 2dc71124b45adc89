"""Items in answers are counted over all workers of a host, each once."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import IO

import numpy as np
import pytest

from service import coverage
from service.coverage import Answered, _lock
from service.metrics import SHARED
from shared.events import IntArray

COUNT = 10


def items(*indices: int) -> IntArray:
    return np.array(indices, np.int64)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the workers share."""
    monkeypatch.setenv(SHARED, str(tmp_path))
    return tmp_path


def test_each_item_of_the_bundle_counts_once() -> None:
    answered = Answered("a", COUNT)
    assert answered.share == 0
    answered.add(items(1, 2))
    answered.add(items(2, 10, 11, 12))  # the last two were added since
    assert answered.share == 3 / COUNT
    assert Answered("a", COUNT).share == 0  # nothing is shared
    assert Answered("nothing", 0).share == 0


@pytest.mark.usefixtures("folder")
def test_workers_with_one_version_count_together() -> None:
    one, other, elsewhere = Answered("a", COUNT), Answered("a", COUNT), Answered("b", COUNT)
    one.add(items(1, 2))
    other.add(items(2, 3))
    elsewhere.add(items(4))
    assert (one.share, other.share, elsewhere.share) == (3 / COUNT, 3 / COUNT, 1 / COUNT)


@pytest.mark.usefixtures("folder")
def test_what_a_worker_answered_counts_after_its_end_while_another_serves_the_version() -> None:
    code = """if True:
        import numpy, os, sys
        from service.coverage import Answered
        answered = Answered("a", int(sys.argv[1]))
        answered.add(numpy.array([1, 2]))
        os.kill(os.getpid(), 9)
    """
    stays = Answered("a", COUNT)
    died = subprocess.run([sys.executable, "-c", code, str(COUNT)], check=False)
    assert died.returncode == -9
    stays.add(items(2, 3))
    assert stays.share == 3 / COUNT
    assert Answered("a", COUNT).share == 3 / COUNT  # the one that takes its place
    del stays
    assert Answered("a", COUNT).share == 0  # nobody served it any more


def test_a_version_that_comes_back_begins_anew_and_leaves_nothing(folder: Path) -> None:
    first = Answered("a", COUNT)
    first.add(items(1))
    second = Answered("b", COUNT)
    assert len(list(folder.iterdir())) == 2
    del first
    again = Answered("a", COUNT)
    assert again.share == 0
    again.add(items(5))
    del second
    _third, _fourth = Answered("c", COUNT), Answered("d", COUNT)
    assert {file.name for file in folder.iterdir()} == {"answered-a", "answered-c", "answered-d"}
    assert again.share == 1 / COUNT


@pytest.mark.usefixtures("folder")
def test_workers_that_begin_at_the_same_moment_count_together() -> None:
    workers, rounds = 8, 40
    start = Barrier(workers)

    def work(number: int) -> list[Answered]:
        kept = []
        for version in range(rounds):
            start.wait()
            kept.append(Answered(f"v{version}", COUNT))
            kept[-1].add(items(number))
            del kept[:-2]  # so that files are removed while others are made
        start.wait()
        return kept

    with ThreadPoolExecutor(workers) as pool:
        found = list(pool.map(work, range(1, workers + 1)))
    assert [[answered.share for answered in kept] for kept in found] == [[workers / COUNT] * 2] * workers


def test_a_file_that_another_worker_removes_meanwhile_is_made_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed: list[Path] = []

    def lock(file: IO[bytes], kind: int) -> bool:
        if not removed:
            removed.append(folder / "answered-a")
            removed[0].unlink()
        return _lock(file, kind)

    monkeypatch.setattr(coverage, "_lock", lock)
    one, other = Answered("a", COUNT), Answered("a", COUNT)
    assert removed
    one.add(items(1))
    assert other.share == 1 / COUNT


def test_a_folder_that_cannot_be_written_is_no_reason_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(SHARED, str(tmp_path / "nowhere"))
    answered = Answered("a", COUNT)
    answered.add(items(7))
    assert answered.share == 1 / COUNT
    assert "counted for this worker alone" in caplog.text
