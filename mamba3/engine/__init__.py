"""The inference engine: continuous batching over states of constant size, a prefix cache, sessions (docs/serving.md)."""

from mamba3.engine.config import EngineConfig
from mamba3.engine.draft import ModelDraft, NGramDraft, Proposer
from mamba3.engine.engine import Engine
from mamba3.engine.llm import LLM, Completion, Result
from mamba3.engine.request import Finish, Output, Request, SamplingParams, TokenLogprob
from mamba3.engine.scheduler import QueueFull
from mamba3.engine.session import Session, Speech
from mamba3.engine.session_errors import (
    SessionBusy,
    SessionMemoryFull,
    SessionNotSaved,
    TooManySessions,
    UnknownSession,
)
from mamba3.engine.session_files import SessionInfo
from mamba3.engine.sessions import Lease, SessionStore

__all__ = [
    "LLM", "Completion", "Engine", "EngineConfig", "Finish", "Lease", "ModelDraft", "NGramDraft", "Output", "Proposer",
    "QueueFull", "Request", "Result", "SamplingParams", "Session", "SessionBusy", "SessionInfo", "SessionMemoryFull",
    "SessionNotSaved", "SessionStore", "Speech", "TokenLogprob", "TooManySessions", "UnknownSession",
]  # fmt: skip
