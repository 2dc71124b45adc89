"""What happens in the folder of bundles over time: the list, the way back, and what is removed."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from shared.bundle import CURRENT, MANIFEST, PREVIOUS, Bundle, BundleError, current_version, point_current
from tests.test_cli import call, trainer
from tests.trained import unchanged
from tests.worlds import cyclic, write_bundle
from trainer.shelf import kept, listing, retire, roll_back


def publish(bundles: Path, *versions: str) -> None:
    """One after another goes live; all were made at the same time, so that their names decide which is newer."""
    for version in versions:
        write_bundle(bundles, cyclic(), version=version)


def present(bundles: Path) -> set[str]:
    return {one.version for one in kept(bundles)}


def test_the_oldest_go(tmp_path: Path) -> None:
    publish(tmp_path, "v1", "v2", "v3", "v4", "v5")
    with unchanged(tmp_path):
        assert retire(tmp_path, 5) == []
    assert retire(tmp_path, 3) == ["v2", "v1"]
    assert present(tmp_path) == {"v3", "v4", "v5"}
    assert {f.name for f in tmp_path.iterdir()} == {"v3", "v4", "v5", CURRENT, PREVIOUS}
    assert retire(tmp_path, 2) == ["v3"]
    assert retire(tmp_path, 2) == []


def test_the_live_one_and_the_one_before_stay_however_old_they_are(tmp_path: Path) -> None:
    publish(tmp_path, "v1", "v2", "v3", "v4")
    point_current(tmp_path, "v2")
    point_current(tmp_path, "v1")
    assert retire(tmp_path, 2) == ["v4", "v3"]
    assert (current_version(tmp_path), present(tmp_path)) == ("v1", {"v1", "v2"})


def test_the_one_before_need_not_be_there(tmp_path: Path) -> None:
    publish(tmp_path, "v1", "v2", "v3")
    shutil.rmtree(tmp_path / "v2")
    assert retire(tmp_path, 2) == []
    assert present(tmp_path) == {"v1", "v3"}


def test_what_is_no_bundle_stays(tmp_path: Path) -> None:
    publish(tmp_path, "v1", "v2", "v3", "v4")
    (tmp_path / "v1" / MANIFEST).write_text("{")
    (tmp_path / "v2").rename(tmp_path / "copy-of-v2")
    (tmp_path / "notes").mkdir()
    (tmp_path / ".staging-1234").mkdir()
    (tmp_path / "link").symlink_to("v3")
    with unchanged(tmp_path):
        assert retire(tmp_path, 2) == []


@pytest.mark.parametrize("file", [CURRENT, PREVIOUS])
def test_nothing_goes_while_it_is_not_known_what_is_live(tmp_path: Path, file: str) -> None:
    publish(tmp_path, "v1", "v2", "v3", "v4")
    (tmp_path / file).write_text("../v1")
    with unchanged(tmp_path), pytest.raises(BundleError, match=file):
        retire(tmp_path, 2)


def test_who_answers_from_a_removed_bundle_goes_on(tmp_path: Path) -> None:
    publish(tmp_path, "v1", "v2", "v3")
    bundle = Bundle.load(tmp_path / "v1")
    assert retire(tmp_path, 2) == ["v1"]
    model = bundle.models["sasrec"]
    np.testing.assert_array_equal(model.retriever.vectors, np.eye(12, dtype=np.float32))
    (query,) = model.encoder.encode([np.array([3])], [np.zeros(2, np.int64)])
    assert np.argmax(model.retriever.vectors @ query) == 3  # row of item 4


def test_back_and_forth(tmp_path: Path) -> None:
    publish(tmp_path, "v1", "v2", "v3")
    assert roll_back(tmp_path) == current_version(tmp_path) == "v2"
    assert roll_back(tmp_path) == current_version(tmp_path) == "v3"
    assert roll_back(tmp_path, "v1") == current_version(tmp_path) == "v1"
    publish(tmp_path, "v4")
    assert roll_back(tmp_path) == "v1"  # what was live before, not what was made before


@pytest.mark.parametrize(
    ("version", "said"), [(None, "no other"), ("v1", "no other"), ("v9", "v9"), ("../v1", "no bundle version")]
)
def test_there_is_no_way_back_to_what_is_not_there(tmp_path: Path, version: str | None, said: str) -> None:
    publish(tmp_path, "v1")
    with unchanged(tmp_path), pytest.raises(BundleError, match=said):
        roll_back(tmp_path, version)


def test_there_is_no_way_back_to_a_damaged_bundle(tmp_path: Path) -> None:
    publish(tmp_path, "v1", "v2")
    (tmp_path / "v1" / "items.jsonl").write_text("{}\n")
    with unchanged(tmp_path), pytest.raises(BundleError, match=r"items\.jsonl"):
        roll_back(tmp_path)


def test_the_list_and_the_commands(tmp_path: Path) -> None:
    assert len(listing(tmp_path / "none").splitlines()) == 1
    publish(tmp_path, "v1", "v2", "v3")
    folder = ("--bundles", str(tmp_path))
    rows = [line.split() for line in trainer("bundles", *folder).splitlines()[1:]]
    assert [row[:2] for row in rows] == [["v3", "live"], ["v2", "before"], ["v1", "2000-03-01T00:00:00Z"]]
    assert all(row[-2:] == ["sasrec,", "bert4rec"] for row in rows)
    assert trainer("rollback", *folder) == "v2 is live again\n"
    refused = call("rollback", "v7", *folder)
    assert refused.code == 1
    assert "v7" in refused.err
    assert current_version(tmp_path) == "v2"
