"""From what is written about items to vectors: TF-IDF and SVD, or a sentence-transformers model.

    Toy Story (1995) Animation Children's Comedy   ->   0.31 -0.02 ...

Vectors go to a file that `data.vectors` names; every later run reads the same numbers.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from shared.categories import field_of
from trainer.dataset import Dataset
from trainer.errors import TrainerError
from trainer.sources.vectors import ItemVectors

TFIDF: Final = "tfidf"
TITLE: Final = "title"


class TextError(TrainerError):
    """Items about which nothing is written, or a text model that cannot be loaded."""


def text_vectors(dataset: Dataset, fields: Sequence[str], model: str, width: int) -> ItemVectors:
    """Vectors (M, d) of the items that have a text in one of the `fields` (`title`, or fields of categories).

    `model` is `tfidf`, which has `width` numbers a vector, or what sentence-transformers loads: a folder, or a name.
    Raises TextError.
    """
    item_ids, texts = texts_of(dataset, fields)
    if len(texts) < 2:
        raise TextError(f"{len(texts)} items have a text in {', '.join(fields)}: name other fields with --text")
    values = tfidf_vectors(texts, width) if model == TFIDF else model_vectors(texts, model)
    return ItemVectors(item_ids, values)


def fields_with_text(dataset: Dataset, fields: Sequence[str]) -> list[str]:
    """Those of the fields in which any item has a text."""
    items = dataset.catalogue.items
    there = {field_of(c) for named in items.category_sets for c in named if ":" in c}
    there |= {TITLE} if any(item.title for item in items) else set()
    return [field for field in fields if field in there]


def texts_of(dataset: Dataset, fields: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """Ids and texts of the items that have one: the fields in the order given, with blanks between."""
    found = {}
    for item in dataset.catalogue.items:
        words = []
        for field in fields:
            named = [c.partition(":")[2] for c in item.categories if ":" in c and field_of(c) == field]
            words += [item.title] if field == TITLE and item.title else named
        if words:
            found[item.item_id] = " ".join(words)
    return tuple(found), list(found.values())


def tfidf_vectors(texts: Sequence[str], width: int) -> NDArray[np.float32]:
    """TF-IDF of words that two texts share at least, reduced to `width` numbers by SVD; the same for the same texts."""
    # Imported here: it takes a second, which other commands need not wait for.
    from sklearn.decomposition import TruncatedSVD  # noqa: PLC0415
    from sklearn.feature_extraction.text import TfidfVectorizer  # noqa: PLC0415

    try:
        words = TfidfVectorizer(min_df=2, sublinear_tf=True, strip_accents="unicode").fit_transform(texts)
    except ValueError:  # nothing left
        raise TextError("no word stands in two of the texts: nothing to compare them by") from None
    reduced = TruncatedSVD(min(width, words.shape[1]), random_state=0).fit_transform(words)
    return np.asarray(reduced, np.float32)


def model_vectors(texts: Sequence[str], model: str) -> NDArray[np.float32]:
    """What a sentence-transformers model says of the texts."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside the library
            from sentence_transformers import SentenceTransformer  # noqa: PLC0415

            found = SentenceTransformer(model, device="cpu").encode(list(texts), show_progress_bar=len(texts) > 500)
    except ImportError as error:
        raise TextError(f"{model} needs sentence-transformers: pip install 'upnext[text]' ({error})") from None
    except (OSError, ValueError) as error:
        raise TextError(f"{model} cannot be loaded: {str(error).partition(chr(10))[0]}") from None
    return np.asarray(found, np.float32)
