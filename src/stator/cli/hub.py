"""`stator hub`: the control plane alone."""

from pathlib import Path
from typing import Annotated

import typer


def hub(
    namespace: Annotated[str, typer.Option(help="The deployment's name; two deployments share nothing.")] = "stator",
    token_file: Annotated[
        Path | None,
        typer.Option(help="File with the deployment's token; default: STATOR_TOKEN, then this user's file."),
    ] = None,
    hub_host: Annotated[str, typer.Option(help="Address that the hub listens on.")] = "0.0.0.0",
    hub_port: Annotated[int, typer.Option(min=0, max=65535, help="Its port; 0 takes a free one.")] = 7440,
    advertise: Annotated[
        str | None, typer.Option(help="Address that other nodes are told; default: this host's.")
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(metavar="NAMESPACE", help="Another namespace whose graphs may join; repeat it for several."),
    ] = None,
) -> None:
    """Run the control plane alone: discovery and the prefill queue, without a service and without HTTP.

    Every node then joins it (stator serve TARGET --join HOST:PORT), and can be restarted by itself. The hub may be
    restarted as well: who serves goes on meanwhile, and registers again.
    """
    from stator.errors import ConfigError
    from stator.graph.hub_node import HubOptions, run_hub
    from stator.graph.protocol import ExitCode
    from stator.runtime.loop import run_loop

    options = HubOptions(namespace, token_file, hub_host, hub_port, advertise, tuple(also or ()))
    try:
        code = run_loop(run_hub(options))
    except ConfigError as error:
        typer.echo(f"stator: {error}", err=True)
        code = ExitCode.CONFIG
    except KeyboardInterrupt:
        code = ExitCode.FAILURE
    raise typer.Exit(int(code))
