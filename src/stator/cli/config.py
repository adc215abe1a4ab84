"""`stator config`: settings of a deployment that apply while it runs."""

from typing import TYPE_CHECKING, Annotated

import typer

from stator.cli.connection import AsJson, Join, Namespace, TokenFile, control_options, print_json, run

if TYPE_CHECKING:
    from stator.cli.control import ControlOptions

config_app = typer.Typer(
    name="config",
    help="Show and change settings of a running deployment; they apply without a restart.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

_Name = Annotated[str, typer.Argument(metavar="NAME", help="Of a setting; `stator config list` shows them.")]
_Timeout = Annotated[
    float, typer.Option(min=0.0, help="Seconds to wait for every process that uses the setting to apply it.")
]


@config_app.command("list")
def list_settings(
    join: Join = None, namespace: Namespace = "stator", token_file: TokenFile = None, as_json: AsJson = False
) -> None:
    """Show every setting: its value and where that comes from, what processes are configured with, who applied it."""
    from stator.cli.settings import read_settings, show_settings
    from stator.cli.status import terminal

    views = run(read_settings(control_options(join, namespace, token_file)))
    if as_json:
        print_json({"settings": views})
    else:
        show_settings(views, terminal())


@config_app.command()
def get(
    name: _Name,
    join: Join = None,
    namespace: Namespace = "stator",
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Show one setting, as `list` does."""
    from stator.cli.settings import read_settings, show_settings
    from stator.cli.status import terminal

    options = control_options(join, namespace, token_file)
    (view,) = run(read_settings(options, [name]))
    if as_json:
        print_json(view)
    else:
        show_settings([view], terminal())


# A value may be a negative number, which is refused as a value and not as an option.
@config_app.command("set", context_settings={"ignore_unknown_options": True})
def set_value(
    name: _Name,
    value: Annotated[str, typer.Argument(metavar="VALUE", help="As in a configuration file.")],
    timeout: _Timeout = 5.0,
    join: Join = None,
    namespace: Namespace = "stator",
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Set a setting for all processes that use it, whatever each is configured with.

    Waits until they have applied it. The exit code is 1 if one has not in time; the value is written even so.
    """
    _change(name, value, timeout, control_options(join, namespace, token_file), as_json)


@config_app.command()
def unset(
    name: _Name,
    timeout: _Timeout = 5.0,
    join: Join = None,
    namespace: Namespace = "stator",
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Let every process go back to what it is configured with."""
    _change(name, None, timeout, control_options(join, namespace, token_file), as_json)


def _change(name: str, value: str | None, timeout_s: float, options: "ControlOptions", as_json: bool) -> None:
    from stator.cli.settings import change_setting, describe_change

    change = run(change_setting(options, name, value, timeout_s))
    if as_json:
        print_json(change)
    else:
        for line in describe_change(change):
            typer.echo(line)
    if change.late:
        raise typer.Exit(1)
