"""An httpx transport for enrichments: many calls at once to one service, over connections that are kept.

    call ──► idle connection of that service, the one used last ──► HTTP/1.1 (h11) ──► kept for the next call
             none: open one, at most `max_connections`                                 or closed

httpx's own pool looks at every connection it has whenever a call begins or ends, so its cost grows with their number:
256 connections took more of a core than everything else that an enrichment does. This one looks at one.

A connection that the service closed while it was idle is noticed before a call is sent, as far as one can; a call that
was sent is never sent again here, because only the app's `retry` knows whether it may be.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import h11
import httpx

_READ_BYTES = 64 * 1024
_Origin = tuple[str, str, int]


def http_client(base_url: str = "", *, max_connections: int = 256, **options: Any) -> httpx.AsyncClient:  # Any: httpx's
    """An `httpx.AsyncClient` over such connections; `options` are httpx's. Close it, or use it in `async with`."""
    verify = options.pop("verify", True)
    return httpx.AsyncClient(
        base_url=base_url, transport=Connections(max_connections=max_connections, verify=verify), **options
    )


class Connections(httpx.AsyncBaseTransport):
    """HTTP/1.1 over TCP or TLS, without proxies. One event loop.

    At most `max_connections` are open; further calls wait for one, as long as the call's `pool` timeout says. An idle
    one is closed when it is older than `keep_s`. `verify`: certificates are checked by this context, by the system's
    (true), or not at all.
    """

    def __init__(
        self, *, max_connections: int = 256, keep_s: float = 5.0, verify: ssl.SSLContext | bool = True
    ) -> None:
        self._turns = asyncio.Semaphore(max_connections)
        self._keep_s = keep_s
        self._verify = verify
        self._idle: dict[_Origin, list[_Connection]] = {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request; the connection is free again when the response is read or closed.

        Raises:
            httpx.TransportError: no connection, no answer in time, or an answer that is no HTTP.
        """
        timeouts: Mapping[str, float | None] = request.extensions.get("timeout", {})
        origin = _origin(request.url)
        with _faults(httpx.PoolTimeout, request):
            async with asyncio.timeout(timeouts.get("pool")):
                await self._turns.acquire()
        connection: _Connection | None = None
        try:
            connection = self._take_idle(origin) or await self._open(origin, request, timeouts.get("connect"))
            head = await connection.ask(request, timeouts)
        except BaseException:
            self._end(origin, connection, is_broken=True)
            raise
        return httpx.Response(
            head.status_code,
            headers=head.headers.raw_items(),
            stream=_Body(self, origin, connection, request, timeouts.get("read")),
            extensions={"http_version": b"HTTP/" + head.http_version, "reason_phrase": head.reason},
        )

    async def aclose(self) -> None:
        """Close every idle connection; those in use close when they are free."""
        self._keep_s = 0.0
        idle, self._idle = self._idle, {}
        for connections in idle.values():
            for connection in connections:
                connection.close()
                await connection.wait_closed()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None = None,
        exc_value: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        await self.aclose()

    def _take_idle(self, origin: _Origin) -> "_Connection | None":
        idle = self._idle.get(origin, [])
        while idle:
            # The last one used is the least likely to have been closed, and the others may grow old and go.
            connection = idle.pop()
            if connection.is_fresh(self._keep_s):
                return connection
            connection.close()
        return None

    async def _open(self, origin: _Origin, request: httpx.Request, timeout_s: float | None) -> "_Connection":
        scheme, host, port = origin
        context = self._context() if scheme == "https" else None
        with _faults(httpx.ConnectTimeout, request, otherwise=httpx.ConnectError):
            async with asyncio.timeout(timeout_s):
                name = request.extensions.get("sni_hostname") or host
                streams = await asyncio.open_connection(
                    host, port, ssl=context, server_hostname=name if context else None, limit=_READ_BYTES
                )
        return _Connection(*streams)

    def _context(self) -> ssl.SSLContext:
        if not isinstance(self._verify, ssl.SSLContext):
            self._verify = httpx.create_ssl_context(verify=self._verify)
        return self._verify

    def _end(self, origin: _Origin, connection: "_Connection | None", *, is_broken: bool) -> None:
        self._turns.release()
        if connection is None:
            return
        if is_broken or self._keep_s <= 0 or not connection.begin_next():
            connection.close()
            return
        idle = self._idle.setdefault(origin, [])
        idle.append(connection)
        # Sorted by age, so the first ones are those that are too old; looking at one a call keeps up.
        if not idle[0].is_fresh(self._keep_s):
            idle.pop(0).close()


class _Connection:
    """One connection, for one call at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._protocol = h11.Connection(h11.CLIENT)
        self._free_since_s = 0.0

    def is_fresh(self, keep_s: float) -> bool:
        """Whether it can take a call, as far as is known."""
        is_young = asyncio.get_running_loop().time() - self._free_since_s < keep_s
        return is_young and not self._reader.at_eof() and not self._writer.is_closing()

    async def ask(self, request: httpx.Request, timeouts: Mapping[str, float | None]) -> h11.Response:
        """Send the request, and read up to the end of the answer's head."""
        with _faults(httpx.WriteTimeout, request, otherwise=httpx.WriteError):
            async with asyncio.timeout(timeouts.get("write")):
                await self._send(request)
        while True:
            event = await self.next_event(request, timeouts.get("read"))
            if isinstance(event, h11.Response):
                return event

    async def _send(self, request: httpx.Request) -> None:
        target = request.url.raw_path
        head = h11.Request(method=request.method, target=target, headers=request.headers.raw)
        parts = [self._protocol.send(head) or b""]
        assert isinstance(request.stream, httpx.AsyncByteStream)  # noqa: S101 - an AsyncClient's requests have one
        async for chunk in request.stream:
            parts.append(self._protocol.send(h11.Data(data=chunk)) or b"")
        parts.append(self._protocol.send(h11.EndOfMessage()) or b"")
        self._writer.write(b"".join(parts))
        await self._writer.drain()

    async def next_event(self, request: httpx.Request, timeout_s: float | None) -> Any:  # Any: h11's events
        """The next part of the answer."""
        with _faults(httpx.ReadTimeout, request, otherwise=httpx.ReadError):
            while (event := self._protocol.next_event()) is h11.NEED_DATA:
                async with asyncio.timeout(timeout_s):
                    data = await self._reader.read(_READ_BYTES)
                if not data and self._protocol.their_state is h11.SEND_RESPONSE:
                    raise httpx.RemoteProtocolError("the service closed the connection without an answer")
                self._protocol.receive_data(data)
            return event

    def begin_next(self) -> bool:
        """Make ready for another call, where both sides have ended this one and agree to go on."""
        if self._protocol.our_state is not h11.DONE or self._protocol.their_state is not h11.DONE:
            return False
        self._protocol.start_next_cycle()
        self._free_since_s = asyncio.get_running_loop().time()
        return True

    def close(self) -> None:
        """Close it at once."""
        self._writer.close()

    async def wait_closed(self) -> None:
        """Wait until the system has let go of it."""
        try:
            await self._writer.wait_closed()
        except (OSError, ssl.SSLError):
            # The other side was gone already.
            return


class _Body(httpx.AsyncByteStream):
    """The body of an answer; frees the connection when it ends or is closed."""

    def __init__(
        self,
        owner: Connections,
        origin: _Origin,
        connection: _Connection,
        request: httpx.Request,
        timeout_s: float | None,
    ) -> None:
        self._owner = owner
        self._origin = origin
        self._connection = connection
        self._request = request
        self._timeout_s = timeout_s
        self._is_open = True

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            event = await self._connection.next_event(self._request, self._timeout_s)
            if isinstance(event, h11.Data):
                yield bytes(event.data)
            elif isinstance(event, h11.EndOfMessage | h11.ConnectionClosed):
                return

    async def aclose(self) -> None:
        if self._is_open:
            self._is_open = False
            self._owner._end(self._origin, self._connection, is_broken=False)


def _origin(url: httpx.URL) -> _Origin:
    port = url.port or {"http": 80, "https": 443}.get(url.scheme)
    if port is None:
        raise httpx.UnsupportedProtocol(f"cannot call {url.scheme!r}: only http and https")
    return url.scheme, url.host, port


@contextmanager
def _faults(
    late: type[httpx.TransportError], request: httpx.Request, *, otherwise: type[httpx.TransportError] = httpx.ReadError
) -> Iterator[None]:
    """Say what went wrong in httpx's words, which steps and their retries know."""
    try:
        yield
    except TimeoutError as error:
        raise late(f"no answer in time from {request.url.host}") from error
    except h11.RemoteProtocolError as error:
        raise httpx.RemoteProtocolError(str(error), request=request) from error
    except h11.LocalProtocolError as error:
        raise httpx.LocalProtocolError(str(error), request=request) from error
    except (OSError, ssl.SSLError) as error:
        raise otherwise(type(error).__name__, request=request) from error
