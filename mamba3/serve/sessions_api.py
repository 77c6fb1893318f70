"""/v1/sessions: conversations by name, which fork, rewind, rest in files and move between servers."""

import asyncio
import tempfile
from collections.abc import Callable
from pathlib import Path as FilePath
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response

from mamba3.engine import SessionInfo
from mamba3.serve.errors import APIError, of_the_caller
from mamba3.serve.protocol import Deleted, ForkSession, NewSession, RewindSession, SessionList, SessionObject
from mamba3.serve.service import Service
from mamba3.serve.who import Owner

Id = Annotated[str, Path(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]
OCTETS = "application/octet-stream"


def session_routes(service: Service) -> APIRouter:
    """The routes."""
    router, store = APIRouter(prefix="/v1/sessions", tags=["sessions"]), service.sessions

    async def do(call: Callable, *arguments) -> SessionInfo:
        """Beside the event loop: files may be read and written."""
        with of_the_caller():
            return await asyncio.to_thread(call, *arguments)

    @router.post("")
    async def create(body: NewSession, owner: Owner) -> SessionObject:
        """A session without a past."""
        return shown(await do(store.create, owner, body.id))

    @router.get("")
    async def list_sessions(owner: Owner) -> SessionList:
        """All sessions of this key."""
        return SessionList(data=[shown(info) for info in await asyncio.to_thread(store.list, owner)])

    @router.post(
        "/import",
        openapi_extra={"requestBody": {"content": {OCTETS: {"schema": {"type": "string", "format": "binary"}}}}},
    )
    async def import_session(
        http: Request,
        owner: Owner,
        id: Annotated[str | None, Query(pattern=r"^[A-Za-z0-9_-]{1,64}$")] = None,
    ) -> SessionObject:
        """Bring in what /export gave, here or elsewhere; checked against its checksum and this model."""
        async with service.place(owner):
            with tempfile.TemporaryDirectory() as scratch:
                path = FilePath(scratch) / "session"
                with path.open("wb") as file:  # not in memory, where it has no bound but the length of a body
                    async for chunk in http.stream():
                        file.write(chunk)
                return shown(await do(store.import_, path, owner, id))

    @router.get("/{id}")
    async def get(id: Id, owner: Owner) -> SessionObject:
        return shown(store.info(owner, id))

    @router.delete("/{id}")
    async def delete(id: Id, owner: Owner) -> Deleted:
        await asyncio.to_thread(store.delete, owner, id)
        return Deleted(id=id)

    @router.post("/{id}/fork")
    async def fork(id: Id, body: ForkSession, owner: Owner) -> SessionObject:
        """Another session with the same past; no state is copied."""
        return shown(await do(store.fork, owner, id, body.id, body.turn))

    @router.post("/{id}/rewind")
    async def rewind(id: Id, body: RewindSession, owner: Owner) -> SessionObject:
        """Forget what came after a turn."""
        return shown(await do(store.rewind, owner, id, body.turn))

    @router.post("/{id}/park")
    async def park(id: Id, owner: Owner) -> SessionObject:
        """Move the session from memory into its file; the next request brings it back."""
        if not store.has_folder:
            raise APIError(
                400, "This server keeps no files of sessions (mamba3 serve --sessions FOLDER).", code="no_folder"
            )
        return shown(await do(store.park, owner, id))

    @router.get("/{id}/export", response_class=Response, responses={200: {"content": {OCTETS: {}}}})
    async def export(id: Id, owner: Owner) -> Response:
        """The session as one file, for /import."""
        async with service.place(owner):
            with of_the_caller():
                data = await asyncio.to_thread(store.export, owner, id)
        headers = {"Content-Disposition": f'attachment; filename="{id}.safetensors"'}
        return Response(data, media_type=OCTETS, headers=headers)

    return router


def shown(info: SessionInfo) -> SessionObject:
    """A session as the API shows it."""
    return SessionObject(id=info.id, tokens=info.tokens, turns=info.turns, bytes=info.nbytes, parked=info.parked)
