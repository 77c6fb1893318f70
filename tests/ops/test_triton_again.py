"""Launches that are remembered: the kernel that Triton would launch, with the same arguments, and Triton where it is not sure.

Told without a device, in a process of its own (`launches`); tensors lie on the CPU, at every alignment.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")


def test_what_is_remembered_is_what_triton_would_launch_and_what_is_not_sure_goes_through_triton():
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["other kernels"] == [] and told["kinds"] > 30
    assert told["remembered"] == told["calls"]  # the second launch of each did not go through Triton
    assert told["through Triton"] == {
        "the first": 1, "the second": 0, "hooked": 1, "hooked no more": 0, "cleared": 1, "after that": 0,
        "on two devices": 2, "a wide number": 2, "a subclass": 2,
    }  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [1, 4])
def test_remembered_launches_have_the_same_results_to_the_bit(rank, monkeypatch):
    import torch

    from mamba3 import ops
    from mamba3.ops.triton import again
    from tests.ops.cases import Sizes, inputs

    def results(t: int) -> list:
        torch.manual_seed(t)
        s = Sizes(b=2, t=t, r=rank, per_group=2, p=64, n=128, a=32)
        values = {name: v.requires_grad_() for name, v in inputs(s, dtype=torch.bfloat16, device="cuda").items()}
        y = ops.scan(**values, impl="triton").y
        return [y, *torch.autograd.grad(y.float().square().sum(), list(values.values()))]

    lengths = (130, 131, 130, 257, 64)
    expected = [results(t) for t in lengths]
    monkeypatch.setattr(again, "REMEMBERS", True)
    for _ in range(2):
        found = [results(t) for t in lengths]
        assert all(
            torch.equal(a, b)
            for one, other in zip(found, expected, strict=True)
            for a, b in zip(one, other, strict=True)
        )
    assert again._known


def report() -> dict:
    """Launches of one small kernel by every kind of argument, twice each and in changing order, as Triton and we do them."""
    import itertools

    import torch
    from triton import knobs
    from triton.runtime.jit import JITFunction

    from mamba3.ops.triton import again, block
    from tests.ops import launches

    launches.imagine()
    again.REMEMBERS = True
    asked, ran = [], []
    kernel: Any = block.add_norm_kernel
    through, record = JITFunction.run, launches._record

    def run(self, *arguments, **more):
        asked.append(more)
        return through(self, *arguments, **more)

    class Told(launches.Launched):
        """A compiled kernel that notes the launch: which one it was, on what grid, with what."""

        def run(self, x, y, z, stream, function, metadata, launched, enter, leave, *arguments):
            ran.append((self, (x, y, z), [v.data_ptr() if isinstance(v, torch.Tensor) else v for v in arguments]))

    def compile(self, key, *more):
        record(self, key, *more)
        told = self.device_caches[more[1]][0][key] = Told()
        return told

    class_of: Any = JITFunction
    class_of.run, class_of._do_compile = run, compile
    room = torch.empty(4096)
    narrow = torch.empty(4096, dtype=torch.bfloat16)
    tensors = [room[:64], room[1:65], room[4:68], narrow[:64], narrow[1:65], torch.nn.Parameter(room[8:72])]
    cases = []
    for h, y, eps in itertools.product(tensors, (None, *tensors[1:4]), (1e-5, 1, 16, 17)):
        constants = dict(N=64, BLOCK=64, HAS_Y=y is not None, num_warps=1)
        cases.append(((h, y, tensors[0], h, h, eps), constants))
    cases += [((*case[:5], eps), constants | more) for (case, constants) in cases[:3]
              for eps in (32, -5) for more in (dict(N=True), dict(N=1), dict(N=1.0), dict(num_warps=8))]  # fmt: skip

    def launched(run, arguments, constants):
        run(*arguments, **constants)
        return ran.pop()

    others, remembered = [], 0
    for i, (arguments, constants) in enumerate(cases + cases[::-1]):
        grid = (i + 1, 2)
        expected = launched(kernel[grid], arguments, constants)
        asked.clear()
        found = launched(again.launcher(kernel, grid), arguments, constants)
        remembered += i >= len(cases) and not asked
        if found != expected:
            others.append([i, str(found[1:]), str(expected[1:])])

    def asks(arguments=cases[0][0], constants=cases[0][1], times=1) -> int:
        asked.clear()
        for _ in range(times):
            again.launcher(kernel, (1,))(*arguments, **constants)
        return len(asked)

    kinds = len(again._known)
    again._known.clear()
    counts = {"the first": asks(), "the second": asks()}

    def hook(metadata):
        pass

    knobs.runtime.launch_exit_hook.add(hook)
    counts["hooked"] = asks()
    knobs.runtime.launch_exit_hook.remove(hook)
    counts["hooked no more"] = asks()
    kernel.device_caches.clear()
    counts["cleared"], counts["after that"] = asks(), asks()
    h, y, *rest = cases[0][0]
    counts["on two devices"] = asks((h, y, _elsewhere(), *rest[1:]), times=2)
    counts["a wide number"] = asks((*cases[0][0][:5], 2**31), times=2)
    counts["a subclass"] = asks((_Subclass(h), y, *rest), times=2)
    return {
        "other kernels": others, "kinds": kinds, "calls": len(cases), "remembered": remembered, "through Triton": counts
    }  # fmt: skip


def _Subclass(v):
    import torch

    return v.as_subclass(type("Subclass", (torch.Tensor,), {}))


def _elsewhere():
    """Stands for a tensor on another device than the first."""
    import torch

    class There(torch.Tensor):
        def get_device(self):
            return 1

    from mamba3.ops.triton import again

    again.PLAIN |= {There}
    return torch.empty(64).as_subclass(There)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    print(json.dumps(report()))  # noqa: T201
