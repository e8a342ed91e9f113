"""Seals closed segments: compresses them beside the log and puts the sealed file in the place of the plain one.

    write N.sealing ─► read back, compare ─► fsync ─► rename to N.sealed ─► sync folder ─► unlink N.segment
    died at       1                       2        3                     4              5
    1 2 3  the plain segment is as it was; the next sealing begins anew     4 5  both files are there and hold the
    same; the next sealing compares them once more and removes the plain one

A frame is copied byte by byte, so a group is the same before and after. A damaged segment is left as it is: its
readers name the damage. Appends never wait for any of it.
"""

import os
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from deltaworks import faults
from deltaworks.errors import DeltaworksError
from deltaworks.log.change_log import CorruptLogError
from deltaworks.log.sealed import SealedBytes, SealedWriter
from deltaworks.log.segment import BadFrameError, PlainBytes, frames, read_body
from deltaworks.log.segment_file import (
    closed_segments,
    corrupt,
    maintaining,
    sealed_name,
    segment_name,
    sync_folder,
)

DRAFT = ".sealing"
_COMPARED_BYTES = 4 << 20

logger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sealed:
    """A segment that was sealed: its bytes before and after."""

    first: int
    plain_bytes: int
    bytes: int


def seal_closed(folder: Path, *, level: int, stop: threading.Event | None = None) -> list[Sealed]:
    """Seal every closed segment that is not sealed yet, oldest first; begins no other once `stop` is set.

    Any process may do it while others read, retire and one writes. Idempotent: after a crash the next call goes on.

    Raises:
        LogBusyError: another process seals or retires.
        OSError: the disk refuses; the log is as it was.
    """
    done: list[Sealed] = []
    for first, _ in list(closed_segments(folder)):
        if stop is not None and stop.is_set():
            break
        if (folder / segment_name(first)).exists():
            with maintaining(folder):
                try:
                    sealed = seal_segment(folder, first, level=level)
                except CorruptLogError as error:
                    logger.error("a damaged segment is not sealed", log=folder.name, error=str(error))
                    continue
            done += [sealed] if sealed is not None else []
    return done


def seal_segment(folder: Path, first: int, *, level: int) -> Sealed | None:
    """Seal one closed segment, inside of `maintaining`; `None` where its plain file is gone.

    Raises:
        CorruptLogError: it is damaged.
    """
    plain, sealed = folder / segment_name(first), folder / sealed_name(first)
    try:
        descriptor = os.open(plain, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        if not _is_copy(plain, descriptor, sealed):
            draft = sealed.with_suffix(DRAFT)
            try:
                _write(plain, descriptor, draft, level=level)
            except BaseException:
                draft.unlink(missing_ok=True)
                raise
            faults.reach("log.before_seal_rename")
            draft.replace(sealed)
            faults.reach("log.after_seal_rename")
        # The sealed file is found before the plain one goes, also after a power cut.
        sync_folder(folder)
        faults.reach("log.before_seal_unlink")
        plain.unlink()
        faults.reach("log.after_seal_unlink")
        return Sealed(first=first, plain_bytes=os.fstat(descriptor).st_size, bytes=sealed.stat().st_size)
    finally:
        os.close(descriptor)


@dataclass(slots=True)
class Sealer:
    """Seals what a writer closes, in a thread of its process that gives way to others."""

    folder: Path
    level: int
    _wake: threading.Event = field(default_factory=threading.Event)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def wake(self) -> None:
        """Look for segments to seal; returns at once."""
        self._wake.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="sealing", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Return when the segment that is being sealed is done, which takes about a second."""
        self._stop.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        with suppress(OSError, AttributeError):
            # On Linux a thread has a priority of its own.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        while True:
            self._wake.wait()
            self._wake.clear()
            try:
                for sealed in seal_closed(self.folder, level=self.level, stop=self._stop):
                    logger.debug("sealed a segment", log=self.folder.name, first=sealed.first, bytes=sealed.bytes)
            except (DeltaworksError, OSError) as error:
                logger.warning("closed segments stay as they are", log=self.folder.name, error=str(error))
            if self._stop.is_set():
                return


def _write(plain: Path, descriptor: int, draft: Path, *, level: int) -> None:
    out = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        faults.reach("log.before_seal_write")
        _copy(plain, descriptor, out, level=level)
        faults.reach("log.after_seal_write")
        _compare(plain, descriptor, out)
        faults.reach("log.before_seal_fsync")
        os.fsync(out)
        faults.reach("log.after_seal_fsync")
    finally:
        os.close(out)


def _is_copy(plain: Path, descriptor: int, sealed: Path) -> bool:
    """Whether a life before left a sealed copy that is sound: it may be all that is left in a moment."""
    try:
        found = os.open(sealed, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        _compare(plain, descriptor, found)
    except CorruptLogError as error:
        logger.warning("a sealed copy is made anew", file=str(sealed), error=str(error))
        return False
    finally:
        os.close(found)
    return True


def _copy(plain: Path, descriptor: int, out: int, *, level: int) -> None:
    writer, source = SealedWriter(out, level=level), PlainBytes(descriptor)
    at, sequence = 0, int(plain.stem)
    try:
        for frame in frames(source):
            # What is damaged must not get a new checksum.
            read_body(source, frame)
            header = frame.header()
            if header.sequence != sequence:
                raise BadFrameError(f"it is group {header.sequence}")
            writer.add(frame, header, source.read(frame.start, frame.end - frame.start))
            at, sequence = frame.end, sequence + 1
    except BadFrameError as error:
        raise corrupt(plain, at, sequence, str(error)) from error
    writer.finish()


def _compare(plain: Path, descriptor: int, out: int) -> None:
    """Only a copy that was read back may take the place of the original."""
    try:
        sealed, at = SealedBytes(out), 0
        while content := sealed.read(at, _COMPARED_BYTES):
            if content != os.pread(descriptor, len(content), at):
                raise BadFrameError("the sealed copy differs")
            at += len(content)
        if at != os.fstat(descriptor).st_size:
            raise BadFrameError("the sealed copy is shorter")
    except BadFrameError as error:
        raise corrupt(plain, at, int(plain.stem), str(error)) from error
