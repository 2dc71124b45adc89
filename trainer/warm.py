"""Warm start: the weights of a published model as the first ones of a new training. Items are matched by id."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch

from shared.bundle import MANIFEST, WEIGHTS, Bundle, Manifest, current_version
from shared.catalogue import Catalogue
from shared.events import IntArray
from shared.times import parse
from shared.tower import TOWER_SPEC, TowerSpec
from trainer.config import ModelConfig
from trainer.dataset import Dataset, Split
from trainer.errors import TrainerError
from trainer.export import Weights
from trainer.transformer import Encoder

NETWORK: Final = ModelConfig.model_fields.keys() - {"dropout", "metadata"}
"""Settings of the model that give its weights their meaning."""


class WarmStartError(TrainerError):
    """A bundle that cannot give the first weights of this model."""


@dataclass(frozen=True)
class Published:
    """A model of a bundle, with its weights."""

    manifest: Manifest
    catalogue: Catalogue
    name: str
    weights: Weights
    metadata: TowerSpec | None = None  # what its item vectors are made of beside ids

    @classmethod
    def load(cls, place: Path, name: str, version: str | None = None) -> Published:
        """From a bundle, or the one of a `version`, or else the live one, in a folder of bundles.

        Raises WarmStartError, BundleError.
        """
        version = None if (place / MANIFEST).is_file() else version or current_version(place)
        folder = place if version is None else place / version
        bundle = Bundle.load(folder)
        file = folder / "models" / name / WEIGHTS
        if name not in bundle.models or not file.is_file():
            raise WarmStartError(f"{folder} holds no weights of a model {name!r} to start from")
        with np.load(file, allow_pickle=False) as found:
            weights = {part: found[part] for part in found.files}
        spec = file.parent / TOWER_SPEC
        metadata = TowerSpec.model_validate_json(spec.read_text()) if spec.is_file() else None
        return cls(bundle.manifest, bundle.catalogue, name, weights, metadata)

    def check(self, network: ModelConfig) -> None:
        """Raise WarmStartError where its network is another one: weights of the same shape may mean something else."""
        defaults = {part: ModelConfig.model_fields[part].default for part in NETWORK}  # of what older bundles lack
        had = defaults | self.manifest.models[self.name].config.get("model", {})
        has = network.model_dump(mode="json")
        other = [f"model.{part}={had[part]} (now {has[part]})" for part in sorted(NETWORK) if had[part] != has[part]]
        if other:
            raise WarmStartError(
                f"{self.name} of {self.manifest.version} was trained with {', '.join(other)}: a warm start needs the "
                "same network; unset training.init_from"
            )

    def saw(self, dataset: Dataset, split: Split) -> bool:
        """Whether it may have been trained on what `split` holds out: then its validation would be worth nothing."""
        info, data = self.manifest.models[self.name], self.manifest.data
        alike = str(info.metrics.get("protocol", "")).startswith(f"{split.protocol},")
        if info.fit == "split" and data.fingerprint == dataset.info.fingerprint and alike:
            return False
        held_out = np.concatenate((split.validation.timestamp, split.test.timestamp))
        if not len(held_out):
            return False
        return not dataset.has_times or data.last_event is None or parse(data.last_event) >= int(held_out.min())

    def give(self, encoder: Encoder, catalogue: Catalogue) -> str:
        """Copy what fits into `encoder`, whose items are `catalogue`'s; what was done, in words.

        Rows of items are matched by id, those of categories by value; what the bundle does not know keeps its random
        vector, and so does a part of the item table that has another form now. The encoder's own parts must have the
        same form: raises WarmStartError.
        """
        rows = self._rows(catalogue)  # (N + 2,) row in the bundle of each row here, -1 for none
        with torch.no_grad():
            for part, weight in encoder.named_parameters():
                origin, matched = self._origin(part, encoder.items.spec, rows)
                given = self.weights.get(origin)
                if given is not None and matched is not None and given.shape[1:] == weight.shape[1:]:
                    known = matched >= 0
                    weight[torch.from_numpy(known)] = torch.from_numpy(given[matched[known]])
                elif given is not None and matched is None and given.shape == weight.shape:
                    weight.copy_(torch.from_numpy(given))
                elif not part.startswith("items."):
                    had = "nothing" if given is None else str(given.shape)
                    raise WarmStartError(
                        f"{self.name} of {self.manifest.version} has {had} for {part}, here {tuple(weight.shape)}: "
                        "a warm start needs the same settings of the network; unset training.init_from"
                    )
        known_items = int((rows[1:-1] >= 0).sum())
        return f"started from {self.name} of {self.manifest.version}: {known_items:,} of {len(catalogue):,} items known"

    def _origin(self, part: str, spec: TowerSpec | None, rows: IntArray) -> tuple[str, IntArray | None]:
        """Which weight of the bundle a part takes ("": none), and the row in it of each row here, where rows differ."""
        if part == "items.ids.weight":
            return part, rows
        if not part.startswith("items.") or spec is None or self.metadata is None:
            return part, None
        if not part.startswith("items.parts."):  # what weighs the parts
            return (part if spec.fields == self.metadata.fields else ""), None
        place, _, weight = part.removeprefix("items.parts.").partition(".")
        field, mine = spec.fields[int(place)], self.metadata
        if field not in mine.fields or (field in spec.categories) != (field in mine.categories):
            return "", None
        origin = f"items.parts.{mine.fields.index(field)}.{weight}"
        if field not in spec.categories:
            return origin, None
        numbers = mine.categories[field].number_of
        return origin, np.array([0, *(numbers.get(value, -1) for value in spec.categories[field].values)], np.int64)

    def _rows(self, catalogue: Catalogue) -> IntArray:
        items = [index or -1 for index in self.catalogue.index_by_id.of_ids(catalogue.items.ids)]
        return np.array([0, *items, len(self.catalogue) + 1], np.int64)  # PAD, 1..N, MASK
