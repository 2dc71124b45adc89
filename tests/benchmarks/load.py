"""Load on the service from outside.

wrk makes closed loops, in which each connection waits for its answer before it asks again: the most that the service
can do. h2load makes open ones too, in which requests come at a rate of their own, as from many independent callers:
what callers wait at that rate. A closed loop would hide that, since it stops asking while it waits.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

CONNECTIONS: Final = 256
"""Of an open loop: at 1,000 requests a second one is free unless there is no answer for a quarter of a second."""
BATCH: Final = 256
GET: Final = """wrk.format("GET", "/recommend/{users}" .. n % {count})"""
"""One request to the service, in Lua; `users` is the prefix of user ids that end in a number below `count`."""
BULK: Final = (
    'wrk.format("POST", "/recommend/batch", {{["Content-Type"] = "application/json"}}, bulk("{users}", n, {count}))'
)
"""A batch of BATCH users."""
# wrk gives each thread a Lua state of its own; one thread loads two cores' worth of these servers easily.
_SCRIPT = """
local n = 0
local function bulk(users, n, count)
  local names = {}
  for i = 1, %d do names[i] = string.format('"%%s%%d"', users, (n * %d + i) %% count) end
  return '{"users":[' .. table.concat(names, ",") .. "]}"
end
request = function()
  n = n + 1
  return %s
end
done = function(summary, latency)
  io.write(string.format('JSON {"requests":%%d,"seconds":%%f,"bad":%%d,"p50":%%f,"p99":%%f,"max":%%f}\\n',
    summary.requests, summary.duration / 1e6,
    summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.status +
    summary.errors.timeout,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3, latency.max / 1e3))
end
"""


@dataclass(frozen=True)
class Result:
    """What one run of a load generator saw. Times in milliseconds."""

    per_second: float
    p50: float
    p99: float
    bad: int  # answers that were no 200, and broken connections


def closed(url: str, users: str, count: int, *, connections: int, seconds: int, request: str = GET) -> Result:
    """Each connection asks again as soon as it has its answer. `users` is the prefix of user ids `users0`.."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "load.lua"
        script.write_text(_SCRIPT % (BATCH, BATCH, request.format(users=users, count=count)))
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "5s", "-s", str(script), url]
        out = subprocess.run([needed(command[0]), *command[1:]], capture_output=True, text=True, check=True).stdout
    found = json.loads(next(line[5:] for line in out.splitlines() if line.startswith("JSON ")))
    return Result(found["requests"] / found["seconds"], found["p50"], found["p99"], found["bad"])


@dataclass(frozen=True)
class Answers:
    """Each request of an open loop: when it was sent (seconds since the epoch), how it ended, what it took (ms)."""

    asked: float  # requests a second that were to be sent
    sent: Floats  # (R,) ascending
    status: NDArray[np.int64]  # (R,) -1 for a broken connection
    took: Floats  # (R,)

    @property
    def rate(self) -> float:
        """Requests a second that were sent. Far below `asked`, there was no free connection, and times are too good."""
        return (len(self.sent) - 1) / float(self.sent[-1] - self.sent[0])

    def between(self, start: float, stop: float) -> Answers:
        """Those sent in a span of time."""
        kept = (self.sent >= start) & (self.sent < stop)
        return Answers(self.asked, self.sent[kept], self.status[kept], self.took[kept])

    def result(self) -> Result:
        """Of the requests that were answered with a 200."""
        took = self.took[self.status == 200]
        p50, p99 = np.percentile(took, [50, 99]) if len(took) else (np.nan, np.nan)
        share = len(took) / len(self.took)
        return Result(self.rate * share, float(p50), float(p99), len(self.took) - len(took))


def steady(url: str, users: str, count: int, *, rate: float, seconds: float, connections: int = CONNECTIONS) -> Answers:
    """An open loop: requests leave at `rate` a second, evenly, whether or not earlier ones were answered."""
    opening = connections / 1000
    # Each connection has a clock of its own that starts with it: opened 1 ms apart, they do not tick together.
    options = [
        f"-c{connections}", f"--rps={rate / connections:.6f}", "-r1", "--rate-period=1ms",
        f"-n{round(rate * (seconds + opening))}",
    ]  # fmt: skip
    answers = _h2load(url, users, count, options, rate)
    start = float(answers.sent[0]) + opening
    return answers.between(start, start + seconds)


def looped(url: str, users: str, count: int, *, connections: int, seconds: int) -> Answers:
    """A closed loop like `closed`, with each request's time and end: for what changes meanwhile."""
    return _h2load(url, users, count, [f"-c{connections}", f"-D{seconds}"], float("inf"))


def _h2load(url: str, users: str, count: int, options: Sequence[str], asked: float) -> Answers:
    with tempfile.TemporaryDirectory() as folder:
        urls, log = Path(folder) / "urls", Path(folder) / "log"
        urls.write_text("".join(f"{url}/recommend/{users}{n}\n" for n in range(count)))
        command = [needed("h2load"), "--h1", "-t1", *options, f"--log-file={log}", f"-i{urls}"]
        subprocess.run(command, capture_output=True, check=True)
        lines = np.loadtxt(log, np.int64, ndmin=2)  # sent (us since the epoch), status, time to answer (us)
    lines = lines[np.argsort(lines[:, 0], kind="stable")]
    return Answers(asked, lines[:, 0] / 1e6, lines[:, 1], lines[:, 2] / 1e3)


def median(results: Sequence[Result]) -> Result:
    """The median of each figure; faults add up."""
    return Result(
        statistics.median(r.per_second for r in results),
        statistics.median(r.p50 for r in results),
        statistics.median(r.p99 for r in results),
        sum(r.bad for r in results),
    )


def needed(program: str) -> str:
    """The path of a program that a benchmark cannot do without."""
    found = shutil.which(program)
    if found is None:
        package = {"h2load": "nghttp2-client"}.get(program, program)
        raise SystemExit(f"{program} is not installed; on Debian: apt-get install {package}")
    return found
