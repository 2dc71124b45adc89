"""The demo, what it needs, and what the Makefile and the README promise: every name in them is real."""

from __future__ import annotations

import csv
import os
import platform
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from typer.testing import CliRunner

from deploy import demo as demo_module
from deploy.demo import main, port_is_free, wait_until_ready
from deploy.prerequisites import missing
from service.__main__ import main as service_main
from tests.servers import free_port
from trainer.__main__ import app as trainer_app
from trainer.config import preset_names

ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def listening() -> Iterator[int]:
    """A port that something listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


# Before anything starts


def test_port_is_free_only_while_nobody_listens() -> None:
    with listening() as port:
        assert not port_is_free(port)
    assert port_is_free(port)


def test_taken_port_is_told_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with listening() as port:
        monkeypatch.setenv("UPNEXT_PORT", str(port))
        assert main() == 1
    assert f"port {port} is in use" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def prerequisites(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "deploy" / "prerequisites.py")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_without_a_compiler_it_says_what_to_install() -> None:
    result = prerequisites({"PATH": ""})
    assert (result.returncode, result.stdout) == (1, "")
    assert "  - a C++ compiler: hnswlib is built from source\n" in result.stderr
    assert "sudo apt-get install g++" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_compiler_named_by_cxx_counts(tmp_path: Path) -> None:
    compiler = tmp_path / "my-compiler"
    compiler.touch(mode=0o755)
    assert "C++ compiler" not in prerequisites({"PATH": "", "CXX": str(compiler)}).stderr


@pytest.mark.parametrize(
    ("system", "machine", "told"), [("linux", "x86_64", 0), ("linux", "aarch64", 1), ("darwin", "x86_64", 1)]
)
def test_a_redis_is_asked_for_where_pip_brings_none(
    system: str, machine: str, told: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sum("redis-server" in line for line in missing()) == told
    (tmp_path / "redis-server").touch(mode=0o755)
    assert not any("redis-server" in line for line in missing())


# Waiting for the service


def test_it_does_not_wait_for_a_service_that_has_ended() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as service:
        assert not wait_until_ready(service, free_port())


def test_it_gives_up_on_a_service_that_accepts_and_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_module, "START_SECONDS", 0.2)
    with listening() as port, subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as service:
        assert not wait_until_ready(service, port)
        service.kill()


# The Makefile and the README


def makefile_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def code_of_readme() -> str:
    """Fenced blocks and inline code, one piece a line, continued lines joined."""
    text = (ROOT / "README.md").read_text()
    fence = r"^```[^\n]*\n(.*?)^```"
    blocks = re.findall(fence, text, re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`([^`\n]+)`", re.sub(fence, "", text, flags=re.MULTILINE | re.DOTALL))
    return "\n".join([*blocks, *inline]).replace("\\\n", " ")


def commands_of(module: str, text: str) -> set[tuple[str, ...]]:
    """The words of each `python -m module word word` in a text, up to the first option, setting or file."""
    found = re.findall(rf"-m {module}((?: +[a-z][a-z0-9-]*(?=[\s`]|$))*)", text, re.MULTILINE)
    return {tuple(words.split()) for words in found}


def test_make_help_lists_every_target() -> None:
    listed = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert {line.split()[0] for line in listed.splitlines()} == makefile_targets()


def test_targets_in_the_readme_exist() -> None:
    named = set(re.findall(r"(?:^|[\s;&])make(?: +[A-Z_]+=\S+)* +([a-z][a-z-]*)", code_of_readme()))
    assert named <= makefile_targets()


def test_presets_in_the_readme_and_the_makefile_exist() -> None:
    text = code_of_readme() + (ROOT / "Makefile").read_text()
    assert set(re.findall(r"\b(?:sasrec|bert4rec)-[a-z0-9-]+", text)) <= set(preset_names())


def test_trainer_commands_in_the_readme_and_the_makefile_exist() -> None:
    for words in commands_of("trainer", code_of_readme() + "\n" + (ROOT / "Makefile").read_text()):
        command = words[:2] if words[:1] == ("data",) else words[:1]
        result = CliRunner().invoke(trainer_app, [*command, "--help"])
        assert result.exit_code == 0, f"{command}: {result.output}"


def test_service_commands_in_the_readme_exist() -> None:
    for words in commands_of("service", code_of_readme()):
        with pytest.raises(SystemExit) as stop:
            service_main([*words[:1], "--help"])
        assert stop.value.code == 0, words


# The whole demo, on a world that is trained in seconds

ITEMS = range(100, 140)  # "127" is among them: the demo's event names it
PRESET = """\
name: {kind}
data:
  source:
    kind: files
    events: events.csv
    columns: {{user: user, item: item, time: time}}
    items: items.csv
    item_columns: {{id: item, title: title}}
