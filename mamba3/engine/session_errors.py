"""What a store of sessions refuses, and why."""


class UnknownSession(LookupError):
    """There is no such session, or it is another owner's."""


class SessionBusy(RuntimeError):
    """A request is under way in the session; wait for its end."""


class TooManySessions(RuntimeError):
    """The owner has as many sessions as one may have; delete some."""


class SessionMemoryFull(RuntimeError):
    """The owner's tokens and texts fill its share of memory, and there is no folder to park them in; delete some."""


class SessionNotSaved(RuntimeError):
    """The file of a session could not be written; session and file are as they were before the call."""
