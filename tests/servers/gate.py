"""A TCP gate before a server: while it is closed nobody gets through, as if the server were gone."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

import pytest

MakeGate = Callable[[int], "Gate"]


class Gate:
    """Listens at `port` and passes on to the server at `target`."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._is_closed = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Cut every connection, and every new one as soon as it comes."""
        with self._lock:
            self._is_closed = True
        self._cut()
        try:
            yield
        finally:
            with self._lock:
                self._is_closed = False

    def stop(self) -> None:
        """Let nobody in any more."""
        # Wakes the thread that waits in accept().
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._cut()

    def _cut(self) -> None:
        with self._lock:
            for connection in self._open:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with suppress(OSError), client, socket.create_connection(("127.0.0.1", self._target)) as server:
            with self._lock:
                if self._is_closed:
                    return
                self._open |= {client, server}
            back = threading.Thread(target=_pass_on, args=(server, client), daemon=True)
            back.start()
            _pass_on(client, server)
            back.join(5)
            with self._lock:
                self._open -= {client, server}


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)


@pytest.fixture
def gate() -> Iterator[MakeGate]:
    """Makes gates that end with the test."""
    with ExitStack() as gates:

        def make(target: int) -> Gate:
            made = Gate(target)
            gates.callback(made.stop)
            return made

        yield make
