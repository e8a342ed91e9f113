"""The `deltaworks` command: every service and every job, one word each."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import structlog
import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from deltaworks.cli.apps import apps
from deltaworks.cli.console import (
    DEFAULT_CONFIG,
    AppName,
    Bars,
    ConfigFile,
    SourceName,
    UntilNow,
    byte_text,
    err,
    load_config,
    out,
    second_text,
    stop_on_signal,
)
from deltaworks.cli.dead import dead
from deltaworks.cli.log import log, print_verification
from deltaworks.cli.replay import replay
from deltaworks.config import Config
from deltaworks.errors import DeltaworksError

if TYPE_CHECKING:
    from deltaworks.log.archive.standing import ArchiveStatus
    from deltaworks.log.status import CanaryStatus, CaptureStatus, TableDumpStatus
    from deltaworks.operate import DumpStatus

app = typer.Typer(
    name="deltaworks",
    help="Keep every derived store in step with its source, provably.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(dead)
WATCH_EVERY_S = 2.0


app.add_typer(apps)
app.add_typer(log)


def main() -> None:
    """Run the command; an error on purpose is one message and exit code 1, never a traceback."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer() if not sys.stderr.isatty() else structlog.dev.ConsoleRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
    )
    try:
        app()
    except DeltaworksError as error:
        err.print(f"deltaworks: {error}", style="red", markup=False, highlight=False)
        sys.exit(1)


@app.command()
def check(
    source: SourceName,
    *,
    sql: Annotated[
        bool, typer.Option("--sql", help="Print the SQL of a role that can do all of it and nothing more.")
    ] = False,
    config: ConfigFile = DEFAULT_CONFIG,
) -> None:
    """List everything that keeps SOURCE from being captured, with the statement that mends it; then warnings."""
    from deltaworks import operate
    from deltaworks.capture.source import Severity

    if sql:
        out.print(operate.least_role(load_config(config), source), markup=False, highlight=False, soft_wrap=True)
        return
    findings = operate.check(load_config(config), source)
    for finding in findings:
        sign = "•" if finding.severity is Severity.ERROR else "• warning:"
        out.print(f"{sign} {finding.what}\n    {finding.mend}", markup=False, highlight=False, soft_wrap=True)
    errors = sum(finding.severity is Severity.ERROR for finding in findings)
    out.print(f"{source}: {errors} to mend" if errors else f"{source}: ready", highlight=False)
    if errors:
        raise typer.Exit(1)


@app.command()
def capture(
    source: SourceName,
    until_now: UntilNow = False,
    metrics: Annotated[
        int | None, typer.Option("--metrics", metavar="PORT", help="Give Prometheus metrics on this port.")
    ] = None,
    config: ConfigFile = DEFAULT_CONFIG,
) -> None:
    """Keep the change log of SOURCE in step with its database, until stopped."""
    from deltaworks import operate
    from deltaworks.capture.memory import leave_pandas_out

    settings = load_config(config)
    if until_now:
        with Bars() as bars:
            out.print(operate.capture(settings, source, on_progress=bars).summary, highlight=False)
        return
    leave_pandas_out()
    stop = stop_on_signal()
    with (
        operate.metrics_server(settings, source, port=metrics),
        operate.retiring(settings, source),
        operate.archiving(settings, source),
    ):
        operate.follow_capture(settings, source, stop=stop)


