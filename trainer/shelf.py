"""The folder of bundles: what is in it, which one is live, the way back to an older one, and what may go."""

from __future__ import annotations

import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

from shared.bundle import (
    VERSION_PATTERN,
    Bundle,
    BundleError,
    Manifest,
    current_version,
    point_current,
    previous_version,
    read_manifest,
)

METRIC = "ndcg@10"


@dataclass(frozen=True)
class Kept:
    """A bundle in the folder."""

    path: Path
    manifest: Manifest

    @property
    def version(self) -> str:
        """The bundle's name."""
        return self.manifest.version

    @property
    def size(self) -> int:
        """Bytes, as the manifest has them."""
        return sum(entry.size for entry in self.manifest.files.values())


def kept(bundles: Path) -> list[Kept]:
    """All bundles with a readable manifest, the newest first. What else lies in the folder is passed over."""
    found = []
    for path in bundles.iterdir() if bundles.is_dir() else ():
        if not path.is_dir() or path.is_symlink() or not VERSION_PATTERN.fullmatch(path.name):
            continue
        try:
            one = Kept(path, read_manifest(path))
        except BundleError:
            continue
        if one.version == path.name:
            found.append(one)
    return sorted(found, key=lambda one: (one.manifest.created, one.version), reverse=True)


def listing(bundles: Path) -> str:
    """A line for each bundle: version, live or the one before, when it was made, size, and how its models measured."""
    current, previous = current_version(bundles), previous_version(bundles)
    rows = [("version", "", "made", "MB", f"models ({METRIC} through the bundle)")]
    for one in kept(bundles):
        role = "live" if one.version == current else "before" if one.version == previous else ""
        scores = {n: info.metrics.get("bundle", {}).get(METRIC) for n, info in one.manifest.models.items()}
        models = ", ".join(f"{name} {score:.4f}" if score is not None else name for name, score in scores.items())
        rows.append((one.version, role, one.manifest.created, f"{one.size / 1e6:.1f}", models))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join("  ".join((*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[4])) for row in rows)


def roll_back(bundles: Path, version: str | None = None) -> str:
    """Make an older bundle live, by default the one that was live before; its version.

    Raises BundleError, and changes nothing, where there is none or it does not load.
    """
    current = current_version(bundles)
    version = version or previous_version(bundles)
    if version is None or version == current:
        raise BundleError(f"no other bundle is known to have been live in {bundles}; name one of `bundles`")
    if not VERSION_PATTERN.fullmatch(version):
        raise BundleError(f"{version[:100]!r} is no bundle version")
    Bundle.load(bundles / version)
    point_current(bundles, version)
    return version


def retire(bundles: Path, keep: int) -> list[str]:
    """Remove all but `keep` bundles: the live one, the one live before, and the newest others; what was removed.

    A service that still answers from one of these goes on: what it has read is in memory, and files that it has mapped
    stay until it lets go of them (on a network file system that may be otherwise: keep more there).
    """
    stay = [v for v in (current_version(bundles), previous_version(bundles)) if v is not None]
    others = [one for one in kept(bundles) if one.version not in stay]
    present = sum((bundles / version).is_dir() for version in set(stay))
    removed = others[max(keep - present, 0) :]
    for one in removed:
        # First out of sight, so that nobody finds half of it.
        aside = bundles / f".removed-{secrets.token_hex(4)}"
        one.path.rename(aside)
        shutil.rmtree(aside)
    return [one.version for one in removed]
