"""The members of a shared app: who has which share now, who had it last, and whose state is on this machine.

    group    share ──► said last by A, held by A      A has it
                   ──► said last by A, held by B      B takes it: folds until it may begin, then tries all undone again
                   ──► said last by A, held by nobody A died or left; it waits for a member
    machine  folder ──► state of A, with a process or without one

What is held or dead in a share stands in the state of who said last how far the share is. When another begins with the
share it says so before it tries anything, so from then on what the first one's state has of it counts for nothing.
Without the group's word (its servers are away) every state here is taken as it is, those of running members first.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import structlog

from deltaworks.config import Config
from deltaworks.errors import RetryableError
from deltaworks.log.holder import holder_of
from deltaworks.log.membership import ShareStanding
from deltaworks.log.registry import log_of
from deltaworks.process.fold import Key
from deltaworks.process.letters import Letter, letters_of
from deltaworks.process.place import member_folders, read_member
from deltaworks.process.runner import STATE_FILE
from deltaworks.process.shared.member import MemberStanding
from deltaworks.process.standing import Standings, read_standings

logger = structlog.get_logger(__name__)

NOBODY = "nobody yet"
"""Who has a share that no member ever had."""
UNNAMED = "a member of an older version"
"""Who has a share, and did not say who it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderHere:
    """A folder on this machine with the state of a member: `name` is whose, `pid` that of the process that runs it."""

    folder: Path
    name: str | None
    pid: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One that has shares of an app or had them last, on whatever machine, or that runs here.

    `shares` are those that it said last how far they are; of them, `waiting` are nobody's now, and `moving` have been
    given to others, which are not at them yet. `coming` are those that it was given itself. `said` is what it said of
    itself; `None` where it said nothing. Its state is in `folder` where that is on this machine, and `pid` runs it.
    `not_its_own` are shares that others said something of since, whatever its state tells of them. Where the group was
    not asked or did not answer, `is_known` is false, and nothing is known of its shares.
    """

    name: str
    shares: tuple[int, ...] = ()
    waiting: tuple[int, ...] = ()
    moving: tuple[int, ...] = ()
    coming: tuple[int, ...] = ()
    said: MemberStanding | None = None
    folder: Path | None = None
    pid: int | None = None
    not_its_own: tuple[int, ...] = ()
    is_known: bool = True

    @property
    def has_died(self) -> bool:
        """Whether it ended without leaving the group, as this machine knows of its own processes."""
        return self.folder is not None and self.pid is None and not self.has_left

    @property
    def has_left(self) -> bool:
        """Whether the last that it said is that it leaves."""
        return self.said is not None and self.said.has_left

    @property
    def is_gone(self) -> bool:
        """Whether it has nothing any more, as far as can be told."""
        if self.folder is not None:
            return self.pid is None
        return bool(self.shares) and not self.own and not self.coming and self.name != NOBODY

    @property
    def own(self) -> tuple[int, ...]:
        """The shares that it has and is at."""
        return tuple(share for share in self.shares if share not in self.waiting and share not in self.moving)

    @property
    def text(self) -> str:
        """What it has, and what became of it, in a few words."""
        words = [f"shares {_listed(self.own)}"] if self.own else []
        if self.coming:
            words.append(f"takes shares {_listed(self.coming)}")
        if self.is_gone:
            words.append(self._end_text())
        if self.moving:
            words.append(f"another takes shares {_listed(self.moving)}")
        if self.waiting:
            words.append(f"shares {_listed(self.waiting)} wait for a member")
        return "; ".join(words) or ("no shares yet" if self.is_known else "its shares are not known")

    def standings(self) -> Standings:
        """How its keys stand: by its state where that is here, else by what it said."""
        if self.folder is not None:
            return read_standings(self.folder, except_shares=self.not_its_own)
        if self.said is None:
            return Standings()
        said = self.said
        return Standings(
            to_do=said.to_do,
            held=said.held,
            dead=said.dead,
            sequence=said.sequence,
            offset=said.offset,
            reached=said.reached,
            waiting_since=said.waiting_since,
        )

    def letters(self, *, key: Key | None = None, limit: int | None = None) -> list[Letter]:
        """Its dead letters, the oldest failed change first; none where its state is on another machine."""
        if self.folder is None:
            return []
        found = letters_of(self.folder / STATE_FILE, key=key, limit=limit, except_shares=self.not_its_own)
        return [replace(letter, member=self.name) for letter in found]

    def _end_text(self) -> str:
        said_at = None if self.said is None else self.said.said_at
        at = "" if said_at is None else f" {datetime.fromtimestamp(said_at, UTC):%F %T} UTC"
        if self.has_left:
            return f"left at{at}" if at else "left"
        if self.has_died:
            return f"died after{at}" if at else "died"
        return f"last heard of at{at}" if at else "not heard of"


def read_members(config: Config, app: str) -> list[Member]:
    """Every member of a shared app as of now; asks the group, which may take as long as its servers do.

    Raises:
        LogAwayError: the servers that keep the log do not answer.
    """
    settings = config.app(app)
    shares = log_of(config, settings.source).shares_of(app, shares=settings.shares or 0)
    return members_of(shares, folders_here(config, app))


def members_or_here(config: Config, app: str) -> list[Member]:
    """`read_members`; where the group does not answer, those whose state is on this machine."""
    try:
        return read_members(config, app)
    except RetryableError as error:
        logger.warning("the members elsewhere are not known", app=app, error=str(error))
        return members_of({}, folders_here(config, app))


def folders_here(config: Config, app: str) -> list[FolderHere]:
    """The folders of an app's members on this machine, those that do not run now included."""
    return [
        FolderHere(folder=folder, name=read_member(folder), pid=holder_of(folder / "lock"))
        for folder in member_folders(config.app_folder(app), is_shared=True)
    ]


