"""What every command on a running deployment has in common: how it is told which one, and what its errors become."""

from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from stator.cli.control import ControlOptions

T = TypeVar("T")

Join = Annotated[
    str | None,
    typer.Option(
        metavar="HOST[:PORT]",
        help="The head of the deployment; default: etcd and NATS if ETCD_ENDPOINTS and NATS_SERVER are set, else the "
        "head on this machine.",
    ),
]
Namespace = Annotated[str, typer.Option(help="The deployment's name.")]
TokenFile = Annotated[
    Path | None,
    typer.Option(
        help="File with the deployment's token; default: STATOR_TOKEN, then this user's file; with etcd, the one there."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def control_options(join: str | None, namespace: str, token_file: Path | None) -> "ControlOptions":
    from stator.cli.control import ControlOptions

    return ControlOptions(join, namespace, token_file)


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """The exit code is 2 for what was asked for wrongly, 1 for what failed."""
    import logging

    from stator.errors import ConfigError, StatorError
    from stator.runtime.loop import run_loop

    # What a node logs about its control plane is for nodes; here it is told as the command's own error.
    ours = logging.getLogger("stator")
    level = ours.level
    ours.setLevel(logging.ERROR)
    try:
        return run_loop(coroutine)
    except ConfigError as error:
        typer.echo(f"stator: {error}", err=True)
        raise typer.Exit(2) from None
    except StatorError as error:
        typer.echo(f"stator: {error.message}", err=True)
        raise typer.Exit(1) from None
    finally:
        ours.setLevel(level)


def print_json(document: Any) -> None:
    import msgspec

    typer.echo(msgspec.json.format(msgspec.json.encode(document), indent=2).decode())
