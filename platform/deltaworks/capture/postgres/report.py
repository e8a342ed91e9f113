"""What is kept of a message that nobody can read: its frame, byte for byte, for whoever looks into it."""

import os
from pathlib import Path

from deltaworks.capture.postgres.pgoutput import MalformedMessageError
from deltaworks.capture.postgres.scan import MESSAGE
from deltaworks.position import Lsn

_LSN_AT = slice(6, 14)


def lsn_of(frame: bytes) -> Lsn:
    """Where in the WAL the message of a frame is."""
    return Lsn(int.from_bytes(frame[_LSN_AT], "big"))


def undecodable(frame: bytes, folder: Path | None) -> MalformedMessageError:
    """The error for a message that does not follow the protocol; its bytes are in `folder` where there is one."""
    data = frame[MESSAGE:]
    return reported(
        f"cannot decode the {data[:1].decode('latin-1')!r} message of {len(data)} bytes at {lsn_of(frame)}: "
        "a marker, a size or its place in the stream is wrong",
        frame,
        folder,
    )


def reported(what: str, frame: bytes, folder: Path | None) -> MalformedMessageError:
    """The error, the frame saved beside it. The next reader that meets the message writes the same file again."""
    if folder is None:
        return MalformedMessageError(what)
    path = folder / f"message-{lsn_of(frame).value:016X}.bin"
    folder.mkdir(parents=True, exist_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(frame)
    return MalformedMessageError(f"{what}; its bytes are in {path}: keep them for a report, they hold row data")
