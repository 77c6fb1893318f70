"""What a sweep trains: the models' first weights, their joint forward pass, and one of them as a model of its own.

Folded: Mamba-3 blocks of any setting, by `mamba3.tasks.folded`. Mapped: any Mamba3LM, by torch.vmap. Apart: modules of other
libraries, one after another (`mamba3.tasks.peers`), which a CUDA graph makes affordable.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from mamba3.lm import Mamba3Config, Mamba3LM
from mamba3.tasks import folded, mixing, widened
from mamba3.tasks.captured import Forward, Layout
from mamba3.tasks.stack import Answers


class Entrants(Protocol):
    """m models that share a layout of parameters; weights, exist [m, P] as `Captured` takes them."""

    layout: Layout
    weights: Tensor
    exist: Tensor
    packed: bool  # whether it takes sequences one behind another

    def forward(self, rows: list[int], device: torch.device) -> Forward:
        """The joint forward pass of these models."""
        ...

    def save(self, row: int, named: dict[str, Tensor], folder: Path) -> None:
        """Write one of the models, its parameters given by name."""
        ...


def _seeded(build, seed: int):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


class Folded:
    """Mamba-3 models that differ in switches alone. kernels: where there is one rank, mix by `mamba3.tasks.mixing_kernels` and,
    if packed, train by `mamba3.tasks.packed`."""

    def __init__(self, configs: list[Mamba3Config], seeds: list[int], *, kernels: bool = False, packed: bool = True):
        self.configs, self.sizes = configs, widened.Sizes.of(configs[0])
        self.kernels = kernels and self.sizes.r == 1
        self.packed = packed and self.kernels
        widened.switches(configs, "cpu", torch.float32)  # refuses what cannot share a stack
        wide = []
        for config, seed in zip(configs, seeds, strict=True):
            model = _seeded(lambda config=config: Mamba3LM(config), seed)
            wide.append(widened.widened(config, {k: v.detach() for k, v in model.state_dict().items()}))
        self.layout = Layout({name: v.shape for name, v in sorted(wide[0][0].items())})
        rows = ({name: torch.stack([pair[i][name] for pair in wide]) for name in self.layout.shapes} for i in (0, 1))
        self.weights, self.exist = (self.layout.join(values) for values in rows)

    def forward(self, rows: list[int], device: torch.device) -> Forward:
        which = widened.switches([self.configs[i] for i in rows], device, self.weights.dtype)
        sizes, layout = self.sizes, self.layout

        mixers = folded.Mixers(mixing.mix, mixing.mix_at)
        if self.kernels:
            mixers = folded.Mixers(mixing.mix_by_kernels, None)

        def logits(weights: Tensor, tokens: Tensor, positions: Tensor, longest: int = 0) -> Tensor:
            if longest:
                from mamba3.tasks.packed import answer_logits

                return answer_logits(sizes, which, layout.split(weights), tokens, positions, longest)
            tokens, chunks = folded.in_chunks(tokens, sizes.r)
            return folded.answer_logits(sizes, which, layout.split(weights), tokens, positions, chunks, mixers)

        return logits

    def save(self, row: int, named: dict[str, Tensor], folder: Path) -> None:
        weights = widened.narrowed(self.configs[row], {k: v.detach().cpu() for k, v in named.items()})
        Mamba3LM.from_weights(self.configs[row], weights).save_pretrained(folder)


class Mapped:
    """Any Mamba3LM of one configuration."""

    packed = False

    def __init__(self, config: Mamba3Config, seeds: list[int]):
        models = [_seeded(lambda: Mamba3LM(config), seed) for seed in seeds]
        self.config, self.template = config, Answers(models[0])
        named = [{k: v.detach() for k, v in model.named_parameters()} for model in models]
        self.layout = Layout({k: v.shape for k, v in named[0].items()})
        self.weights = self.layout.join({k: torch.stack([n[k] for n in named]) for k in named[0]})
        self.exist = torch.ones_like(self.weights)

    def forward(self, rows: list[int], device: torch.device) -> Forward:
        template = self.template.to(device)
        # The fused attention has no rule for torch.vmap everywhere; the plain formula has.
        plain = "attention" in self.config.layers

        def one(parameters: dict[str, Tensor], tokens: Tensor, positions: Tensor) -> Tensor:
            named = {f"model.{k}": v for k, v in parameters.items()}
            return functional_call(template, named, (tokens, positions.unsqueeze(1)))[:, 0]

        layout = self.layout

        def logits(weights: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
            with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext(), torch.enable_grad():
                return torch.vmap(one, in_dims=(0, None, None))(layout.split(weights), tokens, positions)

        return logits

    def save(self, row: int, named: dict[str, Tensor], folder: Path) -> None:
        Mamba3LM.from_weights(self.config, {k: v.detach().cpu().clone() for k, v in named.items()}).save_pretrained(
            folder
        )


class Apart:
    """Modules of another library: (tokens [b, t], positions [b]) to logits [b, v], built anew for each seed."""

    packed = False

    def __init__(self, build, seeds: list[int]):
        models: list[nn.Module] = [_seeded(build, seed) for seed in seeds]
        self.template = models[0]
        named = [{k: v.detach().float() for k, v in model.named_parameters()} for model in models]
        self.layout = Layout({k: v.shape for k, v in named[0].items()})
        self.weights = self.layout.join({k: torch.stack([n[k] for n in named]) for k in named[0]})
        self.exist = torch.ones_like(self.weights)

    def forward(self, rows: list[int], device: torch.device) -> Forward:
        template, layout = self.template.to(device), self.layout

        def logits(weights: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
            parameters = layout.split(weights)
            each = [{k: v[i] for k, v in parameters.items()} for i in range(len(rows))]
            return torch.stack([functional_call(template, named, (tokens, positions)) for named in each])

        return logits

    def save(self, row: int, named: dict[str, Tensor], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.detach().cpu().contiguous() for k, v in named.items()}, folder / "model.safetensors")
