"""The `stator` command. What a command needs is imported when it runs, so that `--help` is quick."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from stator.cli.overrides import split_overrides

if TYPE_CHECKING:
    from stator.graph.serve import ServeOptions

OVERRIDES = "stator.overrides"
DEMO_TARGET = "graphs.disagg_router:Frontend"
DEMO_COMPONENT = "components.prefill_worker:PrefillWorker"
DEMO_CONFIG = Path("configs/tiny.yaml")


class ServeCommand(TyperCommand):
    """Takes `--Service.key=value` out of the arguments before the declared options are parsed."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[OVERRIDES], rest = split_overrides(args)
        return super().parse_args(ctx, rest)


typer_app = typer.Typer(
    name="stator",
    help="Serve large language models over several machines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_Config = Annotated[Path | None, typer.Option("--file", "-f", help="YAML with a section per service.")]
_Join = Annotated[
    str | None, typer.Option(metavar="HOST[:PORT]", help="Join the deployment of the head at this address.")
]
_Namespace = Annotated[str, typer.Option(help="The deployment's name; two deployments share nothing.")]
_TokenFile = Annotated[
    Path | None, typer.Option(help="File with the deployment's token; default: STATOR_TOKEN, then this user's file.")
]
_Host = Annotated[str, typer.Option(help="Address that the services of this node listen on for each other.")]
_Advertise = Annotated[
    str | None, typer.Option(help="Address that other nodes are told; default: the one that routes to the head.")
]
_PortRange = Annotated[str | None, typer.Option(metavar="FIRST-LAST", help="Ports for the services; default: any.")]
_HubHost = Annotated[str | None, typer.Option(help="Address that the head's hub listens on; default: --host.")]
_HubPort = Annotated[int, typer.Option(min=0, max=65535, help="Port of the head's hub; 0 takes a free one.")]
_Grace = Annotated[float, typer.Option(min=0.0, help="Seconds to finish requests after Ctrl-C or SIGTERM.")]


@typer_app.command(cls=ServeCommand)
def serve(
    context: typer.Context,
    target: Annotated[str, typer.Argument(metavar="TARGET", help="module[:Service] or path.py[:Service]")],
    file: _Config = None,
    join: _Join = None,
    namespace: _Namespace = "stator",
    token_file: _TokenFile = None,
    host: _Host = "0.0.0.0",
    advertise: _Advertise = None,
    port_range: _PortRange = None,
    hub_host: _HubHost = None,
    hub_port: _HubPort = 7440,
    grace: _Grace = 30.0,
) -> None:
    """Start the services of a graph on this node, or one component that joins a deployment.

    Any option of the configuration can be given as --Service.key=value, for instance --VllmWorker.max-num-seqs=8.
    """
    from stator.graph.serve import ServeOptions
    from stator.graph.supervisor import Settings

    _run(
        ServeOptions(
            target=target,
            directory=Path.cwd(),
            config=file,
            overrides=tuple(context.meta[OVERRIDES]),
            namespace=namespace,
            join=join,
            token_file=token_file,
            host=host,
            advertise=advertise,
            port_range=port_range,
            hub_host=hub_host,
            hub_port=hub_port,
            settings=Settings(grace_s=grace),
        )
    )


@typer_app.command(cls=ServeCommand)
def demo(
    context: typer.Context,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the HTTP address.")] = 8000,
    join: _Join = None,
    namespace: _Namespace = "stator",
    token_file: _TokenFile = None,
    host: _Host = "0.0.0.0",
    advertise: _Advertise = None,
    hub_port: _HubPort = 7440,
) -> None:
    """Serve a tiny bundled model: a frontend, a decode and a prefill worker, each a process. No GPU, no download.

    With --join, add one more prefill worker to the demo that runs there.
    """
    from stator.graph.banner import JoinLine
    from stator.graph.serve import ServeOptions

    overrides: tuple[tuple[str, str], ...] = tuple(context.meta[OVERRIDES])
    _run(
        ServeOptions(
            target=DEMO_TARGET if join is None else DEMO_COMPONENT,
            directory=example_directory(),
            config=DEMO_CONFIG,
            overrides=(("--Frontend.port", str(port)), *overrides),
            namespace=namespace,
            join=join,
            token_file=token_file,
            host=host,
            advertise=advertise,
            hub_port=hub_port,
            join_lines=(
                JoinLine(
                    "prefill worker", ("stator", "demo"), "make demo JOIN={head}    # in a clone of the repository"
                ),
            ),
        )
    )


@typer_app.command()
def version() -> None:
    """Print the version."""
    from stator import __version__

    typer.echo(__version__)


def example_directory() -> Path:
    """The example graphs: in the package when installed, beside `src` in a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "_examples" / "llm"
    return installed if installed.is_dir() else package.parent.parent / "examples" / "llm"


def _run(options: "ServeOptions") -> None:
    from stator.errors import ConfigError
    from stator.graph.protocol import ExitCode
    from stator.graph.serve import serve
    from stator.runtime.loop import run_loop

    try:
        code = run_loop(serve(options))
    except ConfigError as error:
        typer.echo(f"stator: {error}", err=True)
        code = ExitCode.CONFIG
    except KeyboardInterrupt:
        code = ExitCode.FAILURE
    raise typer.Exit(int(code))


def app() -> None:
    """Entry point of the installed command."""
    typer_app()


if __name__ == "__main__":
    sys.exit(app())
