"""Calling layers when accelerate has spread the model over devices, memory and disk (device_map).

accelerate brings a module's input and weights to where it computes by wrapping its `forward`. Our layers have other verbs
too, and read the weights of their norms and convolution without calling them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def through(module: nn.Module, f: Callable[..., Any], *args: Any) -> Any:
    """f(*args) behind the module's hook, if it has one."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        return f(*args)
    args, _ = hook.pre_forward(module, *args)
    return hook.post_forward(module, f(*args))


def call(mixer: nn.Module, verb: str, *args: Any) -> Any:
    """One of the mixer's verbs, with the weights at hand that it reads directly: its own and its children's."""
    children: list[Any] = [m for m in mixer.children() if not isinstance(m, nn.Linear) and hasattr(m, "_hf_hook")]
    if not children and not hasattr(mixer, "_hf_hook"):
        return mixer(*args) if verb == "forward" else getattr(mixer, verb)(*args)
    for child in children:
        child._hf_hook.pre_forward(child)
    # Past the wrapper around forward, for `through` does what it does.
    y = through(mixer, lambda *v: getattr(type(mixer), verb)(mixer, *v), *args)
    for child in children:
        child._hf_hook.post_forward(child, None)
    return y
