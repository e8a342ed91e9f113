"""The transport of enrichments: connections are kept, bounded and replaced, and faults come in httpx's words."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from servers.tls import Authority

from deltaworks.process.connections import http_client

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"

Answer = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]


class Service:
    """Answers what it is told, byte for byte, and counts the connections."""

    def __init__(self) -> None:
        self.url = ""
        self.opened = 0
        self.open_now = 0
        self.most_open = 0
        self.bodies: list[bytes] = []


@asynccontextmanager
async def service(answer: Answer, *, tls: ssl.SSLContext | None = None) -> AsyncIterator[Service]:
    made = Service()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        made.opened += 1
        made.open_now += 1
        made.most_open = max(made.most_open, made.open_now)
        try:
            while not writer.is_closing():
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0] or 0)
                made.bodies.append(await reader.readexactly(length))
                await answer(head, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            made.open_now -= 1
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    port = server.sockets[0].getsockname()[1]
    made.url = f"https://localhost:{port}" if tls else f"http://127.0.0.1:{port}"
    async with server:
        yield made


def says(*parts: bytes, hangs_up: bool = False) -> Answer:
    async def answer(_: bytes, writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0)
        if hangs_up:
            writer.close()

    return answer


def run(story: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(story(), 20))


def test_calls_in_a_row_share_one_connection() -> None:
    async def story() -> None:
        async with service(says(OK)) as there, http_client(there.url) as client:
            for number in range(5):
                answer = await client.post("/", json={"number": number})
                assert (answer.status_code, answer.text) == (200, "ok")
            assert there.opened == 1
            assert there.bodies == [b'{"number":%d}' % number for number in range(5)]

    run(story)


def test_no_more_connections_are_open_than_allowed_and_every_call_is_answered() -> None:
    async def slow(_: bytes, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.002)
        writer.write(OK)

    async def story() -> None:
        async with service(slow) as there, http_client(there.url, max_connections=7, timeout=None) as client:
            answers = await asyncio.gather(*(client.get("/") for _ in range(100)))
            assert [answer.text for answer in answers] == ["ok"] * 100
            assert there.most_open <= 7
            assert there.opened <= 7

    run(story)


def test_a_connection_that_the_service_closed_is_replaced_before_the_next_call() -> None:
    async def story() -> None:
        async with service(says(OK, hangs_up=True)) as there, http_client(there.url) as client:
            for _ in range(3):
                assert (await client.get("/")).text == "ok"
                while there.open_now:
                    await asyncio.sleep(0)
                # The end of the stream reaches the client's side with the loop's next rounds.
                for _ in range(5):
                    await asyncio.sleep(0.001)
            assert there.opened == 3

    run(story)


@pytest.mark.parametrize(
    ("parts", "hangs_up", "text"),
    [
        (
            (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n", b"2\r\nde\r\n0\r\n\r\n"),
            False,
            "abcde",
        ),
        ((b"HTTP/1.1 200 OK\r\n\r\nuntil ", b"the end"), True, "until the end"),
        ((b"HTTP/1.1 100 Continue\r\n\r\n", OK), False, "ok"),
        ((b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok",), True, "ok"),
        ((b"HTTP/1.1 204 No Content\r\n\r\n",), False, ""),
    ],
)
def test_an_answer_is_read_whole_however_it_is_framed(parts: tuple[bytes, ...], hangs_up: bool, text: str) -> None:
    async def story() -> None:
        async with service(says(*parts, hangs_up=hangs_up)) as there, http_client(there.url) as client:
            assert (await client.get("/")).text == text

    run(story)


@pytest.mark.parametrize(
    ("parts", "fault"),
    [
        ((b"rubbish\r\n\r\n",), httpx.RemoteProtocolError),
        ((b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf",), httpx.RemoteProtocolError),
        ((), httpx.RemoteProtocolError),
    ],
)
def test_a_broken_answer_is_a_fault_and_its_connection_is_not_used_again(
    parts: tuple[bytes, ...], fault: type[Exception]
) -> None:
    async def story() -> None:
        async with service(says(*parts, hangs_up=True)) as there, http_client(there.url) as client:
            for count in (1, 2):
                with pytest.raises(fault):
                    await client.get("/")
                assert there.opened == count

    run(story)


def test_what_does_not_come_in_time_is_a_timeout_and_frees_its_place() -> None:
    async def never(_: bytes, writer: asyncio.StreamWriter) -> None:
        return

    async def story() -> None:
        async with service(never) as there, http_client(there.url, max_connections=1, timeout=0.05) as client:
            for _ in range(2):
                with pytest.raises(httpx.ReadTimeout):
                    await client.get("/")
            waiting = asyncio.create_task(client.get("/", timeout=None))
            while there.opened < 3:
                await asyncio.sleep(0.001)
            with pytest.raises(httpx.PoolTimeout):
                await client.get("/")
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            with pytest.raises(httpx.ReadTimeout):
                await client.get("/")

    run(story)


def test_nobody_there_is_a_connect_error() -> None:
    async def story() -> None:
        async with service(says(OK)) as there:
            url = there.url
        async with http_client(url) as client:
            with pytest.raises(httpx.ConnectError):
                await client.get("/")

    run(story)


def test_tls_is_checked_against_the_authority(tmp_path: Path) -> None:
    authority = Authority.create(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(authority.issue("localhost"))
    trusting = ssl.create_default_context(cafile=str(authority.file))

    async def story() -> None:
        async with service(says(OK), tls=tls) as there:
            async with http_client(there.url, verify=trusting) as client:
                assert [(await client.get("/")).text for _ in range(2)] == ["ok", "ok"]
                assert there.opened == 1
            async with http_client(there.url) as stranger:
                with pytest.raises(httpx.ConnectError):
                    await stranger.get("/")

    run(story)
