"""Work that goes on in a thread while a block of code runs."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def beside(run: Callable[[threading.Event], None], *, name: str, daemon: bool = False) -> Iterator[None]:
    """Run it in a thread of that name while inside; it ends by itself soon after its event is set, and is waited for.

    A `daemon` does not keep the process from its end where the block never does.
    """
    stop = threading.Event()
    thread = threading.Thread(target=run, args=(stop,), name=name, daemon=daemon)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
