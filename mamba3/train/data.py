"""Which batches a step has, and which of them are this rank's.

A step is `passes` forward passes of `micro_tokens` tokens, numbered over accumulation and ranks: pass j of rank r is number
j · ranks + r. So the step is the same however many ranks share it.
"""

from collections.abc import Iterator

from mamba3.train.config import TrainConfig
from mamba3.train.packing import Batch, Packing, part_of
from mamba3.train.ranks import Ranks
from mamba3.train.rows import Rows, Streams
from mamba3.train.store import Tokens


def resolved_micro_tokens(config: TrainConfig, ranks: Ranks) -> int:
    """Tokens of one forward pass. Raises ValueError where a step does not divide into such passes of all ranks."""
    micro = config.micro_tokens or config.batch_tokens // ranks.data_size
    rows = config.seq_len if config.layout != "packed" else 1
    if micro * ranks.data_size == 0 or config.batch_tokens % (micro * ranks.data_size) or micro % rows:
        unit = f" (whole rows of {rows})" if rows > 1 else ""
        raise ValueError(
            f"batch_tokens = {config.batch_tokens} must be a multiple of micro_tokens = {micro}{unit} times the "
            f"{ranks.data_size} ranks that share the data; change batch_tokens, micro_tokens or the number of ranks."
        )
    return micro


class Data:
    """The batches of training and validation, as this rank reads them."""

    def __init__(self, train: Tokens, val: Tokens | None, config: TrainConfig, ranks: Ranks | None = None):
        self.ranks = ranks or Ranks()
        self.config, self.tokens = config, train
        self.micro_tokens = resolved_micro_tokens(config, self.ranks)
        self.count = config.batch_tokens // self.micro_tokens
        shared = {"seq_len": config.seq_len, "seed": config.seed}
        self.source: Packing | Rows | Streams
        if config.layout == "carry":
            self.source = Streams(train, batch_tokens=config.batch_tokens, **shared)
        else:
            kind = Packing if config.layout == "packed" else Rows
            self.source = kind(train, batch_tokens=self.micro_tokens, **shared)
        self.val: Packing | Rows | None = None
        if val is not None and val.documents:
            kind = Rows if config.layout == "rows" else Packing
            self.val = kind(val, batch_tokens=self.micro_tokens, **shared)

    def numbers(self) -> list[int]:
        """This rank's forward passes of a step."""
        return list(range(self.ranks.data_rank, self.count, self.ranks.data_size))

    def passes(self, step: int) -> list[tuple[int, Batch]]:
        """(number, batch) of this rank's forward passes of step `step`, 0 the first."""
        return [(number, self._pass(step, number)) for number in self.numbers()]

    def held_out(self) -> Iterator[Batch] | None:
        """The validation's batches, always the same, all of them on every rank; None without held-out documents."""
        return None if self.val is None else self.val.sample(self.config.eval_tokens)

    def _pass(self, step: int, number: int) -> Batch:
        if isinstance(self.source, Streams):
            return self.source.batch(step, number, self.count)
        batch = self.source.batch(step * self.count + number)
        if self.ranks.context > 1:
            return part_of(batch, self.ranks.rank % self.ranks.context, self.ranks.context)
        return batch