@app.command()
def dump(
    source: SourceName,
    tables: Annotated[list[str] | None, typer.Argument(help="Captured tables; all when none is named.")] = None,
    *,
    keys: Annotated[
        list[str] | None,
        typer.Option(
            "--keys",
            help="Read the rows of these keys of one table: 5,77,1000, or @FILE with one key on each line. "
            "A key of several columns is given whole: --keys 7,a --keys 8,b.",
        ),
    ] = None,
    where: Annotated[
        str | None, typer.Option("--where", help="Read the rows of one table for which this SQL condition holds.")
    ] = None,
    is_status: Annotated[bool, typer.Option("--status", help="Show dumps under way and ended ones.")] = False,
    pause: Annotated[str | None, typer.Option("--pause", metavar="ID", help="Pause a dump.")] = None,
    resume: Annotated[str | None, typer.Option("--resume", metavar="ID", help="Go on with a paused dump.")] = None,
    cancel: Annotated[
        str | None, typer.Option("--cancel", metavar="ID", help="End a dump; what it read stays.")
    ] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Ask for the dump and return.")] = False,
    config: ConfigFile = DEFAULT_CONFIG,
) -> None:
    """Read existing rows of SOURCE into its change log again: all tables, some, some keys, or by a condition.

    A running capture service does it beside its stream; without one this command does. Ctrl-C stops waiting,
    not the service's dump.
    """
    from deltaworks import operate
    from deltaworks.log.dump_requests import Wanted

    settings = load_config(config)
    for dump_id, wanted in ((pause, Wanted.PAUSE), (resume, Wanted.RUN), (cancel, Wanted.CANCEL)):
        if dump_id is not None:
            operate.want(settings, source, dump_id, wanted)
            return
    if is_status:
        _print_dumps(operate.dumps(settings, source))
        return
    named = tables or []
    asked = operate.parse_keys(settings, source, named[0], keys) if keys and named else []
    if keys and not asked:
        raise typer.BadParameter("give one table and at least one key", param_hint="--keys")
    if no_wait:
        out.print(operate.ask(settings, source, named, keys=asked, where=where), highlight=False)
        return
    with Bars() as bars:
        dumped = operate.dump(
            settings,
            source,
            named,
            keys=asked,
            where=where,
            on_asked=lambda dump_id: err.print(f"dump {dump_id}", highlight=False),
            on_progress=lambda table: bars(f"dump {table.table}", table.done, table.total or table.done),
        )
    out.print(dumped.summary, highlight=False)
    for key in dumped.outcome.missing:
        out.print(f"not found: {','.join(key)}", markup=False, highlight=False)
    for name in dumped.outcome.unknown_tables:
        out.print(f"not captured: {name}", markup=False, highlight=False)
    if dumped.outcome.missing or dumped.outcome.unknown_tables:
        raise typer.Exit(1)


@app.command()
def process(
    app_name: AppName,
    until_now: UntilNow = False,
    *,
    keys: Annotated[
        list[str] | None,
        typer.Option("--keys", help="Make the documents of these keys anew: 5,77 or @FILE with one key on each line."),
    ] = None,
    is_pause: Annotated[bool, typer.Option("--pause", help="Let the app stand still, wherever it runs.")] = False,
    is_resume: Annotated[bool, typer.Option("--resume", help="Let a paused app go on.")] = False,
    is_all: Annotated[bool, typer.Option("--reprocess", help="Make every document anew, then stop.")] = False,
    metrics: Annotated[
        int | None, typer.Option("--metrics", metavar="PORT", help="Give Prometheus metrics on this port.")
    ] = None,
    config: ConfigFile = DEFAULT_CONFIG,
) -> None:
    """Run the app APP_NAME over its source's log, until stopped.

    With --keys or --reprocess it makes documents anew though nothing changed, for a changed step or service, and
    stops. A running service does that beside its stream; without one this command does.
    """
    from deltaworks import operate

    settings = load_config(config)
    if is_pause or is_resume:
        (operate.pause if is_pause else operate.resume)(settings, app_name)
        return
    if keys or is_all:
        with Bars() as bars:
            answered = operate.reprocess(
                settings,
                app_name,
                keys=operate.parse_asked(keys) if keys else None,
                on_progress=lambda done, total: bars(f"{app_name}: documents", done, total),
            )
        out.print(answered.summary, highlight=False)
        if answered.outcome.missing or answered.outcome.set_back:
            raise typer.Exit(1)
        return
    if until_now:
        with Bars() as bars:
            out.print(operate.process(settings, app_name, on_progress=bars).summary, highlight=False)
        return
    stop = stop_on_signal()
    with operate.app_metrics_server(settings, app_name, port=metrics):
        operate.follow_process(settings, app_name, stop=stop)


