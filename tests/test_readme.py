"""The README is true: its steps are run as they stand, and its tables and examples are compared with the code.

The steps are also the test from end to end over real HTTP: train, publish, load, serve with a Redis of its own, post an
event and see the recommendation change, withdraw an item, retrain from the log, see the new bundle.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.answers import RecommendationAnswer, RecommendedItem
from service.settings import markdown_table
from tests import faults
from tests.servers import free_port
from trainer.config import load_config, preset_names

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TINY = ["training.epochs=6", "training.lr=0.01", "model.hidden_units=16", "publish.refit=false"]
PATIENCE = 120  # seconds for anything to happen; a bound for a test that hangs, not a claim


def blocks(language: str, text: str = README) -> list[str]:
    """Code blocks of one language, without the indent of the list they stand in."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", text, re.M | re.S)
    return [textwrap.dedent(body) for _, body in found]


def tutorial() -> list[str]:
    """The commands of "Your own data, step by step", in order."""
    section = README.split("## Your own data, step by step")[1].split("\n### ")[0]
    return [line for block in blocks("sh", section) for line in block.splitlines()]


class Shell:
    """Runs the tutorial's lines in a folder, with the curl lines sent by httpx."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("UPNEXT_", "PROMETHEUS_"))}
        self.environment |= {"PYTHONPATH": str(ROOT), "UPNEXT_PORT": str(self.port), "TMPDIR": str(folder)}
        self.service: subprocess.Popen[bytes] | None = None

    def run(self, line: str) -> Any:
        """What the line gives: text for commands, JSON for curl, nothing for the shell's own words."""
        words = [os.path.expandvars(w) for w in shlex.split(self.expanded(line))]
        if words[0] == "export":
            self.environment |= dict(word.split("=", 1) for word in words[1:])
        elif words[0] == "curl":
            return self.curl(words[1:])
        elif words == ["python", "-m", "service"]:
            self.service = subprocess.Popen([sys.executable, *words[1:]], cwd=self.folder, env=self.environment)
            self.wait_ready()
        elif words[0] == "python":
            extra = TINY if words[2:4] == ["trainer", "run"] else []
            return self.python([*words[1:], *extra])
        else:
            assert line == ". .venv/bin/activate", f"the tutorial has a command that this test does not know: {line}"
        return None

    def expanded(self, line: str) -> str:
        for name in ("UPNEXT_DATABASE_URL", "UPNEXT_BUNDLES"):
            line = line.replace(f"${name}", self.environment.get(name, ""))
        return line

    def python(self, words: list[str]) -> str:
        done = subprocess.run(
            [sys.executable, *words], cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def curl(self, words: list[str]) -> Any:
        method, body, headers, url = "GET", None, {}, ""
        arguments = iter(words)
        for word in arguments:
            if word == "-X":
                method = next(arguments)
            elif word == "-d":
                body = next(arguments)
            elif word == "-H":
                name, value = next(arguments).split(": ", 1)
                headers[name] = value
            else:
                url = word.replace(":8000", f":{self.port}")
        answer = httpx.request(method, url, content=body, headers=headers, timeout=10)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def ask(self, path: str) -> Any:
        return httpx.get(f"http://127.0.0.1:{self.port}{path}", timeout=10).json()

    def wait_ready(self) -> None:
        self.wait(lambda: httpx.get(f"http://127.0.0.1:{self.port}/readyz").status_code == 200)

    def wait(self, holds: Any) -> None:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            try:
                if holds():
                    return
            except httpx.TransportError:
                assert self.service is None or self.service.poll() is None, "the service ended"
            time.sleep(0.1)
        raise AssertionError("waited in vain")

    def stop(self) -> None:
        if self.service is not None:
            self.service.send_signal(signal.SIGINT)
            assert self.service.wait(PATIENCE) == 0


@pytest.fixture
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    folder = tmp_path_factory.mktemp("readme")  # short: a unix socket's path has 107 bytes at most
    (folder / "deploy").symlink_to(ROOT / "deploy")
    found = Shell(folder)
    try:
        yield found
        found.stop()
    finally:
        if found.service is not None and found.service.poll() is None:
            found.service.kill()
            found.service.wait()


@pytest.mark.slow
def test_the_tutorial_works_word_for_word(shell: Shell) -> None:
    answers = [(line, shell.run(line)) for line in tutorial()[:-1]]
    outputs = [a for line, a in answers if line.startswith("python -m trainer")]
    assert "customer" in tutorial()[0] or "6," in outputs[0]
    assert "published" in outputs[1]
    assert "events are new in the log" in outputs[2]

    before, posted, after, withdrawn, later = [a for line, a in answers if line.startswith("curl")]
    ids = [[item["item_id"] for item in answer["items"]] for answer in (before, after, later)]
    assert before["strategy"] == after["strategy"] == "sequence"
    assert before["items"][0]["title"]
    assert posted["accepted"] == 1
    assert ids[0] != ids[1], "the event did not change the recommendation"
    assert "GA01-A" in ids[1], "what follows the viewed item on its shelf is recommended, so its withdrawal shows"
    assert withdrawn["withdrawn"] is True
    assert "GA01-A" not in ids[2]
    assert len(ids[2]) == 5

    old = shell.ask("/info")["bundle"]["version"]
    assert "published" in shell.run(tutorial()[-1])
    shell.wait(lambda: shell.ask("/info")["bundle"]["version"] != old)
    again = shell.ask("/recommend/c17?n=5")
    assert again["model"]["version"] != old
    assert "GA01-A" not in [item["item_id"] for item in again["items"]]


def test_the_tutorial_ends_with_retraining_from_the_log() -> None:
    assert "data.source.kind=sql" in tutorial()[-1]


def test_the_settings_table_is_the_code_s() -> None:
    assert markdown_table() in README


def test_the_example_response_has_the_fields_of_a_real_one() -> None:
    (example,) = (json.loads(block) for block in blocks("json"))
    assert list(example) == list(RecommendationAnswer.model_fields)
    assert list(example["items"][0]) == list(RecommendedItem.model_fields)


def test_presets_that_the_readme_names_exist() -> None:
    named = set(re.findall(r"(?<![/-])\b(?:sasrec|bert4rec)-[a-z0-9-]+\b", README))
    assert named
    assert named <= set(preset_names())


def test_every_file_of_the_benchmarks_has_a_run_of_its_own() -> None:
    names = [load_config(str(file)).name for file in (ROOT / "tests" / "benchmarks").glob("*.yaml")]
    presets = {load_config(preset).name for preset in preset_names()}
    assert names
    assert len({*names, *presets}) == len(names) + len(presets)


def test_the_table_of_faults_and_the_tests_agree() -> None:
    assert faults.rows()
    assert set(faults.rows()) == faults.proved()


def test_every_linked_file_exists() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith(("http", "#"))]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_no_placeholder_is_left() -> None:
    assert re.findall(r"^[A-Z0-9]+_[A-Z0-9_]+$|\b(?:TODO|TBD|FIXME)\b", README, re.M) == []
