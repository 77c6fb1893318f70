"""Documents to tokens on every core: by the tokenizer's own threads, or by processes, in the documents' order either way."""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context

import numpy as np
from tokenizers import Tokenizer

from mamba3.train.corpus import Document
from mamba3.train.tokenizer import encode

Group = list[tuple[Document, bool]]
# Starting processes takes seconds; below this many bytes the tokenizer's threads are done sooner.
_MANY_BYTES = 64 << 20


def encoded_groups(
    groups: Iterable[Group], tokenizer: Tokenizer, workers: int, size: int
) -> Iterator[tuple[Group, list[np.ndarray]]]:
    """Each group with the tokens of its documents. `size`: bytes in all; workers 0 chooses by it."""
    workers = workers or (1 if size < _MANY_BYTES else os.cpu_count() or 1)
    if workers == 1:
        for group in groups:
            yield group, encode(tokenizer, [document.text for document, _ in group])
        return
    waiting: deque[tuple[Group, Future[list[np.ndarray]]]] = deque()
    remaining = iter(groups)
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_begin, initargs=(tokenizer.to_str(),)
    ) as pool:
        while True:
            for group in islice(remaining, 2 * workers - len(waiting)):  # so many groups are in memory, not all
                waiting.append((group, pool.submit(_encode, [document.text for document, _ in group])))
            if not waiting:
                return
            group, future = waiting.popleft()
            yield group, future.result()


def _begin(tokenizer: str) -> None:
    global _TOKENIZER
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core a process
    _TOKENIZER = Tokenizer.from_str(tokenizer)


def _encode(texts: list[str]) -> list[np.ndarray]:
    return encode(_TOKENIZER, texts)
