"""`mamba3 info`: versions, devices, and which implementation of the scan runs where and why. Uses no network."""

import importlib.metadata
import importlib.util
import os
import platform
from typing import TYPE_CHECKING

from rich.table import Table

from mamba3.cli.console import console

if TYPE_CHECKING:
    import torch


def info() -> None:
    """Show versions, devices and which scan implementation runs on each."""
    import torch

    console.print(_versions())
    console.print(_devices())
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    for device in devices:
        console.print(_implementations(device))


def _versions() -> Table:
    table = Table("package", "version", title="Versions", title_justify="left")
    table.add_row("python", platform.python_version())
    for name in ("mamba3", "torch", "triton", "safetensors", "tokenizers", "matplotlib"):
        table.add_row(name, _version(name))
    return table


def _version(name: str) -> str:
    if name == "mamba3":
        import mamba3

        return mamba3.__version__
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        reasons = {
            "triton": "not installed: no fused kernels; it comes with PyTorch's CUDA builds",
            "matplotlib": "not installed: training draws no loss curve (pip install 'mamba3[train]')",
        }
        return reasons.get(name, "not installed")


def _devices() -> Table:
    import torch

    table = Table("device", "what it is", title="Devices", title_justify="left")
    capability = torch.backends.cpu.get_cpu_capability()
    table.add_row(
        "cpu",
        f"{platform.machine()}, {capability}; {torch.get_num_threads()} threads used of {os.cpu_count()} processors",
    )
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        table.add_row(
            f"cuda:{i}",
            f"{card.name}, {card.total_memory / 2**30:.1f} GiB, compute capability {card.major}.{card.minor}, "
            f"{card.multi_processor_count} multiprocessors",
        )
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        reason = "PyTorch finds no driver or device" if built else "this PyTorch is a CPU build"
        table.add_row("cuda", f"not available: {reason}")
    return table


def _implementations(device: "torch.device") -> Table:
    import torch

    from mamba3.ops import implementations

    dtypes = (torch.float32, torch.bfloat16)
    table = Table(
        "implementation",
        *(str(dtype).removeprefix("torch.") for dtype in dtypes),
        title=f"Scan on {device}",
        title_justify="left",
    )
    columns = [implementations(device, dtype) for dtype in dtypes]
    for name in columns[0]:
        table.add_row(name, *(column.get(name, "-") for column in columns))
    return table
