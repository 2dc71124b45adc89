"""Warm start: the weights of a published model as the first ones of a new training. Items are matched by id."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from shared.bundle import MANIFEST, WEIGHTS, Bundle, Manifest, current_version
from shared.catalogue import Catalogue
from shared.events import IntArray
from shared.times import parse
from trainer.dataset import Dataset, Split
from trainer.export import Weights
from trainer.transformer import Encoder


class WarmStartError(Exception):
    """A bundle that cannot give the first weights of this model."""


@dataclass(frozen=True)
class Published:
    """A model of a bundle, with its weights."""

    manifest: Manifest
    catalogue: Catalogue
    name: str
    weights: Weights

    @classmethod
    def load(cls, place: Path, name: str) -> Published:
        """From a bundle, or the live one in a folder of bundles. Raises WarmStartError, BundleError."""
        version = None if (place / MANIFEST).is_file() else current_version(place)
        folder = place if version is None else place / version
        bundle = Bundle.load(folder)
        file = folder / "models" / name / WEIGHTS
        if name not in bundle.models or not file.is_file():
            raise WarmStartError(f"{folder} holds no weights of a model {name!r} to start from")
        with np.load(file, allow_pickle=False) as found:
            weights = {part: found[part] for part in found.files}
        return cls(bundle.manifest, bundle.catalogue, name, weights)

    def saw(self, dataset: Dataset, split: Split) -> bool:
        """Whether it may have been trained on what `split` holds out: then its validation would be worth nothing."""
        info, data = self.manifest.models[self.name], self.manifest.data
        alike = str(info.metrics.get("protocol", "")).startswith(f"{split.protocol},")
        if info.fit == "split" and data.fingerprint == dataset.info().fingerprint and alike:
            return False
        held_out = np.concatenate((split.validation.timestamp, split.test.timestamp))
        if not len(held_out):
            return False
        return not dataset.has_times or data.last_event is None or parse(data.last_event) >= int(held_out.min())

    def give(self, encoder: Encoder, catalogue: Catalogue) -> str:
        """Copy what fits into `encoder`, whose items are `catalogue`'s; what was done, in words.

        Rows of items are matched by id; an item that the bundle does not know keeps its random vector, and so does a
        part of the item table that has another form now. The encoder's own parts must have the same form: raises
        WarmStartError.
        """
        rows = self._rows(catalogue)  # (N + 2,) row in the bundle of each row here, -1 for none
        old, new = len(self.catalogue) + 2, len(catalogue) + 2
        with torch.no_grad():
            for part, weight in encoder.named_parameters():
                given, by_item = self.weights.get(part), part.startswith("items.") and len(weight) == new
                if given is not None and by_item and given.shape == (old, *weight.shape[1:]):
                    known = rows >= 0
                    weight[torch.from_numpy(known)] = torch.from_numpy(given[rows[known]])
                elif given is not None and given.shape == weight.shape:
                    weight.copy_(torch.from_numpy(given))
                elif not part.startswith("items."):
                    had = "nothing" if given is None else str(given.shape)
                    raise WarmStartError(
                        f"{self.name} of {self.manifest.version} has {had} for {part}, here {tuple(weight.shape)}: "
                        "a warm start needs the same settings of the network; unset training.init_from"
                    )
        known_items = int((rows[1:-1] >= 0).sum())
        return f"started from {self.name} of {self.manifest.version}: {known_items:,} of {len(catalogue):,} items known"

    def _rows(self, catalogue: Catalogue) -> IntArray:
        by_id = self.catalogue.index_by_id
        items = [by_id.get(item.item_id, -1) for item in catalogue.items]
        return np.array([0, *items, len(self.catalogue) + 1], np.int64)  # PAD, 1..N, MASK
