"""The Talent Service: who the people of the studio's films are, over HTTP.

| request             | answer                                                                       |
|---------------------|------------------------------------------------------------------------------|
| `POST /people`      | up to 500 people by number, in one query; unknown numbers are absent          |
| `GET /people/{id}`  | one person with their films                                                   |
| `GET /health`       | 200 while the database answers                                                |

    python -m studio.talent --port 8401 --dsn postgresql://studio@127.0.0.1:55432/studio

Nothing is cached: an answer is what the database held at the time of the request. When the database
does not answer, so does the service: 503 with `Retry-After`, and a caller loses nothing by waiting.
`/docs` shows the requests in a browser.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import date
from functools import partial
from typing import Annotated, Any, LiteralString

import psycopg
import typer
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from granian.log import LogLevels
from psycopg.rows import dict_row
from pydantic import BaseModel, ConfigDict, Field, field_validator
from rich.console import Console

from deltaworks.errors import DeltaworksError, RetryableError
from deltaworks.serve import worker

logger = logging.getLogger(__name__)

DEFAULT_PORT = 8401
DEFAULT_DSN = "postgresql://studio@127.0.0.1:55432/studio"
MAX_IDS = 500
"""Keeps an answer near 50 kB and a few milliseconds, so that no request delays the others."""
RETRY_AFTER_S = 1
_CONNECTIONS = 4
_STATEMENT_TIMEOUT_MS = 2_000

_PEOPLE: LiteralString = """
    select person_id, name, born_on::text as born_on,
           (select count(distinct movie_id) from credit where credit.person_id = person.person_id) as film_count
    from person
    where person_id = any(%s::bigint[])
    order by person_id
"""
_FILMS: LiteralString = """
    select movie.movie_id, title, year, array_agg(role::text order by role) as roles
    from credit join movie on movie.movie_id = credit.movie_id
    where person_id = %s::bigint
    group by movie.movie_id
    order by year nulls last, title, movie.movie_id
