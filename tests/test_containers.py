"""The images and the compose file, as far as they can be checked without an engine: lint, schema, and every name."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from typer.testing import CliRunner

from service.__main__ import main as service_main
from service.main import create_app
from service.settings import PREFIX, Settings
from trainer.__main__ import app as trainer_app
from trainer.__main__ import configs_of
from trainer.sources.config import SqlSource

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILES = ("Dockerfile.service", "Dockerfile.trainer")
COMPOSE = ROOT / "docker-compose.yml"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def tool(name: str) -> str:
    """A program that pip put beside this Python."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    assert found, f"{name} is missing; it comes with the extra `dev`"
    return found


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """(keyword, rest) of each instruction, with continued lines joined and comments left out."""
    lines = [line for line in (ROOT / dockerfile).read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(words[0], words[1]) for line in joined.splitlines() if len(words := line.split(maxsplit=1)) == 2]


def all_of(dockerfile: str, keyword: str) -> list[str]:
    """What follows each use of one keyword."""
    return [rest for found, rest in instructions(dockerfile) if found == keyword]


def last_stage(dockerfile: str) -> list[tuple[str, str]]:
    """The instructions of the image that is shipped."""
    steps = instructions(dockerfile)
    start = max(number for number, (keyword, _) in enumerate(steps) if keyword == "FROM")
    return steps[start:]


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())
    return loaded


