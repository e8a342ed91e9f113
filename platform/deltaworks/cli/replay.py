"""`deltaworks replay`: an app over the log again, compared with what its sinks hold."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from deltaworks.cli.console import DEFAULT_CONFIG, AppName, Bars, ConfigFile, load_config, out

if TYPE_CHECKING:
    from deltaworks.operate import Replayed


def replay(
    app_name: AppName,
    *,
    start: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="POSITION|TIME",
            help="Entities that changed after this position, or at this time (UTC) or later; all when left out.",
        ),
    ] = "0/0",
    into: Annotated[
        str, typer.Option("--into", metavar="NAME", help="A replay with sinks of its own, or `same` for the app's.")
    ] = "trial",
    is_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    config: ConfigFile = DEFAULT_CONFIG,
) -> None:
    """Run APP_NAME as it is now over the log again and compare what it makes with what its sinks hold.

    The exit code is 1 where anything differs. The app's own sinks are not written to, but with `--into same`.
    """
    from deltaworks import operate

    with Bars() as bars:
        replayed = operate.replay(
            load_config(config), app_name, start=operate.parse_start(start), into=into, on_progress=bars
        )
    if is_json:
        out.print_json(data=replayed.to_json())
    else:
        _print(replayed)
    if not replayed.may_replace:
        raise typer.Exit(1)


def _print(replayed: "Replayed") -> None:
    table = Table("sink", "old", "new", "only old", "only new", "changed", "as a multiset", "moving")
    for each in replayed.comparisons:
        counts = (each.old, each.new, each.only_old, each.only_new, each.changed, each.multiset, each.moving)
        table.add_row(each.sink, *(f"{count:,}" for count in counts))
    out.print(table)
    for each in replayed.comparisons:
        for kind, keys in each.examples.items():
            said = f"• {each.sink}, {kind.replace('_', ' ')}: {', '.join(keys)}"
            out.print(said, markup=False, highlight=False, soft_wrap=True)
    for sink in replayed.left_out:
        out.print(f"• {sink}: not compared", markup=False, highlight=False)
    if replayed.waiting:
        out.print(f"• {replayed.waiting:,} keys wait or are dead letters and were not compared", highlight=False)
    out.print(f"{replayed.app}: {replayed.verdict}", markup=False, highlight=False, soft_wrap=True)
