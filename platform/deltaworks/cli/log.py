"""`deltaworks log …`: look into change logs, and check them."""

import json
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from deltaworks.cli.console import (
    DEFAULT_CONFIG,
    Bars,
    ConfigFile,
    SourceName,
    byte_text,
    load_config,
    out,
    second_text,
    stop_on_signal,
)
from deltaworks.config import Config
from deltaworks.log.change_log import GroupHeader, LogUsage
from deltaworks.position import Lsn

if TYPE_CHECKING:
    from deltaworks.log.archive.standing import ArchiveStatus

log = typer.Typer(name="log", help="List, look into, follow and check change logs.", no_args_is_help=True)
LogName = Annotated[str, typer.Argument(metavar="LOG", help="A source, or an app that writes to the lake.")]
IsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@log.command(name="ls")
def ls(
    name: Annotated[
        str | None, typer.Argument(metavar="[LOG]", help="List the segments of this log, and where each lies.")
    ] = None,
    *,
    is_json: IsJson = False,
    config: ConfigFile = DEFAULT_CONFIG,
) -> None:
    """List the change logs: groups and offsets they keep, the position they have got to, what they take, their age."""
    from deltaworks import operate

    if name is not None:
        _list_segments(load_config(config), name, is_json=is_json)
        return
    logs = operate.list_logs(load_config(config))
    if is_json:
        out.print_json(data=[each.to_json() for each in logs])
        return
    table = Table("log", "kind", "groups", "offsets", "position", "segments", "size", "oldest", "writer")
    has_archive = any(each.archive is not None for each in logs)
    if has_archive:
        table.add_column("archived")
    now = datetime.now(UTC)
    for each in logs:
        oldest, usage = each.oldest, each.usage
        table.add_row(
            each.name,
            each.kind,
            f"{oldest.sequence:,} – {each.end.sequence:,}" if oldest else each.away or "none yet",
            f"{oldest.offset:,} – {each.end.offset:,}" if oldest else "",
            str(each.end.position) if oldest else "",
            _segments_text(usage) if usage else "",
            _size_text(usage) if usage else "",
            f"{second_text((now - oldest.appended_at).total_seconds())} ago" if oldest else "",
            f"process {each.writer}" if each.writer is not None else "",
            *([_archived_text(each.archive)] if has_archive else []),
        )
    out.print(table)


def _archived_text(archive: "ArchiveStatus | None") -> str:
    if archive is None:
        return ""
    behind = f", {archive.behind_segments:,} to go" if archive.behind_segments else ""
    return f"{archive.segments:,}{behind}{', see status' if archive.fault else ''}"


def _list_segments(config: Config, name: str, *, is_json: bool) -> None:
    from deltaworks import operate

    places = operate.list_segments(config, name)
    if is_json:
        out.print_json(data=[asdict(place) for place in places])
        return
    table = Table("groups", "size", "lies")
    for place in places:
        last = f"{place.last:,}" if place.last is not None else "…"
        table.add_row(f"{place.first:,} – {last}", byte_text(place.bytes), ", ".join(place.where))
    out.print(table)


@log.command()
def inspect(
    name: LogName,
    *,
    sequence: Annotated[int | None, typer.Option("--sequence", help="The group of this number.")] = None,
    offset: Annotated[
        int | None, typer.Option("--offset", help="The group that holds the change of this offset.")
    ] = None,
    position: Annotated[
        str | None, typer.Option("--position", help="The first group that reached this position of the source.")
    ] = None,
    time: Annotated[
        datetime | None,
        typer.Option(
            "--time", formats=["%Y-%m-%dT%H:%M:%S", "%Y-%m-%d"], help="The first group with a commit since (UTC)."
        ),
    ] = None,
    is_rows: Annotated[
        bool, typer.Option("--rows", help="Print the changes with their rows too: this is row data.")
    ] = False,
    config: ConfigFile = DEFAULT_CONFIG,
) -> None:
    """Show one group of LOG as JSON, the last one when no place is given: its header and its tables, no row data."""
    from deltaworks import operate

    if sum(place is not None for place in (sequence, offset, position, time)) > 1:
        raise typer.BadParameter("give one place", param_hint="--sequence, --offset, --position, --time")
    settings = load_config(config)
    header = operate.find_group(
        settings,
        name,
        sequence=sequence,
        offset=offset,
        position=Lsn.parse(position) if position is not None else None,
        moment=time.replace(tzinfo=UTC) if time is not None else None,
    )
    shown = header_json(header)
    if is_rows:
        shown["rows"] = {each.table: each.rows for each in operate.group_rows(settings, name, header.sequence)}
    out.print_json(json.dumps(shown, default=str))


