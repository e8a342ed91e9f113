"""`deltaworks dead …`: what failed for good in an app, and what is to become of it."""

import json
from typing import Annotated

import typer
from rich.table import Table

from deltaworks.cli.console import DEFAULT_CONFIG, AppName, ConfigFile, load_config, out

dead = typer.Typer(name="dead", help="List, look into, retry and drop an app's dead letters.", no_args_is_help=True)
LISTED = 100
Keys = Annotated[list[str] | None, typer.Argument(help="Keys of dead letters; all when none is named.")]


@dead.command(name="ls")
def ls(app_name: AppName, config: ConfigFile = DEFAULT_CONFIG) -> None:
    """List the dead letters of APP_NAME, the oldest failed change first: names and places, no row data.

    Of a shared app, those of every member on this machine, and how many members elsewhere have.
    """
    from deltaworks import operate

    settings = load_config(config)
    letters = operate.dead_letters(settings, app_name, limit=LISTED)
    is_shared = settings.app(app_name).shares is not None
    table = Table("key", "step", "error", "tries", "change", "failed at (UTC)", "waiting", *["member"] * is_shared)
    for letter in letters:
        waiting = f"{letter.waiting:,}" if letter.holds_key else "goes on"
        failed_at = f"{letter.failed_at:%F %T}" if letter.failed_at else ""
        table.add_row(
            str(letter.key),
            letter.step,
            letter.error,
            f"{letter.attempts:,}",
            str(letter.version.position),
            failed_at,
            waiting,
            *[letter.member] * is_shared,
        )
    out.print(table)
    if len(letters) == LISTED:
        out.print(f"the first {LISTED} of {len(operate.dead_letters(settings, app_name)):,}", highlight=False)
    for elsewhere in operate.letters_elsewhere(settings, app_name):
        out.print(elsewhere.text, highlight=False)


@dead.command()
def show(
    app_name: AppName,
    key: Annotated[str, typer.Argument(help="The key of a dead letter.")],
    *,
    rows: Annotated[
        bool, typer.Option("--rows", help="Print the key's rows too, and the changes that wait: this is row data.")
    ] = False,
    config: ConfigFile = DEFAULT_CONFIG,
) -> None:
    """Show the dead letters of one KEY of APP_NAME, as JSON."""
    from deltaworks import operate

    settings = load_config(config)
    found: dict[str, object] = {
        "letters": [
            {
                "key": letter.key,
                "step": letter.step,
                "place": letter.place,
                "error": letter.error,
                "attempts": letter.attempts,
                "column": letter.column,
                "position": str(letter.version.position),
                "ordinal": letter.version.ordinal,
                "committed_at": letter.committed_at,
                "failed_at": letter.failed_at,
                "holds_key": letter.holds_key,
                "waiting": letter.waiting,
                "member": letter.member,
            }
            for letter in operate.dead_letters(settings, app_name, key=key)
        ]
    }
    if rows:
        data = operate.dead_rows(settings, app_name, key)
        found |= {"rows": data.rows, "turns": data.turns}
    out.print_json(json.dumps(found, default=str))


@dead.command()
def retry(app_name: AppName, keys: Keys = None, config: ConfigFile = DEFAULT_CONFIG) -> None:
    """Let dead letters of APP_NAME be processed again, after what made them fail was mended.

    An entity goes out in its newest state, transitions are told in the order they happened. The running service does
    it; without one this command runs the app up to now.
    """
    from deltaworks import operate

    answered = operate.retry(load_config(config), app_name, keys=keys or None)
    out.print(answered.summary, highlight=False)
    if answered.outcome.missing:
        raise typer.Exit(1)


@dead.command()
def drop(
    app_name: AppName,
    keys: Keys = None,
    *,
    is_all: Annotated[bool, typer.Option("--all", help="Drop every letter there is.")] = False,
    config: ConfigFile = DEFAULT_CONFIG,
) -> None:
    """Give up dead letters of APP_NAME: what they stood for does not leave, and their keys go on.

    The sinks keep an entity's document as it is until the entity's next change; a transition is never told.
    """
    from deltaworks import operate

    if bool(keys) == is_all:
        raise typer.BadParameter("name keys, or say --all", param_hint="KEYS")
    answered = operate.drop(load_config(config), app_name, keys=keys or None)
    out.print(answered.summary, highlight=False)
    if answered.outcome.missing:
        raise typer.Exit(1)
