"""What is made of what the members of a shared app say of themselves, of who has which share, and of what is here."""

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from deltaworks.log.membership import ShareStanding
from deltaworks.position import Lsn
from deltaworks.process.requests import Kind, Request
from deltaworks.process.shared.member import MemberStanding
from deltaworks.process.shared.member_letters import DeadElsewhere, address, dead_elsewhere
from deltaworks.process.shared.members import NOBODY, UNNAMED, FolderHere, members_of

STANDINGS = st.builds(
    MemberStanding,
    name=st.text(min_size=1, max_size=20),
    sequence=st.integers(-1, 99),
    offset=st.integers(0, 2**62),
    reached=st.integers(0, 2**63 - 1).map(Lsn),
    waiting_since=st.none() | st.floats(0, 2e9),
    to_do=st.integers(0, 2**40),
    held=st.integers(0, 2**40),
    dead=st.integers(0, 2**40),
    documents_per_s=st.floats(0, 1e6),
    said_at=st.none() | st.floats(0, 2e9),
    has_left=st.booleans(),
)
AT = 1_795_722_000.0
"""20:33:20 on 26 November 2026, when members spoke last."""


def said(name: str, *, holder: str | None = "", dead: int = 0, has_left: bool = False) -> ShareStanding:
    standing = MemberStanding(name=name, sequence=3, dead=dead, said_at=AT, has_left=has_left)
    return ShareStanding(done=3, note=standing.to_note(), holder=holder)


def at(standing: MemberStanding) -> ShareStanding:
    return ShareStanding(done=standing.sequence, note=standing.to_note())


@given(STANDINGS)
def test_what_a_member_says_is_understood_and_small_enough_to_be_kept(standing: MemberStanding) -> None:
    assert MemberStanding.parse(standing.to_note()) == standing
    assert len(standing.to_note()) < 1_000


def test_what_a_member_of_a_newer_version_says_besides_is_passed_over() -> None:
    standing = MemberStanding(name="here:1", sequence=3, offset=30, reached=Lsn(300))
    note = json.dumps(json.loads(standing.to_note()) | {"mood": "fine"})
    assert MemberStanding.parse(note) == standing


def test_a_member_is_as_old_as_the_oldest_that_it_said_of_its_shares_and_counts_what_it_said_last() -> None:
    old = MemberStanding(name="here:1", sequence=3, offset=30, reached=Lsn(300), waiting_since=5.0, dead=4, said_at=1.0)
    new = MemberStanding(name="here:1", sequence=7, offset=70, reached=Lsn(700), dead=2, said_at=2.0)
    other = MemberStanding(name="there:1", sequence=9, offset=90, reached=Lsn(900))
    one, two = members_of({2: at(new), 0: at(old), 1: at(other)})
    assert (one.name, one.shares, one.said) == ("here:1", (0, 2), new.and_older(old))
    assert one.said is not None
    assert (one.said.sequence, one.said.waiting_since, one.said.dead) == (3, 5.0, 2)
    assert (two.name, two.shares, two.said) == ("there:1", (1,), other)


def test_a_share_that_nobody_had_lacks_everything_and_of_one_that_says_nothing_nothing_is_known() -> None:
    found = members_of({0: ShareStanding(done=-1), 1: ShareStanding(done=4), 2: ShareStanding(done=-1)})
    assert [(each.name, each.shares, each.said) for each in found] == [
        (UNNAMED, (1,), None),
        (NOBODY, (0, 2), MemberStanding(name=NOBODY)),
    ]


def test_what_became_of_a_member_is_said_in_words() -> None:
    gone = {0: said("a:1", holder=None), 1: said("a:1", holder=None)}
    ended = [FolderHere(folder=Path("a"), name="a:1", pid=None)]
    left = {0: said("a:1", holder=None, has_left=True), 1: said("b:1", holder="b:1")}
    moves = {0: said("a:1", holder="a:1"), 1: said("a:1", holder="b:1"), 2: said("a:1", holder=None)}
    late = {0: said("a:1", holder="a:1")}

    def texts(shares: dict[int, ShareStanding], *here: FolderHere) -> dict[str, str]:
        return {each.name: each.text for each in members_of(shares, here)}

    assert texts(gone) == {"a:1": "last heard of at 2026-11-26 19:40:00 UTC; shares 0 1 wait for a member"}
    assert texts(gone, *ended) == {"a:1": "died after 2026-11-26 19:40:00 UTC; shares 0 1 wait for a member"}
    assert texts(left, *ended) == {
        "a:1": "left at 2026-11-26 19:40:00 UTC; shares 0 wait for a member",
        "b:1": "shares 1",
    }
    assert texts(moves) == {
        "a:1": "shares 0; another takes shares 1; shares 2 wait for a member",
        "b:1": "takes shares 1",
    }
    # The group takes it for a member until its time is up; its own machine knows better.
    assert texts(late) == {"a:1": "shares 0"}
    assert texts(late, *ended) == {"a:1": "died after 2026-11-26 19:40:00 UTC; shares 0 wait for a member"}
    assert texts({0: ShareStanding(done=-1, holder=None)}) == {NOBODY: "shares 0 wait for a member"}
    assert texts({}, *ended, FolderHere(folder=Path("b"), name="b:1", pid=7)) == {
        "a:1": "died",
        "b:1": "its shares are not known",
    }


def test_a_state_counts_for_the_shares_of_which_nobody_else_said_anything_since() -> None:
    here = [FolderHere(folder=Path(name), name=name, pid=None) for name in ("a:1", "b:1")]
    shares = {0: said("a:1", holder="c:1"), 1: said("c:1", holder="c:1"), 2: ShareStanding(done=-1)}
    found = {each.name: each for each in members_of(shares, here)}
    assert found["a:1"].not_its_own == (1,)
    # Of one that has ended and has no share any more nothing counts.
    assert "b:1" not in found


def test_letters_of_members_elsewhere_are_for_their_machines() -> None:
    shares = {
        0: said("a:1", holder="a:1", dead=2),
        1: said("b:1", holder=None, dead=1),
        2: said("c:1", holder="c:1"),
        3: said("d:1", holder="d:1", dead=9),
    }
    members = members_of(shares, [FolderHere(folder=Path("d"), name="d:1", pid=5)])
    of_a = DeadElsewhere(member="a:1", count=2, has_ended=False)
    of_b = DeadElsewhere(member="b:1", count=1, has_ended=True)
    assert dead_elsewhere(members, shares=4) == [of_a, of_b]
    assert "run this on its machine" in of_a.text
    assert "whoever takes its shares tries them again" in of_b.text

    # 1 is in share 3 of 4, 2 in share 1.
    asked = address(members, Request.new(Kind.RETRY, keys=["1", "2"]), shares=4)
    assert ([each.name for each in asked.running], list(asked.missing), list(asked.elsewhere)) == (
        [],
        ["1", "2"],
        [of_b],
    )
    assert [each.name for each in address(members, Request.new(Kind.RETRY), shares=4).running] == ["d:1"]
