"""The item tower: what is known of an item in, its vector out. For items that came after the training.

A model whose item vectors are made of metadata leaves two more files in the bundle:

    models/sasrec/tower.onnx    one input a field, (B, L) numbers of values or (B, d) of a vector; `vector` (B, D) out
    models/sasrec/tower.json    the fields, and which value has which number

Who does not know the files loses nothing: `vectors.npy` holds the finished vectors of all items of the bundle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
import onnxruntime as ort
from pydantic import BaseModel, ConfigDict, Field

from shared.catalogue import Item
from shared.encoder import Vectors
from shared.events import IntArray

TOWER: Final = "tower.onnx"
TOWER_SPEC: Final = "tower.json"


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CategorySpec(_Spec):
    """The values of one field of categories that the model has learnt."""

    values: tuple[str, ...] = Field(description="Without their field; value v has the number v + 1, 0 is none.")
    length: int = Field(ge=1, description="L: values of an item that are read at most.")

    @cached_property
    def number_of(self) -> Mapping[str, int]:
        """Value -> its number, from 1."""
        return {value: number for number, value in enumerate(self.values, start=1)}

    def numbers(self, field: str, items: Sequence[Item]) -> IntArray:
        """The numbers of each item's values in the order of its categories, (B, L); 0 behind the last one.

        Values that the model has not learnt are left out.

            values (Crime, Drama), L = 2:  [("genre:Drama", "genre:New"), ()] -> [[2, 0], [0, 0]]
        """
        found = np.zeros((len(items), self.length), np.int64)
        start = f"{field}:"
        for row, item in zip(found, items, strict=True):
            named = (c.removeprefix(start) for c in item.categories if c.startswith(start))
            known = [number for value in named if (number := self.number_of.get(value))][: self.length]
            row[: len(known)] = known
        return found


class TowerSpec(_Spec):
    """What a tower reads. The inputs are the fields of categories, then those of vectors, in this order."""

    width: int = Field(ge=1, description="D: length of an item vector.")
    categories: dict[str, CategorySpec]
    vectors: dict[str, int] = Field(description="Field -> numbers in a vector of it.")

    @property
    def fields(self) -> tuple[str, ...]:
        """All fields in the order of the inputs."""
        return (*self.categories, *self.vectors)


class ItemTower:
    """An onnxruntime session that gives items vectors. One thread; safe to call from several."""

    def __init__(self, model: Path | bytes, spec: TowerSpec) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self.spec = spec
        source = model if isinstance(model, bytes) else str(model)
        self.session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])

    @classmethod
    def load(cls, folder: Path) -> ItemTower | None:
        """The tower of a bundle's `models/<name>`; None where that model reads no metadata."""
        if not (folder / TOWER).is_file():
            return None
        return cls(folder / TOWER, TowerSpec.model_validate_json((folder / TOWER_SPEC).read_text()))

    def vectors(self, items: Sequence[Item], given: Mapping[str, Vectors] | None = None) -> Vectors:
        """Item vectors (B, D) from categories and `given` vectors, field -> (B, d).

        A field that is not given, a row of zeros, and an item without values say nothing; an item of which nothing is
        known gets a vector of zeros.
        """
        inputs: dict[str, IntArray | Vectors] = {
            field: one.numbers(field, items) for field, one in self.spec.categories.items()
        }
        for field, width in self.spec.vectors.items():
            inputs[field] = np.asarray((given or {}).get(field, np.zeros((len(items), width))), np.float32)
        return self.run(inputs)

    def run(self, inputs: Mapping[str, IntArray | Vectors]) -> Vectors:
        """The bare network: field -> (B, L) numbers or (B, d) vectors, to item vectors (B, D)."""
        (found,) = self.session.run(["vector"], dict(inputs))
        return np.asarray(found, np.float32)
