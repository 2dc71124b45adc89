"""Two evaluated runs against each other, user by user: the same users are easy or hard for both, so pairing them
finds differences that the intervals of the two runs hide.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Self

import numpy as np
from numpy.typing import NDArray

from shared.events import IntArray
from trainer.dataset import Cases
from trainer.errors import TrainerError
from trainer.metrics import Paired, case_values, paired, user_means

COMPARED: Final = ("hr@5", "hr@10", "hr@20", "ndcg@5", "ndcg@10", "ndcg@20")
Texts = NDArray[np.str_]
Asked = Literal["test", "validation"]
RANKS: Final[dict[Asked, str]] = {"test": "ranks.npz", "validation": "validation.npz"}
"""Which held-out events -> the file in a run's folder with the rank of each."""


class CompareError(TrainerError):
    """Two runs whose figures cannot be compared, or a run without saved ranks."""


@dataclass(frozen=True)
class CaseRanks:
    """`ranks.npz`: the rank of every test target through the bundle; ids as the caller knows them, nothing pickled."""

    user: Texts  # (C,) user id
    item: Texts  # (C,) item id of the target
    place: IntArray  # (C,) events of the user before the target
    rank: IntArray  # (C,) from 1; 2**40 for a target in no list
    protocol: str
    ranked: str = ""  # which items were ranked, in words that are the same for the same ones; "" in older files
    seen: str = ""  # types of event whose items were left out

    @classmethod
    def of(cls, cases: Cases, rank: IntArray, protocol: str) -> Self:
        """Ranks (C,) of cases."""
        dataset = cases.dataset
        ids = dataset.catalogue.items.ids
        users, items = np.array(dataset.users), np.array(["", *ids])
        digest = hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()[:8]
        return cls(
            users[cases.user], items[cases.target], cases.row - dataset.offsets[cases.user], rank, protocol,
            f"{len(ids):,} items ({digest})", ", ".join(sorted(dataset.policy.seen_types)) or "none",
        )  # fmt: skip

    def save(self, file: Path) -> None:
        """Write, small."""
        np.savez_compressed(
            file, user=self.user, item=self.item, place=self.place, rank=self.rank, protocol=np.array(self.protocol),
            ranked=np.array(self.ranked), seen=np.array(self.seen),
        )  # fmt: skip

    @classmethod
    def load(cls, file: Path) -> Self:
        """Raises CompareError where there is no such file."""
        try:
            with np.load(file, allow_pickle=False) as found:
                said = {name: str(found[name]) for name in ("protocol", "ranked", "seen") if name in found.files}
                return cls(found["user"], found["item"], found["place"], found["rank"], said.pop("protocol"), **said)
        except (OSError, KeyError, ValueError) as error:
            raise CompareError(
                f"{file} cannot be read ({error}); make it with: python -m trainer evaluate <name>"
            ) from None


def load_ranks(runs: Path, name: str, asked: Asked = "test") -> CaseRanks:
    """Ranks of the run `name` in `runs`, or of the run folder that `name` is. Raises CompareError."""
    folder = Path(name) if Path(name, "split").is_dir() else runs / name
    return CaseRanks.load(folder / "split" / RANKS[asked])


def compare(a: CaseRanks, b: CaseRanks) -> dict[str, Paired]:
    """Metric -> run B less run A, over the same users. Raises CompareError unless both were asked the same."""
    if a.protocol != b.protocol:
        raise CompareError(f"the runs were measured differently: {a.protocol!r} and {b.protocol!r}")
    for one, other, what in ((a.ranked, b.ranked, "ranked"), (a.seen, b.seen, "left out as seen: events of")):
        if one and other and one != other:
            raise CompareError(
                f"the runs are not alike, {what} {one} and {other}: evaluate both with the same settings of data"
            )
    order_a, order_b = (np.lexsort((r.place, r.user)) for r in (a, b))
    same = len(a.user) == len(b.user) and all(
        np.array_equal(getattr(a, part)[order_a], getattr(b, part)[order_b]) for part in ("user", "place", "item")
    )
    if not same:
        raise CompareError("the runs were asked different targets: train and evaluate both on the same data and split")
    users = np.unique(a.user[order_a], return_inverse=True)[1]
    return {
        name: paired(
            user_means(case_values(a.rank[order_a], name), users), user_means(case_values(b.rank[order_b], name), users)
        )
        for name in COMPARED
    }


def comparison_table(found: dict[str, Paired]) -> str:
    """The comparison as text."""
    lines = [f"{'':8}{'A':>9}{'B':>9}{'B - A':>10}   {'95 % interval':<21}{'p':>7}"]
    lines += [
        f"{name:<8}{p.a:9.4f}{p.b:9.4f}{p.difference:+10.4f}   [{p.low:+.4f}, {p.high:+.4f}]   {p.p:7.4f}"
        for name, p in found.items()
    ]
    users = next(iter(found.values())).users
    return "\n".join([*lines, f"{users:,} users; p by a paired permutation test, two-sided, each metric by itself"])