@log.command()
def tail(
    name: LogName,
    *,
    count: Annotated[int, typer.Option("-n", "--groups", min=0, help="How many of the newest groups to show.")] = 10,
    is_following: Annotated[bool, typer.Option("-f", "--follow", help="Go on with new groups until Ctrl-C.")] = False,
    is_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for each group.")] = False,
    config: ConfigFile = DEFAULT_CONFIG,
) -> None:
    """Print the newest groups of LOG, one line each: no row data."""
    from deltaworks import operate

    stop = stop_on_signal() if is_following else None
    for header in operate.newest_groups(load_config(config), name, count=count, follow=stop):
        line = json.dumps(header_json(header), default=str) if is_json else _line(header)
        out.print(line, markup=False, highlight=False, soft_wrap=True)


@log.command()
def retire(
    source: SourceName,
    *,
    is_listing: Annotated[
        bool, typer.Option("--readers", help="Only show the group up to which each reader is done.")
    ] = False,
    config: ConfigFile = DEFAULT_CONFIG,
) -> None:
    """Remove the oldest segments of SOURCE's log that its settings do not keep; a capture service does it itself."""
    from deltaworks import operate

    settings = load_config(config)
    if is_listing:
        for reader, sequence in sorted(operate.read_up_to(settings, source).items()):
            out.print(f"{reader}: {f'group {sequence}' if sequence >= 0 else 'has not begun'}", highlight=False)
        return
    done = operate.retire_log(settings, source)
    out.print(
        f"{source}: {done.segments:,} segments, {byte_text(done.bytes)} removed; the log keeps groups from "
        f"{done.oldest_sequence} on",
        highlight=False,
    )
    if done.unarchived:
        out.print(
            f"{done.unarchived:,} segments stay until they are archived; see `deltaworks status`", highlight=False
        )
    if done.left_behind:
        out.print(f"left behind: {', '.join(done.left_behind)}; run `deltaworks dump {source}`", highlight=False)


@log.command()
def archive(source: SourceName, config: ConfigFile = DEFAULT_CONFIG) -> None:
    """Copy closed segments of SOURCE's log to its archive now; a capture service does it itself."""
    from deltaworks import operate

    settings = load_config(config)
    done = operate.archive_log(settings, source)
    size = byte_text(sum(segment.bytes for segment in done))
    out.print(f"{source}: {len(done):,} segments, {size} archived", highlight=False)


@log.command()
def restore(source: SourceName, config: ConfigFile = DEFAULT_CONFIG) -> None:
    """Make the log of SOURCE, whose folder was lost, anew from its archive; its segments stay there until read."""
    from deltaworks import operate

    settings = load_config(config)
    done = operate.restore_log(settings, source)
    kept = done.log
    out.print(
        f"{source}: groups {kept.first} to {kept.last}, up to {kept.position}, are back: {kept.segments:,} segments, "
        f"{byte_text(kept.bytes)} in the archive; capture goes on from there",
        highlight=False,
    )
    if kept.lost:
        out.print(f"left out, for what follows them is gone: {', '.join(kept.lost)}", highlight=False)
    for reader, sequence in sorted(done.ahead.items()):
        kind, _, name = reader.partition(" ")
        made = f"schema lake.{source} and its row in lake.deltaworks.load"
        if kind == "app":
            made = f"{str(settings.app_folder(name))!r} and what its sinks hold"
        out.print(
            f"{reader} has read up to group {sequence}, which is lost, and will not go on: remove {made}; it then "
            "reads the log from its first group",
            highlight=False,
            soft_wrap=True,
        )


