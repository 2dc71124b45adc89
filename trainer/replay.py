"""The skew alarm: what a running service answers, beside what the same bundle answers offline, for the same histories.

    brought   POST /recommend with the user's history, times and the time asked about
    log       GET /recommend/<user> as of that time, for users whose events the service's log holds

Offline is the bundle's own code on the histories that the trainer reads, as in `predict`; what exists when is what the
service says of its items (GET /items), so that an item withdrawn a minute ago is no alarm. Both must agree on every
place: on its score, and on its item unless scores tie.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple
from urllib.parse import quote

import httpx
import numpy as np

from shared.bundle import Bundle
from shared.catalogue import Availability, Item
from shared.events import IntArray
from shared.retrieval import Scope
from shared.times import BEGINNING, END, parse, render
from trainer.dataset import Dataset
from trainer.predict import ask, popular_list, to_bundle

TOLERANCE: Final = 1e-4
"""Scores that differ by no more are equal: batch size and padding change rounding."""
LONGEST: Final = 1_000
"""Events that a request may bring."""
EXAMPLES: Final = 5
_PAGE: Final = 1_000
_PATIENCE: Final = 10  # times that a request is sent again, when the service asks to come back later

Way = Literal["brought", "log"]


class ReplayError(Exception):
    """The service and the bundle cannot be compared."""


@dataclass(frozen=True)
class Options:
    """What to ask for, and how the service is set where it is not by default."""

    model: str
    k: int = 10
    users: int = 200
    seed: int = 0
    candidates: int = 200  # as UPNEXT_CANDIDATES


class Case(NamedTuple):
    """One user's history, and the time that the question is about."""

    user_id: str
    item_ids: list[str]  # what feeds the sequence, known to the bundle or not, oldest first
    times: list[int] | None  # of these, epoch microseconds
    history: IntArray  # (L,) the same as item indices, without unknown ones
    asked: IntArray  # (L + 1,) when these happened, and last the time asked about
    seen: IntArray  # item indices that the user's log marks as seen

    @property
    def as_of(self) -> int:
        """The time asked about."""
        return int(self.asked[-1])


class Place(NamedTuple):
    """One place of an answer; `score` is nan for popular items."""

    item_id: str
    score: float


class Expected(NamedTuple):
    """The offline answer."""

    places: list[Place]
    score_of: Callable[[str], float]  # of any item that may be answered; nan for others, and where popularity answers


