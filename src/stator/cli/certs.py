"""`stator certs`: certificates for TLS between the nodes of a deployment."""

from pathlib import Path
from typing import Annotated

import typer

certs_app = typer.Typer(
    name="certs",
    help="Make an authority for a deployment, and certificates for its nodes.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

_Authority = Annotated[Path, typer.Argument(metavar="AUTHORITY", help="Its directory; ca.key in it stays there.")]


@certs_app.command()
def init(authority: _Authority = Path("stator-ca")) -> None:
    """Make an authority: a certificate, valid for ten years, and its key, with which nodes' certificates are signed."""
    from stator.config.authority import CA_KEY_NAME, make_authority
    from stator.errors import ConfigError

    try:
        certificate = make_authority(authority)
    except ConfigError as error:
        raise _failed(error) from None
    typer.echo(
        f"{certificate} is made. Keep {authority / CA_KEY_NAME} to yourself: who has it can join the deployment."
    )
    typer.echo(f"A certificate for each node: stator certs issue {authority} --host ADDRESS")


@certs_app.command()
def issue(
    authority: _Authority,
    host: Annotated[
        list[str],
        typer.Option(help="Name or address that other nodes reach this one at; give every one that it has."),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Directory for the files; default: named as the first --host.")
    ] = None,
    days: Annotated[int, typer.Option(help="How long it is valid.")] = 365,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
) -> None:
    """Issue a node's certificate. Also to renew one: a running node reads its files again when they change."""
    from stator.config.authority import issue as issue_certificate
    from stator.errors import ConfigError

    directory = Path(host[0]) if out is None else out
    try:
        issue_certificate(authority, host, directory, days=days, replace=force)
    except ConfigError as error:
        raise _failed(error) from None
    typer.echo(f"{directory} has what {', '.join(host)} needs: ca.crt, tls.crt and tls.key. Copy it there, then:")
    typer.echo(f"  export STATOR_TLS_DIR=/path/to/{directory.name}      # before every stator command on that node")


def _failed(error: Exception) -> typer.Exit:
    typer.echo(f"stator: {error}", err=True)
    return typer.Exit(2)
