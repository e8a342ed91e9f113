"""A front that passes ordinary connections on to a PostgreSQL and refuses those for replication, as poolers do."""

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_REFUSAL = b"SFATAL\0C08P01\0Munsupported startup parameter: replication\0\0"


@contextmanager
def pooler_before(port: int) -> Iterator[int]:
    """A port of 127.0.0.1 in front of the server at `port`."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_accept, args=(listener, port), daemon=True).start()
        try:
            yield listener.getsockname()[1]
        finally:
            # Wakes the thread that waits in accept().
            listener.shutdown(socket.SHUT_RDWR)


def _accept(listener: socket.socket, port: int) -> None:
    while True:
        try:
            client, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=_serve, args=(client, port), daemon=True).start()


def _serve(client: socket.socket, port: int) -> None:
    with suppress(OSError, struct.error), client:
        while True:
            length, code = struct.unpack(">II", client.recv(8, socket.MSG_WAITALL))
            if code >> 16 == 3:
                break
            client.sendall(b"N")  # No encryption here.
        rest = client.recv(length - 8, socket.MSG_WAITALL)
        if b"replication\0" in rest:
            client.sendall(b"E" + struct.pack(">I", len(_REFUSAL) + 4) + _REFUSAL)
            return
        with socket.create_connection(("127.0.0.1", port)) as server:
            server.sendall(struct.pack(">II", length, code) + rest)
            back = threading.Thread(target=_pass_on, args=(server, client), daemon=True)
            back.start()
            _pass_on(client, server)
            back.join(5)


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