@app.command()
def load(log: Annotated[str, typer.Argument(help="A source or an app.")], config: ConfigFile = DEFAULT_CONFIG) -> None:
    """Bring the lake to the end of a log, all tables in one commit."""
    from deltaworks import operate

    out.print(operate.load(load_config(config), log).summary, highlight=False)


@app.command()
def verify(
    source: SourceName,
    *,
    is_log: Annotated[
        bool, typer.Option("--log", help="Check the change log against what its reader saw, instead of the lake.")
    ] = False,
    config: ConfigFile = DEFAULT_CONFIG,
) -> None:
    """Compare SOURCE with the lake at one position, row by row."""
    from deltaworks import operate

    if is_log:
        print_verification(load_config(config), source)
        return
    verification = operate.verify(load_config(config), source)
    table = Table("table", "source rows", "lake rows", "differing", title=f"{source} at {verification.position}")
    for verdict in verification.tables:
        table.add_row(verdict.table, f"{verdict.source_rows:,}", f"{verdict.lake_rows:,}", f"{verdict.differing:,}")
    out.print(table)
    out.print("source = lake" if verification.is_equal else "source ≠ lake", highlight=False)
    if not verification.is_equal:
        raise typer.Exit(1)


@app.command()
def audit(
    source: SourceName,
    *,
    is_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    is_repair: Annotated[
        bool, typer.Option("--repair", help="Dump the keys of open incidents again, those that are found now too.")
    ] = False,
    is_listing: Annotated[
        bool, typer.Option("--incidents", help="List what was found so far instead of looking.")
    ] = False,
    is_since_last: Annotated[bool, typer.Option("--new", help="Look only at what came since the last audit.")] = False,
    minutes: Annotated[int, typer.Option("--minutes", min=1, help="How many of the newest minutes to show.")] = 15,
    config: ConfigFile = DEFAULT_CONFIG,
) -> None:
    """Compare what went into each hop of SOURCE with what came out; exit code 1 where something is lost."""
    from deltaworks import operate
    from deltaworks.operate.balance_sheet import balance_sheet

    settings = load_config(config)
    if is_listing:
        for incident in operate.incidents(settings, source):
            out.print(incident.summary, markup=False, highlight=False, soft_wrap=True)
        return
    found = operate.audit(settings, source, is_since_last=is_since_last)
    if is_json:
        out.print_json(data=found.to_json())
    else:
        out.print(*balance_sheet(found, minutes=minutes), sep="\n")
        for incident in found.open:
            out.print(f"• {incident.summary}", style="red", markup=False, highlight=False, soft_wrap=True)
        out.print("in = out" if found.is_balanced else "in ≠ out", highlight=False)
    if is_repair:
        for ended in operate.repair(settings, source):
            out.print(ended.summary, markup=False, highlight=False, soft_wrap=True)
    if not found.is_balanced:
        raise typer.Exit(1)


app.command()(replay)


@app.command()
def serve(config: ConfigFile = DEFAULT_CONFIG) -> None:
    """Serve the search page and the JSON API, until stopped."""
    from deltaworks.serve import http

    http.run(load_config(config))


@app.command()
def status(
    *,
    is_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again every two seconds, until Ctrl-C.")] = False,
    config: ConfigFile = DEFAULT_CONFIG,
) -> None:
    """Show every source with its tables, dumps and slot, and how far every log, app and lake has got."""
    from deltaworks import operate

    settings = load_config(config)
    if is_json:
        captured = operate.capture_statuses(settings)
        sources = {each.source: each.to_json() for each in captured}
        places = [asdict(row) for row in operate.status(settings, captured=captured)]
        out.print_json(data={"sources": sources, "places": places})
        return
    if not watch:
        out.print(_status_page(settings))
        return
    stop = stop_on_signal()
    with Live(_status_page(settings), console=out, auto_refresh=False) as live:
        while not stop.wait(WATCH_EVERY_S):
            live.update(_status_page(settings), refresh=True)


