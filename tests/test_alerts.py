"""The alert rules in deploy/prometheus: every series that they name is one that the service writes."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from service.recommend import Strategy
from tests.servers import RedisServer
from tests.serving import assert_problem, serving
from tests.worlds import cyclic

FOLDER = Path(__file__).resolve().parents[1] / "deploy" / "prometheus"
RULES = FOLDER / "alerts.yml"
TESTS = FOLDER / "alerts.test.yml"
SELECTOR = re.compile(r"\b(upnext_\w+)(?:\{([^{}]*(?:\{[^}]*\}[^{}]*)?)\})?")
MATCHER = re.compile(r'(\w+)(=~|=)"([^"]*)"')


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def selectors() -> set[tuple[str, str, str, str]]:
    """(series, label, operator, value) of every matcher in the rules; no label for a series without matchers."""
    found = set()
    for rule in rules():
        for series, matchers in SELECTOR.findall(rule["expr"]):
            found |= {(series, *matcher) for matcher in MATCHER.findall(matchers)} or {(series, "", "", "")}
    return found


async def test_rules_name_what_the_service_writes(tmp_path: Path, redis_of_test: RedisServer) -> None:
    async with serving(tmp_path, redis_of_test, cyclic()) as upnext:
        await upnext.view("u", "3")
        await upnext.ids("u")
        await upnext.bring(["3", "unheard"])
        redis_of_test.kill()
        await upnext.ids("u")
        assert_problem(await upnext.http.get("/recommend/u?model=none"), 404, "unknown_model")
        text = (await upnext.http.get("/metrics")).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    named = selectors()
    assert len({series for series, *_ in named}) >= 8
    for series, label, operator, value in named:
        written = [sample.labels for sample in samples if sample.name == series]
        assert written, f"the service writes no {series}"
        if label:
            values = {labels[label] for labels in written}
            if label == "strategy":
                values |= set(get_args(Strategy))
            if label == "status":
                values |= {"503"}
            test = re.compile(value if operator == "=~" else re.escape(value))
            assert any(test.fullmatch(one) for one in values), f"{series} has no {label} {value}, but {values}"


def test_every_alert_says_what_to_do_and_is_tested() -> None:
    tested = set(re.findall(r'alertname="(\w+)"', TESTS.read_text()))
    assert {rule["alert"] for rule in rules()} == tested
    for rule in rules():
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["remedy"]


def test_rules_fire_when_they_should_and_only_then() -> None:
    if (promtool := shutil.which("promtool")) is None:
        pytest.skip("no promtool on PATH; it comes with Prometheus")
    done = subprocess.run([promtool, "test", "rules", TESTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