@log.command()
def begin(
    source: Annotated[str | None, typer.Argument(help="A source, whose log the lake has not loaded yet.")] = None,
    *,
    app: Annotated[str | None, typer.Option("--app", help="An app that has not read anything yet, instead.")] = None,
    config: ConfigFile = DEFAULT_CONFIG,
) -> None:
    """Begin a new reader, the lake or an app, in a log that was shortened: at its oldest group, with a dump."""
    from deltaworks import operate

    settings = load_config(config)
    if (source is None) == (app is None):
        raise typer.BadParameter("give a source or an app", param_hint="SOURCE, --app")
    begun = operate.begin_lake(settings, source) if source is not None else operate.begin_app(settings, app or "")
    out.print(
        f"{begun.reader} begins with group {begun.sequence}; the dump {begun.dump} brings the rows from before it, "
        "with the capture service or the next `deltaworks capture`",
        highlight=False,
    )


@log.command()
def verify(name: LogName, config: ConfigFile = DEFAULT_CONFIG) -> None:
    """Read all of LOG: checksums, the chain of groups, and what its reader saw; exit code 1 where one is broken."""
    print_verification(load_config(config), name)


@log.command()
def mend(name: LogName, config: ConfigFile = DEFAULT_CONFIG) -> None:
    """Read all of LOG and mend what is damaged: from a copy, or by a named gap that capture dumps again.

    A capture service mends by itself what any reader meets. What the log of an app lost, the app makes anew.
    """
    from deltaworks import operate

    with Bars() as bars:
        report = operate.mend_log(load_config(config), name, on_progress=bars)
    for lost in report.lost:
        out.print(f"• {lost.summary}", markup=False, highlight=False, soft_wrap=True)
    out.print(report.summary, markup=False, highlight=False, soft_wrap=True)
    if report.lost and report.made_anew is None:
        out.print(
            f"the capture service, or `deltaworks capture {name} --until-now`, dumps the tables again",
            highlight=False,
            soft_wrap=True,
        )


def print_verification(config: Config, name: str) -> None:
    """Check a log and say how it is."""
    from deltaworks import operate

    with Bars() as bars:
        report = operate.verify_log(config, name, on_progress=bars)
    for fault in report.faults:
        out.print(f"• {fault}", markup=False, highlight=False, soft_wrap=True)
    for lost in report.lost:
        out.print(f"• {lost}", markup=False, highlight=False, soft_wrap=True)
    unproven = f", {report.unproven:,} of them without a proof" if report.unproven else ""
    counts = f"{report.changes:,} changes, {report.transactions:,} transactions, {report.groups:,} groups"
    out.print(f"{name}: {counts}{unproven}", highlight=False)
    out.print("log = reader" if report.is_whole else "log ≠ reader", highlight=False)
    if not report.is_whole:
        raise typer.Exit(1)


def header_json(header: GroupHeader) -> dict[str, Any]:  # Any: JSON values
    """What is shown of a group; capture's progress is left out: it is long, and has keys of rows in it."""
    return {
        "sequence": header.sequence,
        "offset": header.offset,
        "next_offset": header.next_offset,
        "position": str(header.position),
        "previous_position": str(header.previous_position),
        "epoch": header.epoch,
        "transactions": header.transaction_count,
        "tables": dict(header.tables),
        "min_txid": header.min_txid,
        "max_txid": header.max_txid,
        "max_committed_at": header.max_committed_at and header.max_committed_at.isoformat(),
        "appended_at": header.appended_at.isoformat(),
        "is_partial": header.is_partial,
        "is_proven": header.proof is not None,
        "lost": header.lost,
    }


def _segments_text(usage: LogUsage) -> str:
    return f"{usage.segments:,}, {usage.sealed:,} sealed" if usage.sealed else f"{usage.segments:,}"


def _size_text(usage: LogUsage) -> str:
    ratio = usage.plain_bytes / usage.bytes if usage.bytes and usage.sealed else 1.0
    return f"{byte_text(usage.bytes)}, {ratio:.1f} × compressed" if usage.sealed else byte_text(usage.bytes)


def _line(header: GroupHeader) -> str:
    tables = ", ".join(f"{table} {count:,}" for table, count in header.tables.items()) or "no changes"
    part = ", goes on in the next group" if header.is_partial else ""
    part += f"; LOST, {header.lost}" if header.lost is not None else ""
    place = f"group {header.sequence} offset {header.offset} at {header.position}"
    return f"{header.appended_at:%F %T} {place}: {tables}{part}"
