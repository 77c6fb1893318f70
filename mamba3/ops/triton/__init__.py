"""The same stages as `chunked`, fused into Triton kernels; one family for SISO and MIMO, dense and packed.

    coefficients   decays and weights of each chunk
    turns          the angle of each token in its chunk; the chunks' sums along each sequence
    segments       what each segment of a long sequence does to the state, and the state that enters it
    output         the fused pass: rotate, score, read out, skip, gate, pass the state on
    backward       from the inputs alone: states (of each chunk, in both directions of time), gradient_rows, gradient_bc,
                   gradient_dt
    last_token     B and x of a sequence's last token, for the state
    decode         one token between the two projections of a layer, in one kernel; decode_ranks for more than one rank

`channels` and `tiles` hold what several of them load and rotate; `tables` and `windows` which tokens each program works on,
`launch` how large its tiles are, `ahead` compiles a first call's kernels side by side, and `again` launches what was launched
before. What the backward pass's launches share is `call`; what states before and after a sequence add to it, `ends`.

Importing this package does not import triton; `why_not` says whether it can be used.
"""

from __future__ import annotations

import importlib.util
import os

import torch

INSTALLED = importlib.util.find_spec("triton") is not None
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Dtypes in which impl="auto" takes the kernels while gradients are recorded; impl="triton" runs the backward pass in all.
# float32 has no tensor cores and takes more than a minute to compile at N 128.
TRAINS: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)


_new: dict[torch.device, bool] = {}  # asked for many times a layer; PyTorch takes 9 us to say what it knows


def _new_enough(device: torch.device) -> bool:
    """Whether an NVIDIA device has the matrix instructions that the kernels are made of."""
    if device not in _new or torch.compiler.is_compiling():
        new = torch.cuda.get_device_capability(device) >= (8, 0)
        if device.index is None or torch.compiler.is_compiling():  # the current device may change
            return new
        _new[device] = new
    return _new[device]


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run on `device` with inputs of `dtype`; None where they can."""
    if not INSTALLED:
        return "triton is not installed (it comes with torch's CUDA and ROCm builds)"
    if dtype not in DTYPES:
        return f"the kernels take float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    is_gpu = device.type == "cuda"
    if is_gpu and (torch.version.hip is not None or _new_enough(device)):  # the usual answer, without the environment
        return None
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if not is_gpu:
        return f"the kernels need a CUDA or ROCm device, not {device.type}"
    if torch.version.hip is None:
        return "the kernels need compute capability 8.0, for bfloat16 matrix instructions"
    return None
