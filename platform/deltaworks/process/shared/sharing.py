"""Several runners of one app: each folds the whole log, and processes the entities of its shares only.

    member A   fold ═══════════════╗ shares 0 1 2 ──► steps, services, sinks
    member B   fold ═══════════════╝ shares 3 4 5 ──► steps, services, sinks        share = hash of the entity's key

Rows of several tables meet in an entity, a row can move from one entity to another, and a change may come without the
columns that it did not touch: so no part of the log is enough for a part of the entities. Therefore every member keeps
all rows, and a share moves without any state. What moves is one number, kept by the log's group:

    done    every entity of the share whose newest change is in this group or before is settled: in the sinks

| when                     | then                                                                                      |
|--------------------------|-------------------------------------------------------------------------------------------|
| a share is given         | the member folds up to where the log ends now, so that it is not behind anyone before it  |
| it has folded that far   | entities of the share that were touched after `done` are due                              |
| a share is asked for     | nothing of it is under way; how far it is, is confirmed; others go on from there          |
| the member is cut off    | its next `check` fails before it writes; others go on from what it confirmed last         |
| it was frozen in a write | the sinks refuse what is older than what they hold, so every sink has to keep versions    |

What is held or dead stays undone, so who takes its share tries it again.

Steps under `on_change` are told by who has the share. Every member keeps the turns of every share until that one is
done past them, so whoever takes it goes on with the first that nobody is known to have told, each key's in order; what
came after that one in the same share may be told twice, under the same ids. A member makes sure that it is one right
before it tells. Were it frozen in the call itself, its turn comes late: `Transition.version` says how old it is.
"""

import time
from collections.abc import Collection, Mapping
from dataclasses import replace

import structlog

from deltaworks.errors import DeltaworksError, TerminalError
from deltaworks.log.change_log import LogReader
from deltaworks.log.membership import Membership, member_name
from deltaworks.process import metrics
from deltaworks.process.app import App
from deltaworks.process.fold import At, Key
from deltaworks.process.shared.member import MemberStanding
from deltaworks.process.shared.shares import share_of
from deltaworks.process.state import State
from deltaworks.process.waiting import Standing

CONFIRM_EVERY_S = 1.0
"""How often it is said how far the shares are; what a death repeats at most."""
FORGET_EVERY_S = 10.0
"""How often turns are forgotten that other members have told."""

logger = structlog.get_logger(__name__)


class NotShareableError(TerminalError):
    """An app cannot be run by several processes; the message lists every reason."""


def check_shareable(app: App, *, name: str) -> None:
    """Let an app through that several members may run.

    Raises:
        NotShareableError: it remembers what only one process can, or a sink would take an older document.
    """
    reasons = []
    if app.windowing is not None:
        reasons.append(f"window {app.windowing.name!r} ({app.windowing.place}): it counts entities of every share")
    for spec in app.sinks:
        if spec.capabilities.is_in_home:
            reasons.append(f"sink {spec.name!r}: a {type(spec).__name__} has one writer, on one machine")
        elif not spec.capabilities.is_versioned:
            reasons.append(f"sink {spec.name!r}: a {type(spec).__name__} does not refuse an older document")
    if reasons:
        listing = "\n".join(f"  - {reason}" for reason in reasons)
        raise NotShareableError(
            f"cannot share app {name!r}, {len(reasons)} reasons; leave `shares` out, or put these in an app of their "
            f"own:\n{listing}"
        )