"""

PersonId = Annotated[int, Field(ge=-(2**63), lt=2**63)]
"""Any number PostgreSQL can compare; one that nobody has is unknown, not wrong."""


class DatabaseDownError(RetryableError):
    """The database did not answer."""


class PeopleRequest(BaseModel):
    """Which people to describe; a number may be listed twice."""

    model_config = ConfigDict(extra="forbid")
    person_ids: list[PersonId]

    @field_validator("person_ids", mode="before")
    @classmethod
    def _few_enough(cls, value: object) -> object:
        if isinstance(value, list) and len(value) > MAX_IDS:
            raise ValueError(f"{len(value)} ids; at most {MAX_IDS} in one request, so split it")
        return value


class Person(BaseModel):
    """A person; `film_count` counts films, however many roles they had in each."""

    person_id: int
    name: str
    born_on: date | None
    film_count: int


class People(BaseModel):
    """The people found, by number; fewer than asked for where numbers are unknown."""

    people: list[Person]


class Film(BaseModel):
    """A film somebody worked on."""

    movie_id: int
    title: str
    year: int | None
    roles: list[str]


class PersonWithFilms(Person):
    """A person and their films, oldest first."""

    films: list[Film]


class Connections:
    """A few connections to one database, opened when needed and opened again after they broke.

    Belongs to one event loop. At most `limit` queries run at a time; the others wait their turn.
    """

    def __init__(self, dsn: str, *, limit: int = _CONNECTIONS) -> None:
        self._dsn = dsn
        self._idle: list[psycopg.AsyncConnection[Mapping[str, Any]]] = []
        self._turns = asyncio.Semaphore(limit)

    async def rows(self, query: LiteralString, parameters: Sequence[object] = ()) -> list[Mapping[str, Any]]:
        """Run a query that only reads.

        Raises:
            DatabaseDownError: no connection, or the query was cut off.
        """
        async with self._turns:
            # An idle connection may have died with a restarted server, so a read is tried once more on a new one.
            if self._idle:
                try:
                    return await self._run(self._idle.pop(), query, parameters)
                except psycopg.OperationalError:
                    await self.close()
            try:
                return await self._run(await self._connect(), query, parameters)
            except psycopg.OperationalError as error:
                raise DatabaseDownError(
                    f"cannot read the studio's database: {type(error).__name__}; try again in {RETRY_AFTER_S} s"
                ) from error

    async def close(self) -> None:
        """Close the idle connections."""
        while self._idle:
            await self._idle.pop().close()

    async def _run(
        self,
        connection: psycopg.AsyncConnection[Mapping[str, Any]],
        query: LiteralString,
        parameters: Sequence[object],
    ) -> list[Mapping[str, Any]]:
        try:
            cursor = await connection.execute(query, parameters, prepare=True)
            rows = await cursor.fetchall()
        except BaseException:
            # Cancelled or failed half-way: what state the connection is in is not worth finding out.
            await connection.close()
            raise
        self._idle.append(connection)
        return rows

    async def _connect(self) -> psycopg.AsyncConnection[Mapping[str, Any]]:
        return await psycopg.AsyncConnection.connect(
            self._dsn,
            autocommit=True,
            row_factory=dict_row,
            connect_timeout=2,
            options=f"-c statement_timeout={_STATEMENT_TIMEOUT_MS} -c default_transaction_read_only=on",
        )


def create_app(dsn: str) -> FastAPI:
    """The service as an ASGI app over the database at `dsn`; connects with the first request."""
    connections = Connections(dsn)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        await connections.close()

    app = FastAPI(title="Talent Service", description="People of the studio's films.", lifespan=lifespan)
    app.add_exception_handler(DatabaseDownError, _unavailable)
    app.add_exception_handler(RequestValidationError, _not_valid)

    @app.post("/people", response_model=People)
    async def people(request: PeopleRequest) -> JSONResponse:
        """Describe up to 500 people."""
        # The rows are plain values already; a second validation would double the time of a request.
        return JSONResponse({"people": await connections.rows(_PEOPLE, [request.person_ids])})

    @app.get("/people/{person_id}", response_model=PersonWithFilms)
    async def person(person_id: PersonId) -> JSONResponse:
        """Describe one person, with their films."""
        found = await connections.rows(_PEOPLE, [[person_id]])
        if not found:
            return JSONResponse({"detail": f"no person {person_id}"}, status_code=404)
        return JSONResponse({**found[0], "films": await connections.rows(_FILMS, [person_id])})

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Ask the database for a sign of life."""
        await connections.rows("select 1 as alive")
        return {"status": "ok"}

    return app


def _unavailable(request: Request, error: Exception) -> JSONResponse:
    logger.warning("database down", extra={"path": request.url.path})
    return JSONResponse({"detail": str(error)}, status_code=503, headers={"Retry-After": str(RETRY_AFTER_S)})


def _not_valid(_request: Request, error: Exception) -> JSONResponse:
    # FastAPI's own answer repeats the input, which may be a megabyte of ids.
    faults = error.errors() if isinstance(error, RequestValidationError) else []
    lines = [
        f"{'.'.join(str(part) for part in fault['loc'][1:]) or 'body'}: {fault['msg'].removeprefix('Value error, ')}"
        for fault in faults[:5]
    ]
    return JSONResponse({"detail": "; ".join(lines) or "not valid"}, status_code=422)


# The command line.

_cli = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)


@_cli.command(help=__doc__)
def serve(
    port: Annotated[int, typer.Option(min=1, max=65535, help="TCP port of 127.0.0.1.")] = DEFAULT_PORT,
    dsn: Annotated[str, typer.Option(envvar="STUDIO_DSN", help="Address of the studio's database.")] = DEFAULT_DSN,
) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    worker.serve(partial(create_app, dsn), host="127.0.0.1", port=port, setting="--port", log_level=LogLevels.info)


def main(command: Callable[[], object] = _cli) -> None:
    """Run the command line; an error of ours is one line and exit code 1."""
    try:
        command()
    except DeltaworksError as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