def members_of(shares: Mapping[int, ShareStanding], here: Iterable[FolderHere] = ()) -> list[Member]:
    """Who has which shares and how far it is, by name; without `shares`, those that are here."""
    found: dict[str, Member] = {}
    by_share: dict[int, str] = {}
    for share, at in sorted(shares.items()):
        said = MemberStanding.parse(at.note)
        if said is None and at.done < 0:
            said = MemberStanding(name=NOBODY)
        name = by_share[share] = UNNAMED if said is None else said.name
        before = found.get(name)
        if said is not None and before is not None and before.said is not None:
            said = said.and_older(before.said)
        member = replace(before or Member(name=name), said=said)
        found[name] = replace(member, shares=(*member.shares, share))
    for each in here:
        if each.name is not None and (each.pid is not None or each.name in found or not shares):
            member = found.get(each.name, Member(name=each.name, is_known=bool(shares)))
            found[each.name] = replace(member, folder=each.folder, pid=each.pid)
    for share, at in sorted(shares.items()):
        _place(found, share, at.holder, by_share[share])
    return [replace(each, not_its_own=_of_others(by_share, each.name)) for _, each in sorted(found.items())]


def _place(found: dict[str, Member], share: int, holder: str | None, name: str) -> None:
    """Note of a share who has it now, beside who said last how far it is."""
    member = found[name]
    is_dead = member.folder is not None and member.pid is None
    if holder is None or (is_dead and holder in {name, ""}):
        # The group takes a member for one until its time is up; this machine knows better of its own.
        found[name] = replace(member, waiting=(*member.waiting, share))
    elif holder not in {name, ""}:
        found[name] = replace(member, moving=(*member.moving, share))
        taker = found.get(holder, Member(name=holder))
        found[holder] = replace(taker, coming=(*taker.coming, share))


def _of_others(by_share: Mapping[int, str], name: str) -> tuple[int, ...]:
    return tuple(share for share, said_by in by_share.items() if said_by not in {name, NOBODY, UNNAMED})


def _listed(shares: Collection[int]) -> str:
    return " ".join(map(str, shares))
