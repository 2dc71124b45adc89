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
    yield
    gc.unfreeze()


def test_garbage_of_before_is_not_kept_for_good() -> None:
    tied = weakref.ref(Knot())
    with uncollected():
        assert tied() is None


def test_what_is_made_is_out_of_the_collectors_sight_and_freed_when_it_is_let_go() -> None:
    with uncollected():
        assert not gc.isenabled()
        made = [Knot()]
        plain = [[0]]
    assert gc.isenabled()
    before = gc.get_freeze_count()
    assert before > 0
    tied = weakref.ref(made[0])
    made.clear()
    gc.collect()
    assert tied() is not None  # a cycle stays: nothing in a bundle may be one
    plain.clear()
    assert gc.get_freeze_count() < before


def test_the_collector_works_again_after_a_failure() -> None:
    with pytest.raises(ValueError, match="bundle"), uncollected():
        raise ValueError("bundle")
    assert gc.isenabled()
