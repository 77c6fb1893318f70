"""Who is served next: owners take turns at the head of the queue, prompts take turns at being read.

Each owner has a queue of `queue` places: nobody can fill another's. An owner's users take turns when it is the owner's turn.
A step reads at most `step_tokens`: one for each running sequence, the rest for pieces of prompts. A long prompt delays the
others by one piece at a time, and by no more.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable

from mamba3.engine.config import EngineConfig
from mamba3.engine.sequence import Sequence, Stage


class QueueFull(RuntimeError):
    """More requests of an owner wait than its queue holds; try again later."""


class Scheduler:
    """The queue, the prompts being read and the running sequences (row i of the pool is running[i])."""

    def __init__(self, config: EngineConfig):
        self.config = config
        self.prompts: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.waiting = 0  # sequences in all queues; a number, so that other threads may look at it
        self._queues: OrderedDict[str, OrderedDict[str, deque[Sequence]]] = OrderedDict()  # by owner, by user
        self._waiting: Counter[str] = Counter()  # by owner

    def has_room(self, owner: str) -> bool:
        """Whether the owner's queue takes one more."""
        return self._waiting[owner] < self.config.queue

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.prompts or self.running or self._queues)

    def add(self, sequence: Sequence) -> None:
        """A new sequence, behind its owner's others. Raises QueueFull."""
        owner = sequence.request.owner
        if not self.has_room(owner):
            raise QueueFull(
                f"{self._waiting[owner]} requests of yours wait, and the queue holds no more; try again later."
            )
        self._put(sequence)

    def put_back(self, sequence: Sequence, *, first: bool = False) -> None:
        """A sequence that was admitted before and lost its place, or a twin of one that has it."""
        self._put(sequence, first=first)

    def admit(self, fits: Callable[[Sequence], bool] = lambda sequence: True) -> list[Sequence]:
        """Sequences whose turn has come: as many as rows are free; of those with a prompt to read, `prompts` at a time.

        The first one that does not fit waits, and those behind it.
        """
        admitted: list[Sequence] = []
        places = self.config.rows - len(self.running) - len(self.prompts)
        readers = self.config.prompts - len(self.prompts)
        while len(admitted) < places:
            sequence = self._next(readers > 0)
            if sequence is None:
                break
            if not fits(sequence):
                self._return(sequence)
                break
            readers -= sequence.reads
            admitted.append(sequence)
        return admitted

    def _return(self, sequence: Sequence) -> None:
        """Undo `_next`: the sequence is first again, of its user, its owner and all owners, or those behind it could go on
        taking what it waits for."""
        self._put(sequence, first=True)
        self._queues.move_to_end(sequence.request.owner, last=False)
        self._queues[sequence.request.owner].move_to_end(sequence.request.user, last=False)

    def _next(self, may_read: bool) -> Sequence | None:
        """The first sequence of the first owner who has one that can be admitted; owner and user go behind the others."""
        for owner, users in self._queues.items():
            for user, queue in users.items():
                if may_read or not queue[0].reads:
                    sequence = queue[0]
                    users.move_to_end(user)
                    self._queues.move_to_end(owner)
                    self._take_out(sequence)
                    return sequence
        return None

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out of the queue or out of the prompts."""
        if sequence.stage is Stage.PROMPT:
            self.prompts.remove(sequence)
        else:
            self._take_out(sequence)

    def over_quantum(self) -> Sequence | None:
        """The running sequence that has had its row longest, if others wait for one and its quantum is used up."""
        quantum = self.config.quantum
        full = len(self.running) + len(self.prompts) >= self.config.rows
        if quantum is None or not self.running or not full or not self._queues:
            return None
        longest = max(self.running, key=lambda s: s.since_admitted)
        return longest if longest.since_admitted >= quantum else None

    def pieces(self) -> list[tuple[Sequence, int]]:
        """Prompts to read in this step, each with how many tokens. Whoever was served first is last the next time."""
        budget = max(self.config.step_tokens - len(self.running), 1)
        planned = []
        for sequence in self.prompts:
            piece = self._piece(sequence)
            if not self.config.exact:
                piece = min(piece, budget)
            planned.append((sequence, piece))
            budget -= piece
            if budget <= 0:
                break
        self.prompts.rotate(-1)
        return planned

    def _piece(self, sequence: Sequence) -> int:
        """Tokens of the next piece, as far as a chunk or a snapshot ends it."""
        chunk = self.config.prefill_chunk
        end = min(len(sequence.tokens), (sequence.read // chunk + 1) * chunk)
        cut = next((cut for cut in sequence.cuts if cut > sequence.read), end)
        return min(end, cut) - sequence.read

    def _put(self, sequence: Sequence, *, first: bool = False) -> None:
        request = sequence.request
        queue = self._queues.setdefault(request.owner, OrderedDict()).setdefault(request.user, deque())
        if first:
            queue.appendleft(sequence)
        else:
            queue.append(sequence)
        self.waiting += 1
        self._waiting[request.owner] += 1

    def _take_out(self, sequence: Sequence) -> None:
        owner, user = sequence.request.owner, sequence.request.user
        users = self._queues[owner]
        users[user].remove(sequence)
        if not users[user]:
            del users[user]
        if not users:
            del self._queues[owner]
        self.waiting -= 1
        self._waiting -= Counter({owner: 1})  # owners without any are forgotten
