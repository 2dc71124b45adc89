"""The live bundle with the live catalogue on top.

Two things change while a worker runs: `CURRENT` names another bundle, and items change. Both end in one reference
being replaced, so a request that took hold of a `Serving` keeps one numbering to its end:

    Live.serving ──► Serving(bundle, availability, categories, new)   a new bundle: a new Serving
                                     └── replaced ───────────────┘   a changed item: new ones in the same Serving
"""

from __future__ import annotations

import asyncio
import logging
import time
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Iterable, Mapping, Set
from functools import lru_cache, partial
from heapq import nsmallest
from math import inf
from pathlib import Path
from types import TracebackType
from typing import Final
from weakref import WeakSet

import numpy as np
from sqlalchemy.exc import SQLAlchemyError

from service.catalogue import CatalogueUnavailable, LiveCatalogue
from service.coverage import Answered
from service.errors import CatalogueDown, NoBundle, UnknownModel
from service.history import READ_SECONDS, database_failures_as
from service.memory import trim, uncollected
from service.metrics import Metrics
from service.patience import detached
from service.queries import QueryVectors
from service.settings import Settings
from shared.bundle import CURRENT, HOW_TO_PUBLISH, Bundle, BundleError, Model, current_version, previous_version
from shared.catalogue import Availability, Item, ItemChange, NewItems
from shared.categories import Categories
from shared.database import SchemaError, check_schema
from shared.encoder import CHUNK
from shared.events import HistoryPolicy, IntArray, ItemId, ItemIndex, KeyArray, item_keys
from shared.retrieval import Scope
from shared.times import SECOND, now, parse, render_bound

log = logging.getLogger(__name__)

FIRST_RETRY: Final = 5.0
LAST_RETRY: Final = 300.0
"""Seconds before a bundle that could not be loaded is tried again; doubled each time."""


class Serving:
    """One bundle, and its items as they are now."""

    def __init__(self, bundle: Bundle, changes: Iterable[ItemChange], query_vectors: int = 0) -> None:
        self.bundle = bundle
        self.queries = {name: QueryVectors(model.encoder, query_vectors) for name, model in bundle.models.items()}
        self.known = len(bundle.catalogue)  # item indices up to here have vectors
        self.created = parse(bundle.manifest.created)  # epoch microseconds
        self.new = NewItems(self.known)
        # Of the new items, in the order (available_from, item id), in which the next bundle will number them. Not in
        # that of their indices: each worker numbers them as it hears of them.
        self.newcomers: IntArray = np.zeros(0, np.int64)
        self.availability = Availability.of(bundle.catalogue)
        self.categories = Categories.of(bundle.catalogue)
        self._titles: dict[ItemId, str] = {}
        self.answered = Answered(bundle.manifest.version, self.known)
        self.apply(changes)

    def apply(self, changes: Iterable[ItemChange]) -> None:
        """Put item changes in force, for every request from here on."""
        changes = list(changes)
        published = self.bundle.catalogue.index_by_id.of_ids([change.item_id for change in changes])
        known = {change.item_id: index for change, index in zip(changes, published, strict=True) if index}
        changes = [change for change in changes if not change.gives_way(published=change.item_id in known)]
        self.new = self.new.with_ids(change.item_id for change in changes if change.item_id not in known)
        for change in changes:
            self._titles.pop(change.item_id, None)
            if change.title is not None:
                self._titles[change.item_id] = change.title
        if changes:
            indices = [known.get(change.item_id) or self.new.index_by_id[change.item_id] for change in changes]
            before = [_as_published(self.bundle, self.new, index) for index in indices]
            changed = [(i, change.on(item)) for i, change, item in zip(indices, changes, before, strict=True)]
            self.availability = self.availability.holding(changed)
            self.categories = self.categories.holding(changed)
            self._place({index for index in indices if index > self.known})
        # Filters repeat, and each one is asked twice a request: by retrieval and by the final gate.
        self.wanted = lru_cache(maxsize=16)(
            partial(self.categories.select, available_from=self.availability.available_from)
        )
        # Item id, title and `available_from` (RFC 3339, None when open) of an item index: ten a request. Not of a
        # method: whoever refers to himself is freed by the collector of garbage alone, and late.
        self.describe = lru_cache(maxsize=1 << 16)(
            partial(_describe, self.bundle, self.new, self.availability, dict(self._titles))
        )

    def index(self, item_id: ItemId) -> ItemIndex | None:
        """The item's index, new items included; None for one that nobody told of."""
        return self.bundle.catalogue.index_by_id.get(item_id) or self.new.index_by_id.get(item_id)

    def indices_of(self, item_ids: Iterable[ItemId]) -> IntArray:
        """Item indices of the ids that are known, in the order given; others are left out."""
        ids = list(item_ids)
        if not ids:
            return np.zeros(0, np.int64)  # most requests name none
        found = self.bundle.catalogue.indices_of_keys(item_keys(ids))
        for at in np.flatnonzero(found == 0).tolist() if self.new else ():
            found[at] = self.new.index_by_id.get(ids[at], 0)
        return found[found > 0]

    def indices_of_keys(self, keys: KeyArray) -> IntArray:
        """Item indices of the keys that are known; new items behind."""
        found = self.bundle.catalogue.indices_of_keys(keys)
        found = found[found > 0]
        return np.concatenate((found, self.new.indices_of_keys(keys))) if self.new else found

    def obeys(self, change: ItemChange) -> bool:
        """Whether a change counts beside this bundle."""
        return not change.gives_way(published=change.item_id in self.bundle.catalogue.index_by_id)

    def _place(self, moved: Set[ItemIndex]) -> None:
        """Put these new items where they belong among `newcomers`; the others stay as they are, however many."""
        starts = self.availability.available_from

        def place(index: ItemIndex) -> tuple[int, ItemId]:
            return int(starts[index]), self.new[index]

        others = self.newcomers[~np.isin(self.newcomers, list(moved))]
        ordered = sorted(moved, key=place)
        at = [bisect_right(others, place(index), key=place) for index in ordered]
        self.newcomers = np.insert(others, at, ordered)

    def model(self, name: str | None, preferred: str | None) -> Model:
        """The model asked for; without a name the preferred one if the bundle has it, else the bundle's default."""
        models = self.bundle.models
        if name is None:
            name = preferred if preferred and preferred in models else self.bundle.manifest.default_model
        if name not in models:
            raise UnknownModel(
                f"There is no model {name!r} in the live bundle; there are: {', '.join(sorted(models))}."
            )
        return models[name]


