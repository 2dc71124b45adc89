"""Check, before anything is installed, what pip cannot bring. Runs on any Python 3, without packages."""

import os
import platform
import shutil
import sys
import sysconfig

REMEDY = """Install them, then run make again:
    Debian, Ubuntu    sudo apt-get install g++ make python3-dev python3-venv
    Fedora            sudo dnf install gcc-c++ make python3-devel
    macOS             xcode-select --install
A Redis, where it is missing: sudo apt-get install redis-server, sudo dnf install redis, brew install redis"""


def missing() -> list[str]:
    """What is not there, each with the reason it is needed."""
    found = []
    if sys.version_info < (3, 11):
        found.append(
            f"Python 3.11 or newer (this is {sys.version.split()[0]}; name another with make PYTHON=python3.12)"
        )
    compiler = os.environ.get("CXX")
    if not any(shutil.which(name) for name in (compiler, "c++", "g++", "clang++") if name):
        found.append("a C++ compiler: hnswlib is built from source")
    if not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
        found.append("the headers of Python (Python.h): hnswlib is built from source")
    # The wheel that has one is made for this system alone (pyproject.toml).
    if (sys.platform, platform.machine()) != ("linux", "x86_64") and not shutil.which("redis-server"):
        found.append("a redis-server: pip brings one only on Linux with x86-64")
    return found


if __name__ == "__main__":
    wanted = missing()
    if wanted:
        sys.exit("Upnext needs, and this machine lacks:\n" + "".join(f"  - {w}\n" for w in wanted) + REMEDY)
