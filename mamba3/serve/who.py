"""Whose request it is: a dependency of every route that is not open to all."""

from typing import Annotated

from fastapi import Depends, Header, Request


def owner_of(http: Request, authorization: Annotated[str | None, Header()] = None) -> str:
    """The owner named by the API key (see `Service.owner`)."""
    return http.app.state.service.owner(authorization)


Owner = Annotated[str, Depends(owner_of)]