def _print_dumps(dumps: Sequence["DumpStatus"]) -> None:
    table = Table("dump", "asked at", "state", "tables")
    for dump in dumps:
        lines = [each.summary for each in dump.tables]
        if dump.outcome is not None:
            lines = [f"{name}: {rows:,} rows" for name, rows in dump.outcome.rows.items()]
            lines += [f"{len(dump.outcome.missing):,} keys not found"] if dump.outcome.missing else []
            lines += [dump.outcome.error] if dump.outcome.error else []
        table.add_row(dump.id, f"{dump.asked_at:%F %T}", dump.state, "\n".join(lines))
    out.print(table)


def _status_page(config: Config) -> Group:
    """Everything `status` shows, as of now."""
    from deltaworks import operate

    parts: list[Table] = []
    statuses = operate.capture_statuses(config)
    for captured in statuses:
        parts += [_capture_lines(captured), _capture_table(captured)]
    places = Table("what", "position", "offset", "nothing missing older than", "state")
    for row in operate.status(config, captured=statuses):
        age = "" if row.age_s is None else second_text(row.age_s)
        places.add_row(row.what, row.position, row.offset, age, row.state)
    return Group(*parts, places)


def _capture_lines(status: "CaptureStatus") -> Table:
    """What is to say of a source as a whole, a line for each part of it."""
    lines = Table.grid(padding=(0, 2))
    service = f"captured by process {status.service}" if status.service is not None else "no service"
    lines.add_row(Text(status.source, style="bold"), f"{service}, {status.changes_per_s:,.1f} changes/s")
    lines.add_row("log", f"{status.position}, {status.changes:,} changes, {status.transactions:,} transactions")
    if status.archive is not None:
        lines.add_row("archive", _archive_text(status.archive))
    if status.is_full:
        lines.add_row("disk", Text("FULL: the source waits, and keeps what it has; free space", style="red"))
    if status.canary is not None:
        lines.add_row("canary", _canary_text(status.canary))
    for gap in status.gaps:
        lines.add_row("gap", Text(gap, style="red"))
    if status.unreachable is not None:
        lines.add_row("source", Text(f"does not answer: {status.unreachable}", style="red"))
        return lines
    lines.add_row("lag", f"{second_text(status.lag_s)}, {byte_text(status.lag_bytes)} up to {status.source_position}")
    slot = status.slot
    if slot is None:
        lines.add_row("slot", "none yet")
        return lines
    room = "no limit" if slot.safe_bytes is None else f"{byte_text(slot.safe_bytes)} to spare"
    state = f"{'active' if slot.is_active else 'inactive'}, {slot.invalidation or slot.wal_status}"
    lines.add_row("slot", f"{slot.name}: {state}, {byte_text(slot.kept_bytes)} kept, {room}")
    return lines


def _canary_text(canary: "CanaryStatus") -> Text:
    text = f"{second_text(canary.age_s)} ago, {second_text(canary.took_s)} on its way"
    if canary.is_overdue:
        return Text(f"{text}; the next ones do not come through", style="red")
    return Text(text)


def _archive_text(archive: "ArchiveStatus") -> Text:
    behind = f"{archive.behind_segments:,} segments, {byte_text(archive.behind_bytes)} behind"
    text = Text(f"{archive.segments:,} segments, {byte_text(archive.bytes)}, {behind}")
    if archive.fault is not None:
        what = "stopped" if archive.fault.is_stopped else "away"
        text.append(
            f"; {what} since {archive.fault.since}, what is not archived is kept here: {archive.fault.error}",
            style="red",
        )
    return text


def _capture_table(status: "CaptureStatus") -> Table:
    table = Table("table", "position", "last change (UTC)", "changes/s", "dump")
    for each in status.tables:
        table.add_row(
            each.table,
            str(each.position or ""),
            f"{each.committed_at:%F %T}" if each.committed_at is not None else "",
            f"{each.changes_per_s:,.1f}",
            _dump_text(each.dump),
        )
    return table


def _dump_text(dump: "TableDumpStatus | None") -> str:
    if dump is None:
        return ""
    of_all = f" of about {dump.estimated_rows:,}" if dump.estimated_rows and dump.state != "done" else ""
    left = f", {second_text(dump.eta_s)} left" if dump.eta_s else ""
    return f"{dump.state}, {dump.rows:,} rows{of_all}{left}"