class Sharing:
    """One member's part of an app. Serves the runner's thread."""

    def __init__(
        self, app: App, *, name: str, shares: int, membership: Membership, state: State, log: LogReader
    ) -> None:
        self._app = app
        self._name = name
        self._shares = shares
        self._membership = membership
        self._state = state
        self._log = log
        self._coming: dict[int, int] = {}
        self._fold_to: int | None = None
        self._done: dict[int, int] = {}
        self._confirmed: tuple[dict[int, int], MemberStanding] | None = None
        self._standing = MemberStanding(name=member_name())
        self._confirmed_at = float("-inf")
        self._documents = metrics.documents_of(name)
        self._forgot_at = float("-inf")
        # Who has which share, and what was held or dead in it, is known to the group alone.
        with state.folding():
            state.shares.keep_only(())
            state.turns.share()

    def turn(self) -> None:
        """Take part in the group: leave what is asked for, and take what is given; between two cycles.

        Raises:
            RetryableError: the group or the log does not answer.
        """
        moved = self._membership.poll(self._leave)
        if moved.lost:
            self._drop(moved.lost)
        if moved.given:
            self._coming.update(moved.given)
            self._fold_to = None
        self._forget_told()
        if not self._coming:
            return
        if self._fold_to is None:
            # Whoever had these shares before has written nothing that is not in the log by now.
            self._fold_to = self._log.end().sequence
        if self._state.checkpoint().sequence >= self._fold_to:
            self._begin()

    def mark(self, touched: Mapping[Key, At], *, low: int, high: int) -> Collection[Key]:
        """Make entities dirty that are this member's to do, and note all; inside `folding`. Gives those it marked."""
        share_by_key = {key: share_of(key, shares=self._shares) for key in touched}
        self._state.shares.note(share_by_key, low=low, high=high)
        self._state.turns.place(share_by_key, low=low, high=high)
        due = {key: at for key, at in touched.items() if self._done.get(share_by_key[key], high) < high}
        self._state.mark(due)
        self._state.mark({key: at for key, at in touched.items() if key not in due}, is_due=False)
        return due

    def check(self) -> None:
        """Let a write through that is still this member's to do.

        Raises:
            MembershipLostError: it is not known to be; nothing may be written.
        """
        if time.monotonic() - self._confirmed_at > self._membership.lease_s:
            self.confirm()

    def confirm(self, *, every_s: float = 0.0) -> None:
        """Say how far this member's shares are.

        Raises:
            MembershipLostError: nobody heard it.
        """
        began_at = time.monotonic()
        if not self._done or began_at - self._confirmed_at < every_s:
            return
        self._advance()
        self._count_documents(began_at - self._confirmed_at)
        saying = dict(self._done), self._standing
        if every_s and saying == self._confirmed and began_at - self._confirmed_at < self._membership.lease_s:
            return
        self._membership.confirm(self._done, note=replace(self._standing, said_at=time.time()).to_note())
        self._confirmed = saying
        self._confirmed_at = began_at
        self._documents = metrics.documents_of(self._name)

    def keep_own(self) -> None:
        """Let go of entities that were made due and are others'; inside `settling`."""
        self._state.shares.keep_only(self._done)

    def members_progress(self) -> Mapping[int, int]:
        """How far every share is, whoever has it, after saying so of one's own."""
        self.confirm()
        return self._membership.progress()

    def close(self) -> None:
        """Leave the group, after saying how far the shares are; a second call does nothing."""
        self._standing = replace(self._standing, has_left=True)
        try:
            self.confirm()
        except DeltaworksError as error:
            logger.warning("a member leaves without a word", app=self._name, error=str(error))
        self._done = {}
        self._membership.close()

    def _begin(self) -> None:
        checkpoint = self._state.checkpoint()
        with self._state.settling():
            for share, done in self._coming.items():
                self._state.shares.begin(share, done=done)
                if self._app.lookups:
                    self._state.shares.begin_anew(share, position=checkpoint.position.value)
                self._state.turns.begin(share, done=done)
        logger.info("shares are taken", app=self._name, shares=sorted(self._coming))
        self._done.update(self._coming)
        self._coming = {}
        metrics.SHARES.labels(self._name).set(len(self._done))
        # What came with another generation is no proof for this one.
        self._confirmed_at = float("-inf")

    def _leave(self, shares: Collection[int]) -> Mapping[int, int]:
        self._advance()
        done = {share: self._done[share] for share in shares if share in self._done}
        self._drop(shares)
        logger.info("shares are left", app=self._name, shares=sorted(shares))
        return done

    def _drop(self, shares: Collection[int]) -> None:
        for share in shares:
            self._done.pop(share, None)
            self._coming.pop(share, None)
        metrics.SHARES.labels(self._name).set(len(self._done))
        with self._state.settling():
            self._state.shares.end(shares)
            self._state.turns.end(shares)

    def _forget_told(self) -> None:
        if self._app.reactions and time.monotonic() - self._forgot_at > FORGET_EVERY_S:
            done = self._membership.progress()
            with self._state.settling():
                self._state.turns.forget_done(done)
            self._forgot_at = time.monotonic()

    def _advance(self) -> None:
        checkpoint = self._state.checkpoint()
        documents, turns = self._state.shares.undone(), self._state.turns.first_undone()
        beyond = checkpoint.sequence + 1
        for share, done in self._done.items():
            first = documents[share].low if share in documents else beyond
            self._done[share] = max(done, min(first, turns.get(share, beyond)) - 1)
        waiting = [documents[share].waiting_since for share in self._done if share in documents]
        counts = self._state.counts()
        self._standing = replace(
            self._standing,
            sequence=checkpoint.sequence,
            offset=checkpoint.offset,
            reached=checkpoint.reached,
            waiting_since=min((since for since in waiting if since is not None), default=None),
            to_do=counts[Standing.DIRTY],
            held=counts[Standing.HELD],
            dead=counts[Standing.DEAD] + self._state.turns.dead_count(),
        )

    def _count_documents(self, seconds: float) -> None:
        """Say at which rate documents left since the group heard of this member, or since long ago."""
        count = metrics.documents_of(self._name)
        rate = 0.0 if seconds == float("inf") else (count - self._documents) / max(seconds, CONFIRM_EVERY_S)
        self._standing = replace(self._standing, documents_per_s=round(rate, 1))