@dataclass
class Compared:
    """How one way of asking went."""

    asked: int = 0
    differing: int = 0
    largest: float = 0.0  # difference of scores at the same place
    examples: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Of the answers, how many differ."""
        return self.differing / max(self.asked, 1)


def replay(bundle: Bundle, dataset: Dataset, service: Service, options: Options) -> dict[Way, Compared]:
    """Ask the service for a sample of the users in `dataset`, and compare. Raises ReplayError."""
    rule = service.availability(bundle)
    found: dict[Way, Compared] = {"brought": Compared(), "log": Compared()}
    for case in cases(bundle, dataset, options):
        brought = expected(bundle, case, np.unique(case.history), rule, options)
        _compare(found["brought"], case, brought, service.bring(case, options))
        if service.has_events_of(case.user_id):
            logged = expected(bundle, case, case.seen, rule, options)
            _compare(found["log"], case, logged, service.ask(case, options))
    return found


def cases(bundle: Bundle, dataset: Dataset, options: Options) -> Iterator[Case]:
    """A sample of the users, in the order of their ids; the same one for the same seed."""
    mapped = to_bundle(bundle, dataset)
    users = np.flatnonzero(np.diff(dataset.offsets))
    chosen = np.random.default_rng(options.seed).permutation(users)[: options.users]
    for user in np.sort(chosen):
        if (asked := ask(dataset, mapped, int(user))) is None:
            continue
        fed = asked.fed[-LONGEST:]
        known = int(np.count_nonzero(mapped[fed] > 0))
        yield Case(
            dataset.users[user],
            [dataset.catalogue.items.ids[i - 1] for i in dataset.item[fed].tolist()],
            dataset.timestamp[fed].tolist() if asked.timed else None,
            asked.history[len(asked.history) - known :],
            asked.times[-known - 1 :],
            asked.seen,
        )


def expected(bundle: Bundle, case: Case, seen: IntArray, rule: Availability, options: Options) -> Expected:
    """What the bundle answers by itself."""
    scope = Scope(rule, case.as_of, seen)
    if not len(case.history):
        items, scores = popular_list(bundle, scope, options.k)
        return Expected(_places(bundle, items, scores), lambda _: float("nan"))
    model = bundle.models[options.model]
    (query,) = model.encoder.encode([case.history], [case.asked])
    found = model.retriever.retrieve(query, max(options.k, options.candidates), scope)

    def score_of(item_id: str) -> float:
        index = bundle.catalogue.index_by_id.get(item_id)
        if index is None or not scope.permits(np.array([index]))[0]:
            return float("nan")
        return float(model.retriever.vectors[index - 1] @ query)

    return Expected(_places(bundle, found.items[: options.k], found.scores[: options.k]), score_of)


def _places(bundle: Bundle, items: IntArray, scores: Any) -> list[Place]:
    return [Place(bundle.catalogue.items.ids[i - 1], float(s)) for i, s in zip(items.tolist(), scores, strict=True)]


def _compare(found: Compared, case: Case, expected: Expected, answer: list[Place]) -> None:
    found.asked += 1
    pairs = list(zip(expected.places, answer, strict=False))
    differences = [abs(e.score - a.score) for e, a in pairs if not np.isnan(e.score) and not np.isnan(a.score)]
    found.largest = max([found.largest, *differences])
    if (reason := difference(expected, answer)) is not None:
        found.differing += 1
        if len(found.examples) < EXAMPLES:
            found.examples.append(f"user {case.user_id} as of {render(case.as_of)}: {reason}")


def difference(expected: Expected, answer: list[Place]) -> str | None:
    """The first place at which an answer is not the expected one; None where there is none."""
    if len(answer) != len(expected.places):
        return f"the service returns {len(answer)} items, offline {len(expected.places)}"
    if len({place.item_id for place in answer}) < len(answer):
        return "the service returns an item twice"
    for rank, (wanted, got) in enumerate(zip(expected.places, answer, strict=True), start=1):
        same = got.item_id == wanted.item_id or abs(expected.score_of(got.item_id) - wanted.score) <= TOLERANCE
        if not same or not _close(got.score, wanted.score):
            return f"place {rank}: the service has {_shown(got)}, offline {_shown(wanted)}"
    return None


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= TOLERANCE or (np.isnan(a) and np.isnan(b))


def _shown(place: Place) -> str:
    return place.item_id if np.isnan(place.score) else f"{place.item_id} ({place.score:.6g})"


def replay_table(found: dict[Way, Compared]) -> str:
    """The outcome for a person."""
    lines = ["asked    users  equal  differing  largest score difference"]
    lines += [
        f"{way:<7}{c.asked:7}{c.asked - c.differing:7}{c.differing:11}{c.largest:26.1e}"
        if c.asked
        else f"{way:<7}{0:7}  (nobody of them is in the service's log)"
        for way, c in found.items()
    ]
    lines += [f"{way}: {example}" for way, c in found.items() for example in c.examples]
    return "\n".join(lines)


class Service:
    """The running service, over HTTP."""

    def __init__(self, client: httpx.Client, version: str) -> None:
        """`version` is the bundle that it must answer from."""
        self.client, self.version = client, version

    def check_version(self) -> None:
        """Raise ReplayError unless the service runs the bundle that it is compared with."""
        self._is_ours(self._call("GET", "/models")["version"])

    def availability(self, bundle: Bundle) -> Availability:
        """When the bundle's items exist, as the service has it now."""
        changed = []
        for page in self._pages():
            for row in page["items"]:
                if index := bundle.catalogue.index_by_id.get(row["item_id"]):
                    starts, ends = row["available_from"], row["available_until"]
                    item = Item(
                        row["item_id"],
                        available_from=BEGINNING if starts is None else parse(starts),
                        available_until=END if ends is None else parse(ends),
                        withdrawn=row["withdrawn"],
                    )
                    changed.append((index, item))
        return Availability.of(bundle.catalogue).holding(changed)

    def _pages(self) -> Iterator[dict[str, Any]]:
        page = self._call("GET", f"/items?limit={_PAGE}")
        yield page
        while page["next_cursor"] is not None:
            page = self._call("GET", f"/items?limit={_PAGE}&cursor={quote(page['next_cursor'], safe='')}")
            yield page

    def has_events_of(self, user_id: str) -> bool:
        """Whether the user is in the service's log."""
        return bool(self._call("GET", f"/users/{quote(user_id, safe='')}/history?limit=1")["events"])

    def bring(self, case: Case, options: Options) -> list[Place]:
        """The answer to a history that comes with the request."""
        history = (
            case.item_ids
            if case.times is None
            else [{"item_id": i, "timestamp": render(t)} for i, t in zip(case.item_ids, case.times, strict=True)]
        )
        body = {"history": history, "model": options.model, "n": options.k, "as_of": render(case.as_of)}
        return self._places(self._call("POST", "/recommend", body))

    def ask(self, case: Case, options: Options) -> list[Place]:
        """The answer for a user of the log."""
        asked = httpx.QueryParams(
            model=options.model, n=options.k, as_of=render(case.as_of), require_seen="true"
        )  # no degraded answers
        return self._places(self._call("GET", f"/recommend/{quote(case.user_id, safe='')}?{asked}"))

    def _places(self, answer: dict[str, Any]) -> list[Place]:
        self._is_ours(answer["model"]["version"])
        # Items added since the bundle come last, and nobody offline knows them.
        items = [item for item in answer["items"] if item["reason"] != "new"]
        return [Place(i["item_id"], float("nan") if i["score"] is None else i["score"]) for i in items]

    def _is_ours(self, version: str | None) -> None:
        if version != self.version:
            theirs = version or "no bundle"
            raise ReplayError(f"the service at {self.client.base_url} answers from {theirs}, not from {self.version}")

    def _call(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        for _ in range(_PATIENCE):
            try:
                response = self.client.request(method, path, json=body)
            except httpx.HTTPError as error:
                raise ReplayError(
                    f"no service answers at {self.client.base_url} ({error or type(error).__name__}); start it "
                    "(python -m service), or say where it is with --url"
                ) from error
            if response.status_code not in (429, 503) or "retry-after" not in response.headers:
                break
            time.sleep(min(float(response.headers["retry-after"]), 5))
        if response.status_code in (401, 403):
            raise ReplayError(
                f"the service at {self.client.base_url} wants an API key with the scope read: {_detail(response)}; "
                "give one with --api-key or UPNEXT_API_KEY"
            )
        if response.status_code != 200:
            raise ReplayError(f"the service answers {path} with {response.status_code}: {_detail(response)}")
        try:
            found: dict[str, Any] = response.json()
        except ValueError as error:
            raise ReplayError(f"{self.client.base_url} is no Upnext service: it answers {path} without JSON") from error
        return found


def _detail(response: httpx.Response) -> str:
    try:
        return str(response.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return response.text[:200]


@contextmanager
def service_at(url: str, api_key: str | None, version: str) -> Iterator[Service]:
    """The service behind a URL. Raises ReplayError for one that is none."""
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    if not url.startswith(("http://", "https://")):
        raise ReplayError(f"{url!r} is no URL; write it like http://127.0.0.1:8000")
    with httpx.Client(base_url=url, headers=headers, timeout=30) as client:
        yield Service(client, version)
