"""`deltaworks app …`: begin, check, draw, run and tune stream apps."""

from pathlib import Path
from typing import Annotated

import typer

from deltaworks.cli.console import DEFAULT_CONFIG, AppName, ConfigFile, load_config, out, stop_on_signal

apps = typer.Typer(name="app", help="Begin, check, draw, run and tune stream apps.", no_args_is_help=True)


@apps.command()
def new(
    name: Annotated[str, typer.Argument(help="The app's name, a word of Python.")],
    table: Annotated[str, typer.Argument(help="The captured table whose rows are its entities.")],
    *,
    source: Annotated[str, typer.Option("--source", help="The source; the only one when left out.")] = "",
    file: Annotated[Path | None, typer.Option("--file", help="Where to write it; NAME.py when left out.")] = None,
    config: ConfigFile = DEFAULT_CONFIG,
) -> None:
    """Write a small working app over a captured table, and print what to add to deltaworks.yaml."""
    from deltaworks.operate import development

    settings = load_config(config)
    chosen = source or next(iter(settings.sources))
    path = file or Path(f"{name}.py")
    lines = development.begin_app(settings, name, source=chosen, table=table, file=path)
    out.print(f"{path} is written; add to deltaworks.yaml:\n\n{lines}", markup=False, highlight=False)


@apps.command()
def check(app_name: AppName, config: ConfigFile = DEFAULT_CONFIG) -> None:
    """Load APP_NAME and list everything in which it does not fit the captured tables."""
    from deltaworks.operate import development

    development.check_app(load_config(config), app_name)
    out.print(f"{app_name}: ready", highlight=False)


@apps.command()
def explain(app_name: AppName, config: ConfigFile = DEFAULT_CONFIG) -> None:
    """Draw the steps of APP_NAME."""
    from deltaworks.operate import development

    out.print(development.explain_app(load_config(config), app_name), markup=False, highlight=False, soft_wrap=True)


@apps.command()
def run(
    app_name: AppName,
    *,
    is_reloading: Annotated[
        bool, typer.Option("--reload", help="Restart it in place whenever its file changes; a broken edit is told of.")
    ] = False,
    config: ConfigFile = DEFAULT_CONFIG,
) -> None:
    """Run APP_NAME over its source's log, until stopped."""
    from deltaworks.operate import development, follow_process

    settings, stop = load_config(config), stop_on_signal()
    if is_reloading:
        development.follow_reloading(settings, app_name, stop=stop)
    else:
        follow_process(settings, app_name, stop=stop)


@apps.command("set")
def set_limits(
    app_name: AppName,
    limits: Annotated[
        list[str] | None, typer.Argument(help="STEP.concurrency=N or STEP.rate_per_s=N; nothing after = takes it back.")
    ] = None,
    *,
    config: ConfigFile = DEFAULT_CONFIG,
) -> None:
    """Change limits of APP_NAME's enrichments while it runs, and show those that are set."""
    from deltaworks.operate import development

    pairs = [limit.partition("=") for limit in limits or []]
    if any(not sign for _, sign, _ in pairs):
        raise typer.BadParameter("write STEP.concurrency=N", param_hint="LIMITS")
    wanted = development.tune_app(load_config(config), app_name, {name: value for name, _, value in pairs})
    for name, value in sorted(wanted.items()):
        out.print(f"{name}={value:g}", highlight=False)
