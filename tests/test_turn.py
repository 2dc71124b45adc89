"""The turn among processes that write to one SQLite file."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from service.commit import Turn

BUSY = """
import sys, time
from service.commit import Turn
turn = Turn(sys.argv[1])
while True:
    with turn.taken(60):
        print("taken", flush=True)
        time.sleep(0.005)
"""
HELD = """
import sys, time
from service.commit import Turn
with Turn(sys.argv[1]).taken(60):
    print("taken", flush=True)
    time.sleep(600)
"""


@contextmanager
def another(program: str, database: Path, output: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that takes the turn and says so in a file, once it has done so the first time."""
    with output.open("wb") as file:
        child = subprocess.Popen([sys.executable, "-c", program, str(database)], stdout=file)
    try:
        while not output.stat().st_size:
            assert child.poll() is None
        yield child
    finally:
        child.kill()
        child.wait()


def test_who_has_just_had_the_turn_joins_the_line(tmp_path: Path) -> None:
    """Another process takes it again and again without a pause: it never comes twice while we stand in line."""
    output, turn = tmp_path / "said", Turn(str(tmp_path / "log.db"))
    overtaken = []
    with another(BUSY, tmp_path / "log.db", output):
        for _ in range(20):
            asked = output.read_bytes().count(b"taken")
            with turn.taken(60):
                overtaken.append(output.read_bytes().count(b"taken") - asked)
    # One that is just taking it, and one that has its place in the line when we come.
    assert max(overtaken) <= 2
    turn.close()


def test_the_line_is_left_after_a_time_and_when_the_holder_dies(tmp_path: Path) -> None:
    turn = Turn(str(tmp_path / "log.db"))
    with another(HELD, tmp_path / "log.db", tmp_path / "said") as holder:
        with pytest.raises(TimeoutError, match="others write"), turn.taken(0.05):
            pass
        holder.kill()
        holder.wait()
        with turn.taken(60):
            pass
    turn.close()
