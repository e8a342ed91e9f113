"""The balance sheet of an audit, as tables for a terminal."""

from rich.table import Table

from deltaworks.capture.proof import NO_CHANGES, WindowSet, minute_start
from deltaworks.log.audit import HopAudit
from deltaworks.operate.auditing import Audit


def balance_sheet(audit: Audit, *, minutes: int) -> list[Table]:
    """Changes per table and minute of commit at every hop, entities per minute at every app, documents at every sink.

    Of the minutes the newest are shown, and the totals of all.
    """
    return [_changes(audit, minutes), *(_entities(audit, app, minutes) for app in audit.entities), _sinks(audit)]


def _changes(audit: Audit, minutes: int) -> Table:
    log, *others = audit.hops
    table = Table(
        "table", "minute (UTC)", "reader", "log", *(hop.hop for hop in others), title=f"{audit.source}: changes"
    )
    keys = sorted({key for hop in audit.hops for key in hop.handed.windows}, key=lambda key: (key[1], key[0]))
    newest = set(sorted({minute for _, minute in keys})[-minutes:])
    for name, minute in keys:
        if minute in newest:
            cells = [_cell(audit, hop, name, minute) for hop in others]
            seen = log.handed.windows.get((name, minute), NO_CHANGES).count
            table.add_row(
                name, f"{minute_start(minute):%F %H:%M}", f"{seen:,}", _cell(audit, log, name, minute), *cells
            )
    counts = [sum(hop.arrived.counts.values()) for hop in audit.hops]
    table.add_row("all", "", f"{sum(log.handed.counts.values()):,}", *(f"{count:,}" for count in counts))
    return table


def _cell(audit: Audit, hop: HopAudit, table: str, minute: int) -> str:
    key = (table, minute)
    handed, arrived = hop.handed.windows.get(key, NO_CHANGES), hop.arrived.windows.get(key, NO_CHANGES)
    waiting = hop.waiting.windows.get(key, NO_CHANGES).count
    later = f" +{waiting:,} later" if waiting else ""
    if handed == arrived:
        return f"{arrived.count:,}{later}" if arrived.count or later else "–"
    mended = audit.mended.get(hop.hop, WindowSet()).windows.get(key, NO_CHANGES)
    repaired = ", repaired" if handed.subtract(arrived) == mended else ""
    return f"{arrived.count:,} of {handed.count:,}{repaired}{later}"


def _entities(audit: Audit, app: str, minutes: int) -> Table:
    columns = ("entities", "left", "filtered", "gone", "waiting", "held", "dead")
    table = Table("minute (UTC)", *columns, title=f"{app}: entities by newest change")
    stood = audit.entities[app]
    for each in stood[-minutes:]:
        numbers = (getattr(each, column) for column in columns)
        table.add_row(f"{minute_start(each.minute):%F %H:%M}", *(f"{number:,}" for number in numbers))
    table.add_row("all", *(f"{sum(getattr(each, column) for each in stood):,}" for column in columns))
    return table


def _sinks(audit: Audit) -> Table:
    table = Table("sink", "documents that left", "missing", title="sinks")
    for each in audit.sinks:
        later = f" +{each.undecided:,} later" if each.undecided else ""
        missing = f"{each.missing:,}{later}" if each.is_readable else "not compared"
        table.add_row(f"{each.app}/{each.sink}", f"{each.documents:,}", missing)
    return table
