"""Memory of a process that swaps large things."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from service.memory import uncollected


class Knot:
    """Refers to itself: the collector alone can free it."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def _thawed() -> Iterator[None]:
    gc.unfreeze()
    yield
    gc.unfreeze()
    gc.collect()
    gc.freeze()  # as it was: see conftest.py


def test_garbage_of_before_and_of_meanwhile_is_not_kept_for_good() -> None:
    before = weakref.ref(Knot())
    with uncollected():
        assert before() is None
        meanwhile = weakref.ref(Knot())
    assert meanwhile() is None


def test_nobody_looks_through_all_while_it_is_made() -> None:
    looked: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            looked.append(info["generation"])

    gc.callbacks.append(note)
    try:
        with uncollected():
            looked.clear()
            made = [[n] for n in range(200_000)]
            assert set(looked) == {0, 1}
    finally:
        gc.callbacks.remove(note)
    assert len(made) <= gc.get_freeze_count()


def test_what_is_made_is_out_of_the_collectors_sight_and_freed_when_it_is_let_go() -> None:
    usual = gc.get_threshold()
    with uncollected():
        made = [Knot()]
        plain = [[0]]
    assert gc.get_threshold() == usual
    before = gc.get_freeze_count()
    assert before > 0
    tied = weakref.ref(made[0])
    made.clear()
    gc.collect()
    assert tied() is not None  # a cycle stays: nothing in a bundle may be one
    plain.clear()
    assert gc.get_freeze_count() < before


def test_the_collector_works_again_after_a_failure() -> None:
    usual = gc.get_threshold()
    with pytest.raises(ValueError, match="bundle"), uncollected():
        raise ValueError("bundle")
    assert gc.get_threshold() == usual
