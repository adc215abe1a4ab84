"""Commands for a deployment that runs: `stator drain`, `stator status`."""

import contextlib
from typing import TYPE_CHECKING, Annotated

import typer

from stator.cli.connection import AsJson, Join, Namespace, TokenFile, control_options, print_json, run

if TYPE_CHECKING:
    from stator.cli.status import Status


def drain(
    name: Annotated[
        str, typer.Argument(metavar="INSTANCE", help="Its id, the beginning of that, or a service (see --all).")
    ],
    all_of_service: Annotated[
        bool, typer.Option("--all", help="INSTANCE is a service: all of its instances, one after another.")
    ] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Start it again; with --all, a rolling restart.")] = False,
    timeout: Annotated[
        float, typer.Option(min=0.0, help="Seconds to finish requests; what is left then goes on elsewhere.")
    ] = 60.0,
    start_timeout: Annotated[
        float, typer.Option(min=0.0, help="With --restart: seconds for the new instance to be ready.")
    ] = 900.0,
    join: Join = None,
    namespace: Namespace = "stator",
    token_file: TokenFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what happened as JSON.")] = False,
) -> None:
    """Take an instance out of service without losing a request.

    It gets no new requests, finishes those it has, and its process ends, with all services in it; the node does not
    start it again, unless --restart is given. Interrupting this command does not stop a drain that has begun.
    """
    from stator.cli.drain import DrainOptions
    from stator.cli.drain import drain as carry_out

    what = DrainOptions(name, all_of_service, restart, timeout, start_timeout)
    options = control_options(join, namespace, token_file)
    drained = run(carry_out(options, what, lambda line: typer.echo(line, err=as_json)))
    if as_json:
        print_json({"drained": drained})


def status(
    join: Join = None,
    namespace: Namespace = "stator",
    token_file: TokenFile = None,
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", help="Again every two seconds, until Ctrl-C.")] = False,
) -> None:
    """Show a deployment's instances, with their leases and drains, and its queues."""
    from stator.cli.status import read_status, show, terminal, watch_status

    options = control_options(join, namespace, token_file)
    console = terminal()

    def show_again(found: "Status") -> None:
        if as_json:
            _print_line(found)
        else:
            console.clear()
            show(found, console)

    if watch:
        with contextlib.suppress(KeyboardInterrupt):
            run(watch_status(options, show_again, lambda line: typer.echo(f"stator: {line}", err=True)))
        return
    found = run(read_status(options))
    if as_json:
        print_json(found)
    else:
        show(found, console)


def _print_line(document: object) -> None:
    import msgspec

    typer.echo(msgspec.json.encode(document).decode())
