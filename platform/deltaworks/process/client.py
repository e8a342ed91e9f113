"""Clients of an app's steps: opened once from the app's settings, closed when the app stops."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any

from deltaworks.errors import TerminalError
from deltaworks.process.app import App
from deltaworks.process.declared import ClientFactory


class ClientNotOpenedError(TerminalError):
    """A client of an app could not be opened; mostly a setting is missing."""


class Settings(Mapping[str, Any]):
    """An app's settings, as its clients get them; an unknown name says which are known and where they belong."""

    def __init__(self, values: Mapping[str, Any], *, app: str) -> None:
        self._values = values
        self._app = app

    def __getitem__(self, name: str) -> Any:
        if name not in self._values:
            known = ", ".join(self._values) or "none"
            raise ClientNotOpenedError(
                f"app {self._app!r} has no setting {name!r}; known: {known}. "
                f"Add it to deltaworks.yaml under apps.{self._app}.settings"
            )
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        # Settings may hold tokens.
        return f"Settings({', '.join(self._values)})"


async def open_clients(app: App, stack: AsyncExitStack, settings: Settings) -> dict[str, Any]:
    """Open every client of the app; `stack` closes them in reverse.

    Raises:
        ClientNotOpenedError: a factory raised; those opened before are closed by the stack.
    """
    return {name: await _open(app, factory, stack, settings) for name, factory in app.clients.items()}


async def _open(app: App, factory: ClientFactory, stack: AsyncExitStack, settings: Settings) -> Any:
    try:
        if inspect.isasyncgenfunction(factory.open):
            return await stack.enter_async_context(asynccontextmanager(factory.open)(settings))
        if inspect.isgeneratorfunction(factory.open):
            return stack.enter_context(contextmanager(factory.open)(settings))
        client = factory.open(settings)
        return await client if inspect.isawaitable(client) else client
    except ClientNotOpenedError:
        raise
    except Exception as error:
        raise ClientNotOpenedError(
            f"app {app.name!r}: client {factory.name!r} ({factory.place}) raised {type(error).__name__}; "
            "see the error before this one"
        ) from error
