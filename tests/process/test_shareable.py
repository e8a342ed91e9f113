"""What members of an app have each for itself, and which apps may have several."""

import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from process.shared_table import SharedTable
from process.shared_world import World, order_app

from deltaworks.log.local import LocalLogReader
from deltaworks.log.membership import SharesError
from deltaworks.process.app import count
from deltaworks.process.place import AppHeldError, own_folder
from deltaworks.process.runner import Runner
from deltaworks.process.shared.sharing import NotShareableError


def test_members_on_one_machine_have_a_folder_each(make_world: Callable[..., World]) -> None:
    world = make_world(seed=1, has_lookup=False)
    world.join("a")
    first = world.members["a"][0]
    app = order_app(world.sink, world.labels, has_lookup=False)
    log = LocalLogReader(world.folder / "log")
    with Runner.open(app, config=world.config("a"), name="orders", log=log, membership=world.group.join()) as second:
        assert second.folder.parent == first.folder
        # Each gives the metrics of its own folder: another process holds the second one, and would go by that.
        first_folder = world.config("a").app_folder("orders")
        assert own_folder(first_folder, is_shared=True) == first.folder
        script = (
            "import sys; from pathlib import Path; from deltaworks.process.place import own_folder, take_folder; "
            "folder = Path(sys.argv[1]); own, lock = take_folder(folder, 'orders', is_shared=True); "
            "assert own == own_folder(folder, is_shared=True), own; print(own.name)"
        )
        child = [sys.executable, "-c", script, str(first_folder)]
        assert subprocess.run(child, check=True, capture_output=True, text=True).stdout.strip() == "member-2"
    with pytest.raises(AppHeldError, match=str(os.getpid())):
        Runner.open(app, config=world.config("a"), name="orders", log=log)


def test_an_app_on_a_local_log_is_not_shared(make_world: Callable[..., World]) -> None:
    world = make_world(seed=1, has_lookup=False)
    app = order_app(world.sink, world.labels, has_lookup=False)
    with pytest.raises(SharesError, match="of one machine"):
        Runner.open(app, config=world.config("a"), name="orders")


def test_what_only_one_process_can_do_is_refused_with_every_reason(make_world: Callable[..., World]) -> None:
    class Plain(SharedTable):
        @property
        def capabilities(self) -> Any:
            from deltaworks.process.sink import Capabilities  # noqa: PLC0415

            return Capabilities()

    world = make_world(seed=1, has_lookup=False)
    app = order_app(Plain(world.sink.file), world.labels, has_lookup=False)

    app.window(time="day", size=timedelta(days=1), orders=count())

    with pytest.raises(NotShareableError, match=r"(?s)2 reasons.*window 'window'.*'table'.*older document"):
        Runner.open(app, config=world.config("a"), name="orders")
