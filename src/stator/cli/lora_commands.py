"""`stator lora`: LoRA adapters of a running deployment."""

from typing import TYPE_CHECKING, Annotated

import typer

from stator.cli.connection import AsJson, Join, Namespace, TokenFile, control_options, print_json, run

if TYPE_CHECKING:
    from stator.cli.lora import Change

lora_app = typer.Typer(
    name="lora",
    help="Show, load and unload the LoRA adapters of a running deployment, which are models to clients.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

_Name = Annotated[str, typer.Argument(metavar="NAME", help='Of the adapter; what clients put into "model".')]
_Instances = Annotated[
    list[str] | None,
    typer.Option(
        "--instance", metavar="ID", help="A worker, or the beginning of its id; may be repeated; default: all."
    ),
]


@lora_app.command("list")
def list_adapters(
    join: Join = None, namespace: Namespace = "stator", token_file: TokenFile = None, as_json: AsJson = False
) -> None:
    """Show which workers have which adapters."""
    from stator.cli.lora import read_adapters, show_adapters
    from stator.cli.status import terminal

    views = run(read_adapters(control_options(join, namespace, token_file)))
    if as_json:
        print_json({"adapters": views})
    else:
        show_adapters(views, terminal())


@lora_app.command()
def load(
    name: _Name,
    path: Annotated[str, typer.Argument(metavar="PATH", help="Of its directory, absolute, on the workers' nodes.")],
    instance: _Instances = None,
    join: Join = None,
    namespace: Namespace = "stator",
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Load an adapter on decode and prefill workers; requests for it go to those that have it.

    It lasts as long as a worker's process: put it into the worker's lora-modules to have it after each start. The exit
    code is 1 if a worker could not load it.
    """
    from stator.cli.lora import LoraTarget
    from stator.cli.lora import load as carry_out

    options = control_options(join, namespace, token_file)
    target = LoraTarget(name, tuple(instance or ()))
    _tell(run(carry_out(options, target, path, lambda line: typer.echo(line, err=as_json))), as_json)


@lora_app.command()
def unload(
    name: _Name,
    instance: _Instances = None,
    timeout: Annotated[
        float, typer.Option(min=0.0, help="Seconds to finish its requests; what is left goes on where it still is.")
    ] = 60.0,
    join: Join = None,
    namespace: Namespace = "stator",
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Unload an adapter: no new requests for it are taken, those that run are finished first.

    Interrupting this command does not stop what has begun. The exit code is 1 if a worker could not unload it.
    """
    from stator.cli.lora import LoraTarget
    from stator.cli.lora import unload as carry_out

    options = control_options(join, namespace, token_file)
    target = LoraTarget(name, tuple(instance or ()))
    _tell(run(carry_out(options, target, timeout, lambda line: typer.echo(line, err=as_json))), as_json)


def _tell(changes: "list[Change]", as_json: bool) -> None:
    if as_json:
        print_json({"changes": changes})
    if any(change.failed for change in changes):
        raise typer.Exit(1)
