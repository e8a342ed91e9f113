"""A group in memory that a test moves by hand: shares go where the test says, members die and freeze when it says."""

from collections.abc import Mapping

from deltaworks.log.membership import Leaving, MembershipLostError, Moved


class MemoryGroup:
    """Gives shares evenly to its members; one of them leaves a share before another gets it, unless it was cut off."""

    def __init__(self, shares: int) -> None:
        self.done = dict.fromkeys(range(shares), -1)
        self.notes = dict.fromkeys(range(shares), "")
        self.members: list[MemoryMembership] = []

    def join(self) -> "MemoryMembership":
        member = MemoryMembership(self)
        self.members.append(member)
        return member

    def cut_off(self, member: "MemoryMembership") -> None:
        """Go on without a member, which does not know of it."""
        self.members.remove(member)

    def wanted(self, member: "MemoryMembership") -> set[int]:
        at, count = self.members.index(member), len(self.members)
        return {share for share in self.done if share % count == at}


class MemoryMembership:
    """See `Membership`; a member that was cut off is one again by its next `poll`."""

    lease_s = 0.0
    """So that every write is preceded by a confirm."""

    def __init__(self, group: MemoryGroup) -> None:
        self.group = group
        self.shares: set[int] = set()

    def poll(self, leaving: Leaving) -> Moved:
        if self not in self.group.members:
            lost, self.shares = self.shares, set()
            self.group.members.append(self)
            return Moved(lost=lost)
        wanted = self.group.wanted(self)
        if leave := self.shares - wanted:
            self.group.done |= leaving(leave)
            self.shares -= leave
        free = wanted - {share for other in self.group.members for share in other.shares}
        self.shares |= free
        return Moved(given={share: self.group.done[share] for share in free})

    def confirm(self, done: Mapping[int, int], *, note: str = "") -> None:
        if self not in self.group.members:
            raise MembershipLostError("the group has gone on")
        assert done.keys() <= self.shares
        assert all(self.group.done[share] <= sequence for share, sequence in done.items()), "a share went back"
        self.group.done |= done
        self.group.notes |= dict.fromkeys(done, note)

    def progress(self) -> Mapping[int, int]:
        return dict(self.group.done)

    def close(self) -> None:
        if self in self.group.members:
            self.group.members.remove(self)
