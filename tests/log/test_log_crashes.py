"""Kills at every named step, many lives of one log: what was acknowledged is there, the rest is whole or absent.

One process imports the engine and forks every life of a writer, so a life costs milliseconds.
"""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent

LIVES = """
import os, random, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from log.appending import append
from deltaworks.log.local import LocalLogReader, LocalLogWriter
from deltaworks.testing.faults import kill_at

STEPS = ("before_write", "after_write", "before_fsync", "after_fsync", "before_publish", "after_publish")

def ids(folder):
    return [group.batches[0].rows.column("id").to_pylist() for group in LocalLogReader(folder).read(after_sequence=-1)]

def live(folder, chance, told):
    # What one writer does until it is killed; each acknowledged group is told at once.
    kill_at("log." + chance.choice(STEPS), after=chance.randrange(6))
    writer = LocalLogWriter.open(folder, segment_bytes=chance.choice((1, 6_000, 1 << 26)))
    while True:
        number = writer.end().sequence + 1
        append(writer, [number] * chance.randint(1, 400))
        os.write(told, b"%d\\n" % number)

def next_life(folder, chance):
    reading, told = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        live(folder, chance, told)
    os.close(told)
    with os.fdopen(reading) as lines:
        acknowledged = [int(line) for line in lines]
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL, status
    return acknowledged

# What an append imports late is imported once, not in every life.
with LocalLogWriter.open(Path({folder!r}) / "warm") as writer:
    append(writer, [0])
for seed in {seeds!r}:
    folder, chance = Path({folder!r}) / str(seed), random.Random(seed)
    known = []
    for life in range(12):
        before = len(known)
        acknowledged = next_life(folder, random.Random(chance.random()))
        # Nobody opened it for writing yet: a reader sees what was published, and that was all durable.
        seen = ids(folder)
        assert seen[:before] == known, (seed, life)
        assert len(seen) >= before + len(acknowledged), (seed, life, len(seen), acknowledged)
        LocalLogWriter.open(folder).close()
        known = ids(folder)
        assert known[: len(seen)] == seen, (seed, life)
        assert acknowledged == list(range(before, before + len(acknowledged))), (seed, life)
        assert len(known) - before - len(acknowledged) in (0, 1), (seed, life)
        assert all(set(group) == {{number}} for number, group in enumerate(known)), (seed, life)
    print(seed, len(known))
"""


def test_many_lives_that_end_anywhere_lose_nothing_and_make_nothing_up(tmp_path: Path) -> None:
    seeds = [int.from_bytes(os.urandom(4)) for _ in range(4)]
    code = LIVES.format(tests=str(TESTS), folder=str(tmp_path), seeds=seeds)
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert child.returncode == 0, f"seeds {seeds}: {child.stderr}"
    assert sum(int(line.split()[1]) for line in child.stdout.splitlines()) > 5


@pytest.mark.parametrize("is_there", [True, False])
def test_a_folder_that_may_not_be_written_is_named_with_the_way_out(is_there: bool) -> None:
    # Root may write everywhere, so the child becomes nobody; the folder is one that nobody can get at.
    code = f"""
    import os, tempfile
    from pathlib import Path
    from deltaworks.log.change_log import LogNotWritableError
    from deltaworks.log.local import LocalLogReader, LocalLogWriter
    with tempfile.TemporaryDirectory() as name:
        home, folder = Path(name), Path(name) / "log"
        if {is_there}:
            LocalLogWriter.open(folder).close()
            folder.chmod(0o555)
            for path in folder.iterdir():
                path.chmod(0o444)
        home.chmod(0o555)
        child = os.fork()
        if child == 0:
            if os.getuid() == 0:
                os.setuid(65534)
            try:
                LocalLogWriter.open(folder)
            except LogNotWritableError as error:
                assert "set home" in str(error) and repr(str(folder)) in str(error), error
                assert LocalLogReader(folder).end().sequence == -1
                os._exit(0)
            os._exit(1)
        _, status = os.waitpid(child, 0)
        home.chmod(0o755)
        if {is_there}:
            folder.chmod(0o755)
    assert status == 0, status
    """
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60, check=False
    )
    assert child.returncode == 0, child.stderr
