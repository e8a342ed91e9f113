"""Dead letters of a shared app: each is with the member that has its share, and only that one can see to it.

| its member         | it is read                            | a retry               | a drop                        |
|--------------------|---------------------------------------|-----------------------|-------------------------------|
| runs here          | in its state                          | is asked of it        | is asked of it                |
| ended, was here    | there, until another is at its shares | comes with the shares | is refused: it is tried again |
| on another machine | by number only                        | is for that machine   | is for that machine           |
"""

from collections.abc import Sequence
from dataclasses import dataclass

from deltaworks.process.fold import Key
from deltaworks.process.letters import Letter
from deltaworks.process.requests import Request
from deltaworks.process.shared.members import Member
from deltaworks.process.shared.shares import share_of
from deltaworks.process.sink import key_text


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadElsewhere:
    """Dead letters that a member said it has, whose state is not on this machine; with `has_ended` nobody has them."""

    member: str
    count: int
    has_ended: bool

    @property
    def text(self) -> str:
        """Where they are and what is to be done, for people."""
        letters = f"{self.count:,} dead letter{'s' if self.count != 1 else ''}"
        if self.has_ended:
            return f"{letters} of {self.member}, which has ended: whoever takes its shares tries them again"
        return f"{letters} of {self.member}: run this on its machine"


@dataclass(frozen=True, slots=True, kw_only=True)
class Addressed:
    """Who is to be asked for something about dead letters: `running` members.

    `letters` are those on this machine that are meant, `ended` those of them whose member does not run. `missing` keys
    have none here, and are maybe `elsewhere`.
    """

    running: Sequence[Member]
    letters: Sequence[Letter]
    ended: Sequence[Letter]
    missing: Sequence[Key]
    elsewhere: Sequence[DeadElsewhere]


def letters_over(members: Sequence[Member], *, key: Key | None = None, limit: int | None = None) -> list[Letter]:
    """The dead letters of all members whose state is here, the oldest failed change first.

    A letter that two states have, because nobody knows which of them counts, is that of the one that runs.
    """
    found: dict[object, Letter] = {}
    for member in sorted(members, key=lambda each: each.pid is None):
        for letter in member.letters(key=key, limit=limit):
            found.setdefault((letter.key, letter.version, letter.step), letter)
    return sorted(found.values(), key=lambda letter: letter.version)[:limit]


def dead_elsewhere(
    members: Sequence[Member], *, shares: int, keys: Sequence[Key] | None = None
) -> Sequence[DeadElsewhere]:
    """Members that have dead letters and whose state is not here; with `keys` those whose share one of these is in."""
    wanted = None if keys is None else {share_of(key, shares=shares) for key in keys}
    return [
        DeadElsewhere(member=each.name, count=each.said.dead, has_ended=each.is_gone)
        for each in members
        if each.folder is None and each.said is not None and each.said.dead
        if wanted is None or wanted.intersection(each.shares)
    ]


def address(members: Sequence[Member], request: Request, *, shares: int) -> Addressed:
    """Find who is to be asked for what a request says of its keys, or of all letters."""
    texts = None if request.keys is None else {key_text(key): key for key in request.keys}
    letters = [each for each in letters_over(members) if texts is None or key_text(each.key) in texts]
    running = [each for each in members if each.pid is not None]
    holders = {letter.member for letter in letters}
    found = {key_text(letter.key) for letter in letters}
    missing = [key for text, key in (texts or {}).items() if text not in found]
    return Addressed(
        running=[each for each in running if texts is None or each.name in holders],
        letters=letters,
        ended=[each for each in letters if each.member not in {member.name for member in running}],
        missing=missing,
        elsewhere=dead_elsewhere(members, shares=shares, keys=None if texts is None else missing),
    )
