"""Events, the history policy, and the one function that turns the first into histories by the second.

The trainer applies `history_of` to a whole log, the service to one user's events; both get the
same history for the same events, which is what makes offline figures hold online.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Final

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from shared.times import SECOND

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
KeyArray = NDArray[np.uint64]

ItemId = str
"""The caller's opaque id of an item. The only form that leaves a process."""

ItemIndex = int
"""Our dense integer for an item, 1..N, valid inside one bundle only."""

ID_PATTERN: Final = r"^[A-Za-z0-9_.:@+=~|-]{1,256}$"
_ID = re.compile(r"[A-Za-z0-9_.:@+=~|-]{1,256}")

EVENT_TYPE_PATTERN: Final = r"^[A-Za-z0-9_.:-]{1,64}$"

MANY: Final = 100_000  # events from which it is worth looking for a faster way to sort

DEFAULT_TYPES: Final = ("view", "click", "play", "read", "like", "rating", "cart", "purchase")


def is_id(text: str) -> bool:
    """True for text that can be a user, item or event id. "." and ".." vanish from URLs, so they cannot."""
    return _ID.fullmatch(text) is not None and text not in (".", "..")


def item_key(item_id: ItemId) -> int:
    """64 bits that stand for an item id in caches (uint64, the same in every process and release).

    Eight bytes instead of up to 256 keep a cached history small. Two ids of one catalogue with
    the same key would be confused, so a bundle refuses to be written with such a pair (expected
    once in 40 million catalogues of a million items).
    """
    return int.from_bytes(hashlib.blake2b(item_id.encode(), digest_size=8).digest(), "little")


def item_keys(item_ids: Sequence[ItemId]) -> KeyArray:
    """`item_key` of each id, (E,) uint64."""
    return np.fromiter((item_key(i) for i in item_ids), np.uint64, len(item_ids))


class HistoryPolicy(BaseModel):
    """Which events make a user's history. Stored in the bundle's manifest; the service obeys it.

    An event type that neither list names is stored in the log and reported, and touches nothing else.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sequence_types: tuple[str, ...] = Field(
        DEFAULT_TYPES, description="Event types that feed the sequence a model reads."
    )
    seen_types: tuple[str, ...] = Field(
        DEFAULT_TYPES, description="Event types that mark an item as seen, so that it is not recommended again."
    )
    minimum_value: Annotated[float, Field(allow_inf_nan=False)] | None = Field(
        None,
        description="Events with a smaller value (a rating below 4, say) do not feed the sequence. "
        "An event without a value passes: implicit feedback has none. Seen marks ignore the value.",
    )
    collapse_repeats: bool = Field(
        False, description="Several events in a row on the same item count as one in the sequence."
    )

    def fingerprint(self) -> str:
        """Eight hex digits; caches built under another policy do not count."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()

    def feeds(self, event_type: str, value: float | None) -> bool:
        """Whether one event feeds the sequence."""
        if event_type not in self.sequence_types:
            return False
        return self.minimum_value is None or value is None or not value < self.minimum_value

    def marks_seen(self, event_type: str) -> bool:
        """Whether one event marks its item as seen."""
        return event_type in self.seen_types

    def names(self, event_type: str) -> bool:
        """Whether the policy knows the type at all."""
        return event_type in self.sequence_types or event_type in self.seen_types


@dataclass(frozen=True, slots=True)
class Events:
    """Events as columns of one length E, in arrival order.

    `user` and `item` hold any integers that tell users and items apart: positions in a table in
    the trainer, `item_key`s in the service. `kind` indexes `kinds`, the distinct event types.
    """

    user: IntArray  # (E,)
    item: IntArray | KeyArray  # (E,)
    kind: IntArray  # (E,) index into kinds
    kinds: tuple[str, ...]
    value: FloatArray  # (E,) nan where the event has none
    timestamp: IntArray  # (E,) epoch microseconds

    def __len__(self) -> int:
        return len(self.user)


@dataclass(frozen=True, slots=True)
class Histories:
    """Events sorted by (user, timestamp, arrival), with what the policy makes of each.

    A user's sequence is `item[rows][feeds[rows]]` over the user's rows; the seen items are
    `item[rows][seen[rows]]`.
    """

    order: IntArray  # (E,) position of each row in the events it came from
    user: IntArray  # (E,) non-decreasing
    item: IntArray | KeyArray  # (E,)
    timestamp: IntArray  # (E,) non-decreasing inside a user
    feeds: BoolArray  # (E,) part of the sequence
    seen: BoolArray  # (E,) marks its item as seen


def history_of(events: Events, policy: HistoryPolicy) -> Histories:
    """The histories of all users in `events` under `policy`.

    Order is (timestamp, arrival): a stable sort, because many real events share a second and the
    order of ties decides what "the last event" is.

        events of one user, policy with collapse_repeats:
        item   7 8 8 9        feeds  1 1 0 1      (the second 8 repeats the first)
        kind   v v v x        seen   1 1 1 0      (type x is not named)  -> feeds 1 1 0 0
    """
    order = by_user_and_time(events.user, events.timestamp)  # (E,) stable in arrival
    user, item, kind = events.user[order], events.item[order], events.kind[order]
    named = np.array([k in policy.sequence_types for k in events.kinds], bool)  # (kinds,)
    marks = np.array([policy.marks_seen(k) for k in events.kinds], bool)
    feeds = named[kind] if len(kind) else np.zeros(0, bool)  # (E,)
    seen = marks[kind] if len(kind) else np.zeros(0, bool)
    if policy.minimum_value is not None:
        feeds = feeds & ~(events.value[order] < policy.minimum_value)  # nan < x is False: passes
    if policy.collapse_repeats:
        feeds = feeds & first_of_repeats(user, item, feeds)
    return Histories(order, user, item, events.timestamp[order], feeds, seen)


def by_user_and_time(user: IntArray, timestamp: IntArray) -> IntArray:
    """The stable order by (user, timestamp), (E,) positions.

    Of many events both are put into one number where that is large enough, which is sorted in less than half the time.
    """
    if len(user) >= MANY:
        unit = 1 if (timestamp % SECOND).any() else SECOND
        since, least = int(timestamp.min()), int(user.min())
        span = (int(timestamp.max()) - since) // unit + 1
        if (int(user.max()) - least + 1) * span < 2**63:
            return np.argsort((user - least) * span + (timestamp - since) // unit, kind="stable")
    return np.lexsort((timestamp, user))


def first_of_repeats(user: IntArray, item: IntArray | KeyArray, feeds: BoolArray) -> BoolArray:
    """True for each feeding row whose item differs from the user's feeding row before it, (E,)."""
    rows = np.flatnonzero(feeds)
    keep = np.ones(len(rows), bool)
    keep[1:] = (item[rows[1:]] != item[rows[:-1]]) | (user[rows[1:]] != user[rows[:-1]])
    first = np.zeros(len(feeds), bool)
    first[rows] = keep
    return first