model: {{kind: {kind}, hidden_units: 16, blocks: 1, max_length: 16, dropout: 0.0}}
training: {{epochs: {epochs}, patience: {epochs}, batch_size: 16, lr: 0.01, accelerator: cpu, seed: 1}}
publish: {{refit: false}}
"""


def write_world(folder: Path) -> str:
    """Item i is followed by i + 1, around the circle; users 1..60 saw ten each. The presets to train."""
    start = 1_577_836_800  # 2020-01-01T00:00:00Z
    events = [
        (user, ITEMS[(7 * user + step) % len(ITEMS)], start + 1000 * step + user)
        for user in range(1, 61)
        for step in range(10)
    ]
    with (folder / "events.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("user", "item", "time"), *events])
    with (folder / "items.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("item", "title"), *((i, f"Item {i}") for i in ITEMS)])
    for kind in ("sasrec", "bert4rec"):
        (folder / f"{kind}.yaml").write_text(PRESET.format(kind=kind, epochs=15))
    return "sasrec.yaml bert4rec.yaml"


def processes_with(mark: str) -> list[str]:
    """Command lines of all processes whose environment holds a mark; Linux alone can tell."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue  # gone meanwhile, or another user's
    return found


class Demo:
    """A running `python -m deploy.demo` with its output in a file."""

    def __init__(self, folder: Path, presets: str) -> None:
        self.port = free_port()
        self.log = folder / "demo.log"
        self.mark = f"demo-{uuid.uuid4().hex}"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("UPNEXT_")} | {
            "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "UPNEXT_PORT": str(self.port),
            "UPNEXT_DEMO_PRESETS": presets, "MARK": self.mark,
        }  # fmt: skip
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "deploy.demo"],
                cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def text(self) -> str:
        return self.log.read_text()

    def wait_for(self, words: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while words not in self.text():
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.1)

    def interrupt(self) -> int:
        """What Ctrl-C does: SIGINT to the whole process group; the exit status."""
        os.killpg(self.process.pid, signal.SIGINT)
        return self.process.wait(timeout=120)

    def kill(self) -> None:
        """Leave nothing behind, whatever went wrong."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@contextmanager
def running_demo(folder: Path, presets: str) -> Iterator[Demo]:
    demo = Demo(folder, presets)
    try:
        yield demo
    finally:
        demo.kill()


def run_curl(line: str) -> Any:
    """Do what a printed curl line does, with curl itself where it is installed; the JSON answer."""
    words = shlex.split(line)
    if shutil.which("curl"):
        shown = subprocess.run(
            [*words, "--silent", "--show-error", "--fail-with-body"], capture_output=True, check=False
        )
        assert shown.returncode == 0, shown.stdout + shown.stderr
        return orjson.loads(shown.stdout)
    url = next(word for word in words if word.startswith("http"))
    body = words[words.index("-d") + 1] if "-d" in words else None
    answer = httpx.request("POST" if body else "GET", url, content=body, headers={"Content-Type": "application/json"})
    answer.raise_for_status()
    return answer.json()


def ids(answer: Any) -> list[str]:
    return [item["item_id"] for item in answer["items"]]


@pytest.mark.slow
def test_demo_trains_serves_answers_and_stops(tmp_path: Path) -> None:
    with running_demo(tmp_path, write_world(tmp_path)) as demo:
        demo.wait_for("Ctrl-C stops everything.", seconds=300)
        assert re.search(r"^Ready after \d+ s\.$", demo.text(), re.MULTILINE)
        assert "What next for user 42, by sasrec?\n  1. Item " in demo.text()
        first, post, other = re.findall(r"^ *(curl .+)$", demo.text(), re.MULTILINE)
        before = ids(run_curl(first))
        run_curl(post)
        after = ids(run_curl(first))
        assert after != before
        assert "127" not in after
        assert after[0] == "128"
        assert len(ids(run_curl(other))) == 5
        assert len(processes_with(demo.mark)) >= 3 or not Path("/proc").is_dir()  # demo, service, Redis
        assert demo.interrupt() == 0
        assert processes_with(demo.mark) == []
        assert "Traceback" not in demo.text()
    assert port_is_free(demo.port)

    with running_demo(tmp_path, "sasrec.yaml") as again:
        again.wait_for("Ctrl-C stops everything.", seconds=300)
        assert "=== Training" not in again.text()
        assert ids(run_curl(first.replace(str(demo.port), str(again.port)))) == after
        again.process.terminate()  # what `kill` and a shutdown do
        assert again.process.wait(timeout=120) == 0
        assert processes_with(again.mark) == []


@pytest.mark.slow
def test_demo_stops_with_status_1_when_training_fails(tmp_path: Path) -> None:
    with running_demo(tmp_path, "missing.yaml") as demo:
        assert demo.process.wait(timeout=180) == 1
    assert "error: no preset 'missing.yaml'" in demo.text()
    assert "Starting Redis" not in demo.text()


@pytest.mark.slow
def test_demo_interrupted_while_it_trains_leaves_nothing_behind(tmp_path: Path) -> None:
    with running_demo(tmp_path, write_world(tmp_path)) as demo:
        demo.wait_for("=== Training", seconds=120)
        assert demo.interrupt() == 130
        assert processes_with(demo.mark) == []
    assert not (tmp_path / "bundles" / "CURRENT").exists()
