"""The whole path on MovieLens 100K, in one command: train, publish, load the log, serve, ask.

    make demo

A second start finds the bundle and the log and only serves.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any, Final

PRESETS: Final = ("sasrec-quick", "bert4rec-quick")
PLACES: Final = {"UPNEXT_BUNDLES": "bundles", "UPNEXT_DATABASE_URL": "sqlite:///var/upnext.db"}
"""The demo's own, whatever is set for other work in the same terminal."""
HOST: Final = "127.0.0.1"
USER: Final = "42"
START_SECONDS: Final = 60
STOP_SECONDS: Final = 15


def main() -> int:
    """Run the demo until Ctrl-C; the exit status."""
    port = int(os.environ.get("UPNEXT_PORT", "8000"))
    if not port_is_free(port):
        print(f"port {port} is in use. Stop what listens there, or choose another: UPNEXT_PORT=8001 make demo")
        return 1
    # A shell script that starts this in the background has SIGINT ignored, for all processes below it too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    started = time.monotonic()
    presets = os.environ.get("UPNEXT_DEMO_PRESETS", " ".join(PRESETS)).split()
    if not Path("bundles/CURRENT").is_file():
        step("Training " + " and ".join(presets) + " on MovieLens 100K")
        if not python("trainer", "run", *presets):
            return 1
    step("Loading the training histories into the event log")
    if not python("trainer", "data", "load", *presets[:1]):
        return 1
    step("Starting Redis and the service")
    # Without the log line of each request, which would run into what is printed here.
    environment = {"UPNEXT_LOG_LEVEL": "warning", **os.environ, **PLACES, "UPNEXT_PORT": str(port)}
    service = subprocess.Popen([sys.executable, "-m", "service"], env=environment)
    # Ctrl-C reaches both processes; the service stops what it started, and the demo waits for it.
    signal.signal(signal.SIGTERM, lambda *_: service.terminate())
    try:
        if wait_until_ready(service, port):
            show(port, time.monotonic() - started)
        elif service.poll() is None:
            print(f"The service was not ready after {START_SECONDS} s; its last lines above say why.")
            service.terminate()
            service.wait()
            return 1
        return service.wait()
    except KeyboardInterrupt:
        return service.wait()


def port_is_free(port: int) -> bool:
    """Whether the service can listen there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def step(text: str) -> None:
    """A heading."""
    print(f"\n=== {text}", flush=True)


def python(*words: str) -> bool:
    """Run `python -m words`; whether it went well."""
    process = subprocess.Popen([sys.executable, "-m", *words], env={**os.environ, **PLACES})
    try:
        return process.wait() == 0
    except KeyboardInterrupt:  # it has got the Ctrl-C too, and stops in its own way
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise


def wait_until_ready(service: subprocess.Popen[bytes], port: int) -> bool:
    """Wait for /readyz; False when the service ended or took too long."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and service.poll() is None:
        try:
            ask(port, "/readyz")
        except OSError:  # refused, not ready (HTTP 503) or too slow
            time.sleep(0.1)
        else:
            return True
    return False


def ask(port: int, path: str) -> Any:
    """GET a path of the service."""
    with urllib.request.urlopen(f"http://{HOST}:{port}{path}", timeout=5) as answer:
        return json.load(answer)


def show(port: int, seconds: float) -> None:
    """The first answers, and what to try next."""
    base = f"http://{HOST}:{port}"
    for model in ask(port, "/models")["models"]:
        print(f"\nWhat next for user {USER}, by {model['name']}?")
        for item in ask(port, f"/recommend/{USER}?n=5&model={model['name']}")["items"]:
            print(f"  {item['rank']}. {item['title']}")
    event = json.dumps({"user_id": USER, "item_id": "127", "event_type": "view"})
    print(
        f"""
Ready after {seconds:.0f} s.
  open  {base}/docs

Try, in another terminal:
  curl '{base}/recommend/{USER}?model=sasrec'
  curl -X POST {base}/events -H 'Content-Type: application/json' -d '{event}'
  curl '{base}/recommend/{USER}?model=bert4rec&n=5'

The second one says that user {USER} watched The Godfather: ask the first one again and see the list change.
Ctrl-C stops everything.""",
        flush=True,
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # while training, or twice
        sys.exit(130)
