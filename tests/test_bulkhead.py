"""Few wait for a database that may not answer, and as many as like for one that does."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from service.bulkhead import FEW, SLOW, Bulkhead


class NoAnswerError(Exception):
    """The database did not answer."""


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr("service.bulkhead.time", found := Clock())
    return found


def fill(bulkhead: Bulkhead, stack: ExitStack, count: int) -> None:
    for _ in range(count):
        stack.enter_context(bulkhead.place(NoAnswerError))


def end(bulkhead: Bulkhead, error: Exception) -> None:
    with pytest.raises(type(error)), bulkhead.place(NoAnswerError):
        raise error


def test_many_may_wait_while_there_are_answers(clock: Clock) -> None:
    bulkhead = Bulkhead()
    with ExitStack() as stack:
        fill(bulkhead, stack, FEW)
        clock.now += SLOW  # slow, but within what counts as alive
        fill(bulkhead, stack, FEW)
        with bulkhead.place(NoAnswerError):  # an answer
            clock.now += SLOW
        clock.now += SLOW
        fill(bulkhead, stack, FEW)
    assert bulkhead.waiting == 0


def test_few_wait_where_no_answer_comes(clock: Clock) -> None:
    bulkhead = Bulkhead()
    with ExitStack() as stack:
        fill(bulkhead, stack, FEW)
        clock.now += SLOW + 0.01
        with pytest.raises(NoAnswerError, match="others wait"):
            fill(bulkhead, stack, 1)
        assert bulkhead.waiting == FEW


def test_after_a_failure_few_wait_until_there_is_an_answer(clock: Clock) -> None:
    bulkhead = Bulkhead()
    end(bulkhead, NoAnswerError())
    with ExitStack() as stack:
        fill(bulkhead, stack, FEW - 1)
        end(bulkhead, ValueError())  # refused, but by an answer
        fill(bulkhead, stack, FEW)
    end(bulkhead, NoAnswerError())
    with ExitStack() as stack:
        fill(bulkhead, stack, FEW)
        shut = bulkhead.is_shut
    assert (shut, bulkhead.is_shut) == (True, False)
    clock.now += 99
    with ExitStack() as stack:  # long after the last one
        fill(bulkhead, stack, 1)
