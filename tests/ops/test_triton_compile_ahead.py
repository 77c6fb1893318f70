"""Kernels compiled side by side before a call launches them: the same kernels, once, and the same errors.

Told without a device, in a process of its own (`launches`), with a compiler that notes what it is asked for.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
CASES = {
    "training": dict(b=8, t=2048), "a sequence in segments": dict(b=1, t=4097), "ranks": dict(b=2, t=100, r=4),
    "a state": dict(b=2, t=100, state=True), "inference": dict(b=8, t=2048, recorded=False),
}  # fmt: skip


def test_what_is_compiled_ahead_is_what_is_launched_and_errors_are_raised_there():
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    failing, later = told.pop("a kernel that does not compile"), told.pop("later lengths, many cores")
    assert len(later) == 6 and all(each == [] for each in later), later
    assert failing["launched"] == failing["alone"] == "gradient_rows_kernel does not fit"
    assert told.keys() == CASES.keys()
    for case, each in told.items():
        assert each["alone"] == each["ahead"] and len(each["ahead"]) >= 5, case
        assert not each["launched"] and not each["again"], case
        assert each["together"], case
        assert each["launchers"] == [len(each["ahead"])] * 2, case


def test_the_first_call_of_a_kind_compiles_ahead_and_no_other(monkeypatch):
    import torch

    from mamba3.ops.triton import ahead
    from mamba3.ops.types import Gate, Inputs, State
    from tests.ops.cases import Sizes, inputs, random_state
    from tests.ops.test_triton import arguments

    monkeypatch.setattr(ahead, "_gone_through", set())
    monkeypatch.setattr(ahead, "cores", lambda: 4)
    first = ahead.first_of_its_kind
    s = Sizes(t=3, a=2)
    here = arguments(inputs(s, dtype=torch.float32))

    class OnGpu:
        """Stands for x on a GPU."""

        def __init__(self, x):
            self.device, self.dtype, self.shape = torch.device("cuda:0"), x.dtype, x.shape

    def there(s, dtype=torch.float32, **more) -> tuple[Inputs, Gate]:
        inp, gate, *_ = arguments(inputs(s, dtype=dtype, **more))
        return inp._replace(x=OnGpu(inp.x)), gate

    state: State = random_state(s, dtype=torch.float32)
    assert not first(*here[:2], None, False, True)
    assert first(*there(s), None, False, True) and not first(*there(s), None, False, True)
    assert not first(*there(Sizes(t=70, b=1, a=2)), None, False, True)  # another length, another batch
    for other in (there(Sizes(t=3, a=1)), there(s, torch.float16), there(s, gate=False), there(s, tick=True)):
        assert first(*other, None, False, True)
    assert first(*there(s), state, False, True)
    assert first(*there(s), None, False, False)
    monkeypatch.setattr(ahead, "cores", lambda: 1)
    assert not first(*there(s), None, True, True)


@pytest.mark.gpu
def test_gradients_are_the_same_to_the_bit_when_kernels_are_compiled_ahead(monkeypatch, tmp_path):
    import torch

    from mamba3 import ops
    from mamba3.ops.triton import ahead, backward, forward
    from tests.ops.cases import Sizes, inputs

    s = Sizes(b=2, t=130, per_group=2, p=64, n=128, a=32)
    values = {name: v.requires_grad_() for name, v in inputs(s, dtype=torch.bfloat16, device="cuda").items()}

    def train(cache):
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / cache))
        for kernel in kernels_of(ahead, backward, forward):
            kernel.device_caches.clear()
        y = ops.scan(**values, impl="triton").y
        return y, *torch.autograd.grad(y.float().square().sum(), list(values.values()))

    monkeypatch.setattr(ahead, "_gone_through", set())
    together = train("together")
    assert ahead._gone_through
    monkeypatch.setattr(ahead, "AsyncCompileMode", None)
    assert all(torch.equal(a, b) for a, b in zip(together, train("alone"), strict=True))


def kernels_of(*modules) -> list:
    """Kernels that these modules launch."""
    return [v for module in modules for v in vars(module).values() if hasattr(v, "device_caches")]


def report() -> dict:
    """Of each case: what a call compiles alone; ahead of one; by its launches after that; ahead a second time."""
    import threading

    import triton.compiler

    asked: list[str] = []
    failing, barrier, together = threading.Event(), threading.Barrier(2, timeout=60), threading.Event()

    def compile(src, target=None, options=None, _env_vars=None):
        if failing.is_set() and src.name == "gradient_rows_kernel":
            raise ValueError(f"{src.name} does not fit")
        asked.append(f"{src.name} {sorted(map(str, src.constants.items()))} {src.signature} {src.attrs}")
        if threading.current_thread() is not threading.main_thread() and not together.is_set():
            barrier.wait()  # both threads get here, or neither goes on
            together.set()
        return Launched()

    triton.compiler.compile = compile
    from mamba3.ops.triton import ahead, backward, forward, library
    from tests.ops import launches
    from tests.ops.launches import H100, Launched, Sizes, arguments, launchers

    launches.imagine(recorded=False)
    ahead.cores = lambda: 2

    def told(b: int, t: int, r: int = 1, state: bool = False, recorded: bool = True) -> dict:
        inp, gate, given = arguments(b, t, Sizes(r=r), sequences=b if state else None)

        def call():
            """What a call compiles, or the error that it raises."""
            asked.clear()
            try:
                y = forward.scan(inp, gate, given, None, limits=H100).y
                if recorded:
                    backward.backward(inp, gate, given, None, y, backward.LastState(), limits=H100)
            except ValueError as error:
                return str(error)
            return sorted(asked)

        def compile_ahead():
            asked.clear()
            library.compile_ahead(inp, gate, given, None, wide=False, recorded=recorded)
            return sorted(asked)

        def forget():
            for kernel in kernels_of(backward, forward):
                kernel.device_caches.clear()

        forget()
        together.clear()
        alone = call()
        forget()
        launchers.clear()
        found = {"alone": alone, "ahead": compile_ahead()}
        made = len(launchers), len(set(map(id, launchers)))
        found |= {"launched": call(), "again": compile_ahead(), "launchers": made}
        return found | {"together": together.is_set()}

    def later(b: int, t: int, r: int = 1, state: bool = False, recorded: bool = True) -> list[str]:
        """What calls of other lengths and batches compile after a first one where there are many cores."""
        for kernel in kernels_of(backward, forward):
            kernel.device_caches.clear()
        ahead.cores = lambda: 8
        inp, gate, given = arguments(b, t, Sizes(r=r), sequences=b if state else None)
        library.compile_ahead(inp, gate, given, None, wide=False, recorded=recorded)
        asked.clear()
        for batch, tokens in ((1, 1), (1, 4097), (1, 16384), (8, 2048), (8, 2049), (32, 100), (1, 131072)):
            inp, gate, given = arguments(batch, tokens, Sizes(r=r), sequences=batch if state else None)
            y = forward.scan(inp, gate, given, None, limits=H100).y
            if recorded:
                backward.backward(inp, gate, given, None, y, backward.LastState(), limits=H100)
        ahead.cores = lambda: 2
        return sorted(asked)

    found = {case: told(**settings) for case, settings in CASES.items()}
    found["later lengths, many cores"] = [later(**each) for each in (*CASES.values(), dict(b=1, t=1, recorded=False))]
    failing.set()
    return found | {"a kernel that does not compile": told(1, 100)}


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    print(json.dumps(report()))  # noqa: T201
