"""Where a measurement was taken: device, threads, versions, commit; no host names, users or paths."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "triton", "transformers", "numpy", "mamba-ssm", "tilelang", "flash-linear-attention")
# In an archive of the repository git writes the commit here; in a working tree it is a placeholder.
ARCHIVED = ROOT / "benchmarks" / "commit.txt"


def describe(device: str = "cpu") -> dict[str, Any]:
    """What a reader needs to repeat the measurement on `device`, "cpu" or "cuda", and `load`: how many other processes wanted
    the cores at its start. Packages that are not installed are left out."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": "cpu" if device == "cpu" else torch.cuda.get_device_name(),
        "cpu": _cpu_model(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **_versions()},
        "commit": _commit(),
    }


def slug(environment: dict[str, Any]) -> str:
    """The device in a file's name."""
    if environment["device"] != "cpu":
        return environment["device"].replace(" ", "-")
    return f"{environment['device']}-{environment['threads']}-threads"


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _commit() -> str | None:
    """The commit, with "+changes" when the measured code differs from it; None outside a repository and its archives."""
    archived = ARCHIVED.read_text().strip() if ARCHIVED.is_file() else ""
    if re.fullmatch(r"[0-9a-f]{40}", archived):
        return archived[:12]

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        rooms = ("mamba3/ops", "mamba3/nn", "mamba3/lm", "mamba3/text", "mamba3/engine", "mamba3/serve", "benchmarks")
        measured = [name for name in rooms if (ROOT / name).exists()]
        changed = git("status", "--porcelain", "--", *measured, ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changed else "")
