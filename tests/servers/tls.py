"""A real TLS server before a PostgreSQL, and an authority that signs its certificate.

The PostgreSQL of the wheel is built without OpenSSL. What a client sees of one that has it is the answer `S` to
its SSLRequest and then TLS, and that is what this server does before it passes everything on.
"""

import ipaddress
import select
import socket
import ssl
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_SSL_REQUEST, _GSS_REQUEST = 80877103, 80877104


@dataclass(frozen=True, slots=True)
class Authority:
    """Signs certificates; `file` is what a client has to trust."""

    file: Path
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def create(cls, folder: Path) -> "Authority":
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "an authority")])
        builder = _builder(name, name, key).add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        certificate = builder.sign(key, hashes.SHA256())
        file = folder / "authority.pem"
        file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return cls(file, certificate, key)

    def issue(self, host: str) -> Path:
        """A file with a key and a certificate for this host, beside the authority's."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
        names = [x509.DNSName(host), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        builder = _builder(name, self.certificate.subject, key).add_extension(
            x509.SubjectAlternativeName(names), critical=False
        )
        file = self.file.with_name(f"{host}.pem")
        file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            + builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        )
        return file


@contextmanager
def tls_before(port: int, *, certificate: Path) -> Iterator[int]:
    """A port of 127.0.0.1 that speaks TLS and passes on to the PostgreSQL at `port`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_accept, args=(listener, port, context), daemon=True).start()
        try:
            yield listener.getsockname()[1]
        finally:
            # Wakes the thread that waits in accept().
            listener.shutdown(socket.SHUT_RDWR)


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
    )


def _accept(listener: socket.socket, port: int, context: ssl.SSLContext) -> None:
    while True:
        try:
            client, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=_serve, args=(client, port, context), daemon=True).start()


def _serve(client: socket.socket, port: int, context: ssl.SSLContext) -> None:
    with suppress(OSError, ssl.SSLError, struct.error), client:
        while True:
            _length, code = struct.unpack(">II", client.recv(8, socket.MSG_WAITALL))
            if code == _GSS_REQUEST:
                client.sendall(b"N")
            elif code == _SSL_REQUEST:
                client.sendall(b"S")
                break
            else:
                return  # Plain text is not for this server.
        with (
            context.wrap_socket(client, server_side=True) as secured,
            socket.create_connection(("127.0.0.1", port)) as server,
        ):
            _pass_on(secured, server)


def _pass_on(secured: ssl.SSLSocket, server: socket.socket) -> None:
    """Both ways in one thread: a TLS socket must not be read and written by two."""
    secured.setblocking(False)
    while True:
        if not secured.pending():
            readable, _, _ = select.select([secured, server], [], [], 5)
        else:
            readable = [secured]
        for side in readable:
            if side is secured:
                try:
                    data = secured.recv(65536)
                except ssl.SSLWantReadError:
                    continue
                if not data:
                    return
                server.sendall(data)
            else:
                data = server.recv(65536)
                if not data:
                    return
                secured.setblocking(True)
                secured.sendall(data)
                secured.setblocking(False)
