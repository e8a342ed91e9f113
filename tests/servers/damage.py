"""A TCP proxy before a server that damages what the server sends, as a broken network card would."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass


@dataclass(slots=True)
class Damage:
    """What the proxy at `port` puts in place of what; both of one length, nothing while `instead_of` is empty."""

    port: int
    instead_of: bytes = b""
    put: bytes = b""
    count: int = 0


@contextmanager
def damaging(port: int) -> Iterator[Damage]:
    """A proxy on 127.0.0.1 in front of the server at `port`."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        damage = Damage(listener.getsockname()[1])
        threading.Thread(target=_accept, args=(listener, port, damage), daemon=True).start()
        try:
            yield damage
        finally:
            # Wakes the thread that waits in accept().
            listener.shutdown(socket.SHUT_RDWR)


def _accept(listener: socket.socket, port: int, damage: Damage) -> None:
    while True:
        try:
            client, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=_serve, args=(client, port, damage), daemon=True).start()


def _serve(client: socket.socket, port: int, damage: Damage) -> None:
    with suppress(OSError), client, socket.create_connection(("127.0.0.1", port)) as server:
        back = threading.Thread(target=_pass_on, args=(server, client, damage), daemon=True)
        back.start()
        _pass_on(client, server, None)
        back.join(5)


def _pass_on(source: socket.socket, target: socket.socket, damage: Damage | None) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            # A small message is sent at once, so it is not cut by the reads here.
            if damage is not None and damage.instead_of and damage.instead_of in data:
                data = data.replace(damage.instead_of, damage.put)
                damage.count += 1
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