# The images


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_hadolint_finds_nothing_and_ignores_nothing(dockerfile: str) -> None:
    result = subprocess.run(
        [tool("hadolint"), "--no-color", str(ROOT / dockerfile)], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (0, "")
    assert "hadolint ignore" not in (ROOT / dockerfile).read_text()


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_base_images_are_one_python_by_its_full_version(dockerfile: str) -> None:
    images = {rest.split()[0] for rest in all_of(dockerfile, "FROM")}
    assert all(re.fullmatch(r"python:3\.11\.\d+(-slim)?-bookworm", image) for image in images)
    assert {all_of(d, "FROM")[-1] for d in DOCKERFILES} == {all_of(dockerfile, "FROM")[-1]}
    assert "-slim-" in all_of(dockerfile, "FROM")[-1]


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path out of the build context: the last rule that matches it, or a folder of it."""
    parts = path.split("/")
    prefixes = ["/".join(parts[: n + 1]) for n in range(len(parts))]
    verdict = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not (rule := line.strip()) or rule.startswith("#"):
            continue
        pattern = rule.removeprefix("!")
        if any(_matches(prefix, pattern) for prefix in prefixes):
            verdict = not rule.startswith("!")
    return verdict


def _matches(path: str, pattern: str) -> bool:
    if pattern.startswith("**/"):
        return fnmatchcase(path.rsplit("/", 1)[-1], pattern[3:])
    parts, wanted = path.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(fnmatchcase(p, w) for p, w in zip(parts, wanted, strict=True))


def copied(dockerfile: str) -> list[str]:
    """Paths of the build context that an image is made of."""
    sources = [source for rest in all_of(dockerfile, "COPY") for source in rest.split()[:-1]]
    bound = [m for rest in all_of(dockerfile, "RUN") for m in re.findall(r"--mount=type=bind,source=([^, ]+)", rest)]
    return sources + bound


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_what_is_copied_exists_and_reaches_the_build(dockerfile: str) -> None:
    assert copied(dockerfile)
    for source in copied(dockerfile):
        path = ROOT / source
        assert path.exists(), source
        files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file() and f.suffix != ".pyc"]
        assert files
        assert [f for f in files if ignored(f.relative_to(ROOT).as_posix())] == []


@pytest.mark.parametrize(
    "path", [".git/config", ".venv/bin/python", ".env", "data/x.csv", "bundles/CURRENT", "tests/worlds.py",
             "service/__pycache__/main.cpython-311.pyc"],
)  # fmt: skip
def test_nothing_else_reaches_the_build(path: str) -> None:
    assert ignored(path)


def test_each_image_holds_its_own_side_alone() -> None:
    assert {"service", "shared"} == {c for c in copied("Dockerfile.service") if (ROOT / c).is_dir()}
    assert {"trainer", "shared"} == {c for c in copied("Dockerfile.trainer") if (ROOT / c).is_dir()}


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_extras_and_the_distribution_have_their_names_from_pyproject(dockerfile: str) -> None:
    runs = " ".join(all_of(dockerfile, "RUN"))
    found = set(re.findall(r"'([\w.]+)\[([\w,]+)\]'", runs))
    own = dockerfile.removeprefix("Dockerfile.")
    assert found == {(".", own), (PYPROJECT["project"]["name"], own)}
    assert own in PYPROJECT["project"]["optional-dependencies"]


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_hnswlib_is_built_for_any_processor(dockerfile: str) -> None:
    builds = [run for run in all_of(dockerfile, "RUN") if re.search(r"/wheels hnswlib\b", run)]
    assert len(builds) == 1
    assert builds[0].startswith("HNSWLIB_NO_NATIVE=1 ")


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_the_shipped_image_installs_ready_wheels_and_has_no_compiler(dockerfile: str) -> None:
    runs = " ".join(rest for keyword, rest in last_stage(dockerfile) if keyword == "RUN")
    assert "pip install --no-cache-dir --no-index --find-links /wheels --constraint " in runs
    assert "apt-get" not in runs


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_it_runs_as_one_and_the_same_fixed_user(dockerfile: str) -> None:
    steps = last_stage(dockerfile)
    assert [rest for keyword, rest in steps if keyword == "USER"] == ["10001:10001"]
    runs = " ".join(rest for keyword, rest in steps if keyword == "RUN")
    assert "useradd --uid 10001 --user-group" in runs
    assert "install --directory --owner 10001 --group 10001 /app " in runs
    # After USER nothing is run, so nothing was made by root that this user must write.
    assert "RUN" not in [keyword for keyword, _ in steps[[k for k, _ in steps].index("USER") :]]


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_onnxruntime_reports_nothing_from_its_first_import_on(dockerfile: str) -> None:
    steps = last_stage(dockerfile)
    first_import = next(n for n, (keyword, rest) in enumerate(steps) if keyword == "RUN" and "python -c" in rest)
    assert ("ENV", "ORT_DISABLE_TELEMETRY=1") in steps[:first_import]


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_the_entry_point_is_a_module_of_the_image(dockerfile: str) -> None:
    command = json.loads(all_of(dockerfile, "ENTRYPOINT")[0])
    assert command == ["python", "-m", dockerfile.removeprefix("Dockerfile.")]
    assert (ROOT / command[2] / "__main__.py").is_file()


def test_the_service_is_asked_for_its_health_where_it_answers() -> None:
    check = all_of("Dockerfile.service", "HEALTHCHECK")[0]
    options, _, command = check.partition(" CMD ")
    assert "--timeout=3s" in options
    arguments = json.loads(command)
    assert arguments[:2] == ["python", "-c"]
    compile(arguments[2], "HEALTHCHECK", "exec")
    assert "'/livez'" in arguments[2]
    assert "/livez" in create_app(Settings()).openapi()["paths"]
    assert all_of("Dockerfile.service", "EXPOSE") == [str(Settings.model_fields["port"].default)]


def upnext_names(text: str) -> set[str]:
    return set(re.findall(rf"\b{PREFIX}[A-Z_]+", text))


KNOWN_NAMES = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}


@pytest.mark.parametrize("path", [*DOCKERFILES, "docker-compose.yml", "deploy/compose.env.example"])
def test_environment_names_are_settings_of_the_service(path: str) -> None:
    assert upnext_names((ROOT / path).read_text()) <= KNOWN_NAMES


# What the service needs, followed through the metadata of what is installed


def reached(requirements: list[str]) -> set[str]:
    """Names of all distributions that installing `requirements` brings, on this platform."""
    seen: set[tuple[str, str]] = set()
    waiting = [(Requirement(text), "") for text in requirements]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        for wanted in {"", *requirement.extras}:
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                waiting += [(Requirement(text), wanted) for text in requires(name) or []]
    return {name for name, _ in seen}


def needs_of(extra: str) -> set[str]:
    project = PYPROJECT["project"]
    return reached(project["dependencies"] + project["optional-dependencies"][extra])


def test_no_way_leads_from_the_service_to_torch() -> None:
    assert {"torch", "pytorch-lightning"} <= needs_of("trainer")
    assert {"fastapi", "starlette", "onnxruntime", "hiredis"} <= needs_of("service")
    assert not {"torch", "pytorch-lightning", "polars", "onnx", "tensorboard"} & needs_of("service")


def test_no_way_leads_from_the_trainer_to_fastapi() -> None:
    assert not {"fastapi", "uvicorn", "redis"} & needs_of("trainer")


@pytest.mark.parametrize("extra", ["service", "trainer"])
def test_everything_an_image_installs_is_pinned(extra: str) -> None:
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    missing = needs_of(extra) - {canonicalize_name(name) for name in pinned}
    assert missing <= {"setuptools"}  # pip-compile leaves it out as unsafe to pin


def test_only_torch_is_taken_from_the_index_of_torch() -> None:
    uses = [
        part for run in all_of("Dockerfile.trainer", "RUN") for part in run.split("&&") if "TORCH_INDEX_URL" in part
    ]
    assert len(uses) == 1
    assert "--no-deps" in uses[0]
    assert uses[0].split()[-1] == "torch"


# The compose file


def test_compose_has_the_form_of_the_specification() -> None:
    command = [tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(COMPOSE)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def mounts(service: dict[str, Any]) -> Iterator[list[str]]:
    for text in service.get("volumes", []):
        yield text.split(":")


def test_volumes_are_declared_and_used(compose: dict[str, Any]) -> None:
    used = {mount[0] for service in compose["services"].values() for mount in mounts(service)}
    assert used == set(compose["volumes"])


@pytest.mark.parametrize("side", ["service", "trainer"])
def test_volumes_are_mounted_on_folders_that_the_image_gave_to_its_user(compose: dict[str, Any], side: str) -> None:
    made = re.findall(r"install --directory --owner 10001 --group 10001 ([^&]+)", " ".join(
        all_of(f"Dockerfile.{side}", "RUN")))[0].split()  # fmt: skip
    targets = [mount[1] for mount in mounts(compose["services"][side])]
    assert targets
    assert set(targets) <= set(made)


def test_the_service_reads_what_the_trainer_publishes(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert ["bundles", "/app/bundles", "ro"] in list(mounts(services["service"]))
    assert ["bundles", "/app/bundles"] in list(mounts(services["trainer"]))
    assert services["service"]["environment"]["UPNEXT_BUNDLES"] == "/app/bundles"
    assert services["trainer"]["profiles"] == ["train"]


def test_services_wait_for_services_that_can_tell(compose: dict[str, Any]) -> None:
    services = compose["services"]
    for service in services.values():
        for name, need in service.get("depends_on", {}).items():
            assert need["condition"] != "service_healthy" or "healthcheck" in services[name]
    assert services["service"]["depends_on"] == {
        "redis": {"condition": "service_started"},
        "postgres": {"condition": "service_healthy"},
        "migrate": {"condition": "service_completed_successfully"},
    }


def test_images_are_pinned_or_built_here(compose: dict[str, Any]) -> None:
    built = {service["image"] for service in compose["services"].values() if "build" in service}
    for service in compose["services"].values():
        assert service["image"] in built or re.search(r":\d[\w.]*-alpine$", service["image"])
        if "build" in service:
            assert service["build"]["dockerfile"] in DOCKERFILES
        elif service["image"] in built:
            assert service["pull_policy"] == "never"


@pytest.mark.parametrize("name", ["service", "migrate", "trainer", "redis", "postgres"])
def test_a_container_may_do_little(compose: dict[str, Any], name: str) -> None:
    service = compose["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    if name in ("redis", "postgres"):
        assert service["user"] == name  # the others have a user of their own in the image
    else:
        assert service["tmpfs"] == ["/tmp"]


def test_compose_asks_for_a_key(compose: dict[str, Any]) -> None:
    assert compose["services"]["service"]["environment"]["UPNEXT_API_KEY"].startswith("${UPNEXT_API_KEY:?")


def test_only_the_service_is_reachable_and_from_this_machine_alone(compose: dict[str, Any]) -> None:
    ports = {name: service["ports"] for name, service in compose["services"].items() if "ports" in service}
    assert ports == {"service": ["127.0.0.1:${UPNEXT_PORT:-8000}:8000"]}


def test_addresses_name_services_of_the_file(compose: dict[str, Any]) -> None:
    for name in ("service", "migrate", "trainer"):
        environment = compose["services"][name]["environment"]
        assert re.fullmatch(
            r"postgresql://upnext:\$\{POSTGRES_PASSWORD:\?[^}]+\}@postgres/upnext", environment["UPNEXT_DATABASE_URL"]
        )
    assert compose["services"]["service"]["environment"]["UPNEXT_REDIS_URL"] == "redis://redis:6379"
    given = compose["services"]["postgres"]["environment"]
    assert (given["POSTGRES_USER"], given["POSTGRES_DB"]) == ("upnext", "upnext")
    assert given["POSTGRES_PASSWORD"].startswith("${POSTGRES_PASSWORD:?")


def test_every_variable_that_a_person_can_set_is_in_the_example() -> None:
    named = set(re.findall(r"\$\{([A-Z_]+):", COMPOSE.read_text()))
    example = (ROOT / "deploy" / "compose.env.example").read_text()
    assert named == set(re.findall(r"^#?([A-Z_]+)=", example, re.MULTILINE))


def test_redis_keeps_nothing_and_drops_the_least_used(compose: dict[str, Any]) -> None:
    command = " ".join(word or repr(word) for word in compose["services"]["redis"]["command"])
    assert "--save '' --appendonly no" in command
    assert "--maxmemory 256mb --maxmemory-policy allkeys-lru" in command


def assert_trainer_knows(words: list[str]) -> None:
    """Its command exists, and what follows are presets and settings."""
    command = words[:2] if words[0] == "data" else words[:1]
    result = CliRunner().invoke(trainer_app, [*command, "--help"])
    assert result.exit_code == 0, result.output
    if presets := words[len(command) :]:
        configs_of(presets)


def test_commands_exist(compose: dict[str, Any]) -> None:
    assert_trainer_knows(compose["services"]["trainer"]["command"])
    with pytest.raises(SystemExit) as stop:
        service_main([*compose["services"]["migrate"]["command"], "--help"])
    assert stop.value.code == 0


def test_commands_in_its_comments_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPNEXT_DATABASE_URL", "postgresql://upnext:secret@postgres/upnext")
    comments = "\n".join(line.lstrip("# ") for line in COMPOSE.read_text().splitlines() if line.startswith("#"))
    text = comments.replace("\\\n", " ")
    commands = re.findall(r"^docker compose run --rm trainer +(\w[^#\n]+)", text, re.MULTILINE)
    found = [[word.strip("'") for word in command.split()] for command in commands]
    for words in found:
        assert_trainer_knows(words)
    retrain = next(words for words in found if "data.source.kind=sql" in words)
    source = configs_of(retrain[1:])[0].data.source
    assert isinstance(source, SqlSource)
    assert source.url.get_secret_value() == "postgresql://upnext:secret@postgres/upnext"