def _as_published(bundle: Bundle, new: NewItems, index: ItemIndex) -> Item:
    """What the bundle says of an item; of a new one, only that it was not there when the bundle was made."""
    if index <= new.known:
        return bundle.catalogue[index]
    return Item(new[index], available_from=parse(bundle.manifest.created))


def _describe(
    bundle: Bundle, new: NewItems, availability: Availability, titles: Mapping[ItemId, str], index: ItemIndex
) -> tuple[ItemId, str | None, str | None]:
    item = _as_published(bundle, new, index)
    title = titles.get(item.item_id, item.title)
    return item.item_id, title, render_bound(int(availability.available_from[index]))


class Live:
    """Follows `CURRENT` and the live catalogue while it is entered."""

    def __init__(self, settings: Settings, catalogue: LiveCatalogue, metrics: Metrics) -> None:
        self.settings, self.catalogue, self.metrics = settings, catalogue, metrics
        self.serving: Serving | None = None
        # Why the published bundle is not the live one; None when it is.
        self.bundle_failure: str | None = f"{settings.bundles / CURRENT} does not exist"
        self.catalogue_failure: str | None = "the catalogue was not read yet"
        self.revision = 0  # all changes up to here are in force
        self.catalogue_read = False  # at least once
        self._changes: dict[ItemId, ItemChange] = {}  # newest change of each item, but for those that were let go
        self._again = False  # all changes are to be read once more
        self._let_go = False  # rows from a file that give way to the live bundle: there may be one of each of its items
        self._former: WeakSet[Serving] = WeakSet()  # bundles that requests under way still answer from
        self._attempted: str | None = None  # what CURRENT held when it was last acted on
        self._retry_at = inf  # when a version that could not be loaded is tried again (monotonic seconds)
        self._retry_after = FIRST_RETRY
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Live:
        await self.follow_catalogue()
        await self.follow_bundle()
        self._tasks = [
            asyncio.create_task(_repeat(self.follow_catalogue, self.settings.catalogue_poll_seconds)),
            asyncio.create_task(_repeat(self.follow_bundle, self.settings.bundle_poll_seconds)),
        ]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def policy(self) -> HistoryPolicy:
        """The live bundle's history policy; the usual one while there is no bundle."""
        return self.serving.bundle.policy if self.serving else HistoryPolicy()

    def now_serving(self) -> Serving:
        """What answers requests. Raises NoBundle, or CatalogueDown before the live catalogue was ever read.

        A catalogue that was read once and is out of reach now stays in force as it was.
        """
        if self.serving is None:
            raise NoBundle(f"No bundle is loaded: {self.bundle_failure}; {HOW_TO_PUBLISH}")
        if not self.catalogue_read:
            raise CatalogueDown(f"Withdrawn items are not known yet: {self.catalogue_failure}")
        return self.serving

    @property
    def is_current(self) -> bool:
        """Whether the newest bundle is the live one, as far as is known."""
        return self.serving is not None and self.bundle_failure is None

    def published(self, item_id: ItemId) -> Item | None:
        """What the live bundle says of the item; None without a bundle, or when it does not have it."""
        if self.serving is None:
            return None
        catalogue = self.serving.bundle.catalogue
        index = catalogue.index_by_id.get(item_id)
        return None if index is None else catalogue[index]

    def knows(self, item_id: ItemId) -> bool:
        """Whether the live bundle or the live catalogue has the item."""
        if item_id in self._changes:
            return True
        return self.serving is not None and item_id in self.serving.bundle.catalogue.index_by_id

    def apply(self, changes: Iterable[ItemChange]) -> None:
        """Put changes in force here; those that are in force already, or older, are passed over."""
        fresh = [c for c in changes if (held := self._changes.get(c.item_id)) is None or held.revision < c.revision]
        self._changes.update((c.item_id, c) for c in fresh)
        if fresh:
            for serving in (self.serving, *self._former):
                if serving is not None:
                    serving.apply(fresh)
            self._let_go_of(fresh)

    def _let_go_of(self, changes: Iterable[ItemChange]) -> None:
        """Forget changes that give way to the live bundle; a later bundle without their items has them read again."""
        loaded = [change.item_id for change in changes if change.loaded]
        if self.serving is None or not loaded:
            return
        published = self.serving.bundle.catalogue.index_by_id.of_ids(loaded)
        for item_id, index in zip(loaded, published, strict=True):
            if index and self._changes[item_id].loaded:
                del self._changes[item_id]
                self._let_go = True

    def change_of(self, item_id: ItemId) -> ItemChange | None:
        """The item's change that is in force here."""
        return self._changes.get(item_id)

    def page(self, after: ItemId, count: int) -> list[ItemId]:
        """The first `count` ids of the bundle and the live catalogue behind `after`, sorted.

        The first page of a bundle sorts its ids.
        """
        here: list[ItemId] = []
        if self.serving is not None:
            catalogue = self.serving.bundle.catalogue
            ids, rows = catalogue.items.ids, catalogue.rows_by_id
            first = bisect_right(rows, after, key=ids.__getitem__)
            here = [ids[row] for row in rows[first : first + count].tolist()]
        return sorted({*here, *nsmallest(count, (i for i in self._changes if i > after))})[:count]

    async def follow_catalogue(self) -> None:
        """Fetch and apply what changed since the last time."""
        again, self._again = self._again, False
        try:
            if not self.catalogue_read:
                with database_failures_as(CatalogueUnavailable, self.metrics.failed):
                    async with asyncio.timeout(READ_SECONDS):  # the start of the worker waits for it
                        await detached(check_schema(self.catalogue.engine))
            revision, changes = await self.catalogue.changes_since(0 if again else self.revision)
        except (CatalogueUnavailable, SchemaError, SQLAlchemyError, OSError) as error:
            self._again |= again
            reason = str(error) if isinstance(error, SchemaError) else "the database cannot be read"
            if self.catalogue_failure != reason:  # once, not with every try
                log.warning("the live catalogue cannot be read: %s", error)
            self.catalogue_failure = reason
            return
        self.apply(changes)
        self.revision, self.catalogue_read, self.catalogue_failure = revision, True, None
        self.metrics.catalogue_revision.set(revision)

    async def follow_bundle(self) -> None:
        """Load what CURRENT names, if that is news. A bundle that cannot be served leaves the old one live."""
        await self._follow_bundle()
        self.metrics.bundle_current.set(self.is_current)
        models = self.serving.bundle.models.values() if self.serving else ()
        self.metrics.index_failed.set(any(model.retriever.failed for model in models))

    async def _follow_bundle(self) -> None:
        if self.serving is not None:
            self.metrics.coverage.set(self.serving.answered.share)
        folder = self.settings.bundles
        try:
            version = await asyncio.to_thread(current_version, folder)
        except BundleError as error:
            if self._attempted != str(error):
                self._failed(str(error), error)
                await self._go_back()
            return
        if version == self._attempted and time.monotonic() < self._retry_at:
            return
        if version != self._attempted:
            self._retry_after = FIRST_RETRY
        self._attempted, self._retry_at = version, inf
        if version is None or (self.serving and version == self.serving.bundle.version):
            self.bundle_failure = None if version else f"{folder / CURRENT} does not exist"
            return
        held = dict(self._changes)
        try:
            serving = await asyncio.to_thread(_load, folder / version, self.settings, held)
        except Exception as error:  # whatever is wrong with it, the old one is better than none
            # Perhaps its files are still on their way: shared file systems and object stores show a folder bit by bit.
            self._retry_at = time.monotonic() + self._retry_after
            self._retry_after = min(2 * self._retry_after, LAST_RETRY)
            self._failed(version, error)
            await self._go_back()
            return
        self.bundle_failure = None
        await self._go_live(serving, held)

    async def _go_back(self) -> None:
        """Where nothing is live yet, serve what was live before; that CURRENT cannot be served is told all the same."""
        if self.serving is not None:
            return
        folder, held = self.settings.bundles, dict(self._changes)
        try:
            version = await asyncio.to_thread(previous_version, folder)
            if version is None or version == self._attempted:
                return
            serving = await asyncio.to_thread(_load, folder / version, self.settings, held)
        except Exception as error:  # whatever is wrong with it: there is nothing else to go back to
            log.warning("nor can the bundle before it: %s", error)
            return
        await self._go_live(serving, held)

    async def _go_live(self, serving: Serving, held: Mapping[ItemId, ItemChange]) -> None:
        """Answer from `serving`, which was loaded with the changes `held`."""
        version = serving.bundle.version
        # Changes that came while it was loading; the awaits are over, so none can slip in between.
        serving.apply(c for i, c in self._changes.items() if held.get(i) is not c)
        if self.serving is not None:
            self._former.add(self.serving)
            self.metrics.bundle_workers.labels(self.serving.bundle.version).set(0)
            items, others = (one.bundle.catalogue.index_by_id for one in (self.serving, serving))
            self._again |= self._let_go and not items.is_within(others)
        self.serving = serving
        self._let_go_of(list(self._changes.values()))
        self.metrics.bundle_workers.labels(version).set(1)
        self.metrics.bundle_created.set(serving.created / SECOND)
        self.metrics.bundle_loaded.set(time.time())
        log.info("bundle is live", extra={"fields": {"version": version}})
        if len(self._former):  # the allocator keeps what the old one and the loading took, unless told
            await asyncio.to_thread(trim)

    def _failed(self, attempted: str, error: Exception) -> None:
        reason, known = str(error) or type(error).__name__, self.bundle_failure
        self._attempted, self.bundle_failure = attempted, reason
        self.metrics.load_failures.inc()
        if reason != known:  # once, not with every try
            log.error("bundle cannot be served: %s", reason)


