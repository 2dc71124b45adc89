"""Bundles written by this and older releases load, and answer as they did. See golden/make.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from shared.bundle import READABLE_VERSIONS, Bundle, point_current
from shared.retrieval import Mode
from tests.golden.make import HERE, comparable
from tests.servers import RedisServer
from tests.serving import serving


@pytest.mark.parametrize("version", READABLE_VERSIONS)
@pytest.mark.parametrize("mode", list(Mode))
async def test_golden_answers(tmp_path: Path, redis_server: RedisServer, version: int, mode: Mode) -> None:
    name = f"bundle-v{version}"
    shutil.copytree(HERE / name, tmp_path / "bundles" / name)
    point_current(tmp_path / "bundles", name)
    expected = json.loads((HERE / f"expected-v{version}.json").read_text())
    async with serving(tmp_path, redis_server, None, retrieval=mode) as upnext:
        for case in expected:
            answer = comparable(await upnext.http.post("/recommend", json=case["question"]))
            assert answer == case["answer"]


@pytest.mark.parametrize("version", READABLE_VERSIONS)
def test_golden_bundle_says_its_format(version: int) -> None:
    assert Bundle.load(HERE / f"bundle-v{version}").manifest.schema_version == version
