"""How a connection is protected where its connection string does not say so.

| host                                  | default                                                        |
|---------------------------------------|----------------------------------------------------------------|
| a socket, `localhost`, 127.0.0.0/8, ::1 | libpq's own: nobody on the way                               |
| any other                             | `verify-full`: encrypted, the certificate's chain and name checked |

libpq's default anywhere is `prefer`, which takes what it gets: it sends the password in the clear to a server that
offers no TLS, and to anybody who says that he is that server. Whoever names `sslmode` gets what he named.
"""

import ipaddress
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from psycopg import pq

_LIBPQ_DEFAULT = b"prefer"
_LIBPQ_ROOTS = Path(".postgresql/root.crt")
"""Below the home folder: libpq trusts the authorities in it."""


def protection(parts: Mapping[str, Any]) -> dict[str, str]:  # Any: the driver's values of a connection string
    """The TLS settings to add to those of a connection string; none where it or the environment has its own."""
    defaults = {option.keyword: option.val for option in pq.Conninfo.get_defaults()}
    if "sslmode" in parts or "service" in parts or defaults[b"service"] or defaults[b"sslmode"] != _LIBPQ_DEFAULT:
        return {}
    host = parts.get("host") or parts.get("hostaddr") or (defaults[b"host"] or b"").decode()
    if all(is_local(each) for each in str(host).split(",")):
        return {}
    roots = {} if "sslrootcert" in parts or defaults[b"sslrootcert"] else _roots()
    return {"sslmode": "verify-full", **roots}


def is_local(host: str) -> bool:
    """Whether a connection to this host stays on this machine; an empty one is libpq's own socket.

    >>> [is_local(host) for host in ("", "/run/postgresql", "@abstract", "localhost", "127.0.0.9", "::1")]
    [True, True, True, True, True, True]
    >>> [is_local(host) for host in ("db.example", "10.0.0.5", "localhost.example")]
    [False, False, False]
    """
    if not host or host[0] in "/@" or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _roots() -> dict[str, str]:
    if (Path.home() / _LIBPQ_ROOTS).exists():
        return {}
    # `system` asks the OpenSSL inside of the driver, whose wheel looks in a folder that no system has.
    # Python's knows the file of this machine.
    return {"sslrootcert": ssl.get_default_verify_paths().cafile or "system"}
