"""Calling a user's step, and judging what it raised."""

import asyncio
import contextvars
import email.utils
import json
import math
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx

from deltaworks.errors import DeltaworksError, RetryableError
from deltaworks.process.declared import Step
from deltaworks.process.stuck import StepStuckError

STEP_ERRORS = (Exception, StepStuckError)
"""Whatever a step may raise; it is judged and kept with its key."""
_MAY_PASS_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_IS_DOWN_STATUS = frozenset({429, 502, 503, 504})
"""The service as a whole refuses: a smaller batch would only be one more call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFault:
    """Why a step failed.

    `may_pass`: the same call may work later. `after_s`: not before that, by the service's own word.
    `is_down`: no id of the call is to blame. `was_tried` is false where no call was made, so it counts as no
    attempt. `error` names types and places, never row data.
    """

    step: str
    error: str
    may_pass: bool
    is_down: bool = False
    after_s: float | None = None
    was_tried: bool = True


async def call(step: Step, argument: Any, clients: Mapping[str, Any], *, timeout_s: float | None = None) -> Any:
    """Run a step, in a thread where it is a plain function with a time limit.

    Raises:
        TimeoutError: it took longer; a thread is left to end by itself.
    """
    arguments = {name: clients[name] for name in step.clients} if step.clients else {}
    if timeout_s is None and not step.is_async:
        return step.function(argument, **arguments)
    async with asyncio.timeout(timeout_s):
        if step.is_async:
            return await step.function(argument, **arguments)
        return await _in_thread(lambda: step.function(argument, **arguments))


async def _in_thread(function: Callable[[], Any]) -> Any:
    """Run it in a thread of its own: one that never ends keeps no place in a pool, and no process from its end."""
    loop = asyncio.get_running_loop()
    future = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        # Nobody waits any more where the time was up.
        if not future.done():
            future.set_result(result) if error is None else future.set_exception(error)

    def run() -> None:
        settled: tuple[Any, BaseException | None]
        try:
            settled = function(), None
        except BaseException as error:
            settled = None, error
        with suppress(RuntimeError):
            # The loop may be closed by now.
            loop.call_soon_threadsafe(settle, *settled)

    threading.Thread(target=contextvars.copy_context().run, args=(run,), daemon=True).start()
    return await future


def fault_of(step: Step, error: BaseException) -> StepFault:
    """Whether what a step raised may pass, and how to say it."""
    match error:
        case httpx.HTTPStatusError(response=response):
            status = response.status_code
            request = f"{error.request.method} {error.request.url.copy_with(query=None, userinfo=b'')}"
            return StepFault(
                step=step.name,
                error=f"{request} answered {status}",
                may_pass=status in _MAY_PASS_STATUS,
                is_down=status in _IS_DOWN_STATUS,
                after_s=retry_after_s(response.headers.get("retry-after")),
            )
        case TimeoutError() | httpx.TimeoutException():
            return StepFault(step=step.name, error=f"no answer in time ({type(error).__name__})", may_pass=True)
        case httpx.UnsupportedProtocol():
            pass
        case httpx.TransportError() | ConnectionError():
            is_down = not isinstance(error, httpx.RemoteProtocolError)
            return StepFault(
                step=step.name, error=f"no connection ({type(error).__name__})", may_pass=True, is_down=is_down
            )
        case json.JSONDecodeError() | UnicodeDecodeError() | httpx.DecodingError():
            return StepFault(step=step.name, error=f"the answer cannot be read ({type(error).__name__})", may_pass=True)
        case StepStuckError():
            text = f"did not return in time, ended at {_place(step, error)}"
            return StepFault(step=step.name, error=text, may_pass=False)
        case DeltaworksError():
            return StepFault(step=step.name, error=str(error), may_pass=isinstance(error, RetryableError))
    # The message of a user's exception may quote the row, so only its type and place are kept.
    return StepFault(step=step.name, error=f"{type(error).__name__} at {_place(step, error)}", may_pass=False)


def _place(step: Step, error: BaseException) -> str:
    file = step.place.rpartition(":")[0]
    frames = traceback.extract_tb(error.__traceback__)
    within = [frame for frame in frames if frame.filename == file]
    return f"{within[-1].filename}:{within[-1].lineno}" if within else step.place


def retry_after_s(header: str | None) -> float | None:
    """Seconds or an HTTP date (RFC 9110, section 10.2.3); what cannot be read is as good as absent."""
    if header is None:
        return None
    try:
        seconds = float(header)
        return max(0.0, seconds) if math.isfinite(seconds) else None
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None