def _load(path: Path, settings: Settings, changes: Mapping[ItemId, ItemChange]) -> Serving:
    with uncollected():
        serving = Serving(Bundle.load(path, settings.retrieval), changes.values(), settings.query_vectors)
        if serving.bundle.version != path.name:
            raise BundleError(f"{path}: the manifest says it is version {serving.bundle.version!r}")
        if lacking := sorted(set(settings.required_models) - serving.bundle.models.keys()):
            raise BundleError(f"{path}: lacks {', '.join(lacking)}, which UPNEXT_REQUIRED_MODELS asks for")
        _warm(serving)
        return serving


def _warm(serving: Serving) -> None:
    """Run every model once at every length, so that no request pays for first-time allocations."""
    bundle = serving.bundle
    bundle.popularity.fallback(now())
    scope = Scope(serving.availability, now(), np.zeros(0, np.int64))
    for model in bundle.models.values():
        spec = model.info.encoder
        longest = spec.max_length - (spec.mask is not None)
        model.encoder.encode([np.ones(longest, np.int64)] * CHUNK, [np.zeros(longest + 1, np.int64)] * CHUNK)
        for length in {min(bucket, longest) for bucket in spec.buckets} | {longest}:
            (query,) = model.encoder.encode([np.ones(length, np.int64)], [np.zeros(length + 1, np.int64)])
        # A sum of float64 is finite where all numbers are, and needs no second table to say so.
        if not (np.isfinite(query).all() and np.isfinite(model.retriever.vectors.sum(dtype=np.float64))):
            raise BundleError(f"{bundle.path}: {model.name} has numbers that are not finite")
        model.retriever.retrieve(query, 10, scope)
        model.retriever.similar(1, 10, scope)


async def _repeat(step: Callable[[], Awaitable[None]], seconds: float) -> None:
    while True:
        await asyncio.sleep(seconds)
        try:
            await step()
        except Exception:  # a follower that dies would leave the worker on old data for ever
            log.exception("a background step failed; next try in %s s", seconds)
