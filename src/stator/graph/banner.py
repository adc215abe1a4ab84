"""What a node tells the person who started it."""

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from stator.config.external import ExternalPlanes
from stator.graph.graph import Graph
from stator.graph.network import is_wildcard, url_host
from stator.graph.protocol import Serving
from stator.graph.service import ServiceSpec

JOINING_ROLES = ("prefill", "decode")
DEFAULT_NAMESPACE = "stator"


@dataclass(frozen=True, slots=True)
class JoinLine:
    """command: without the address. what: the kind of node that it adds. otherwise: another way, `{head}` in it."""

    what: str
    command: tuple[str, ...]
    otherwise: str | None = None


def component_target(spec: ServiceSpec, directory: Path) -> str:
    """How the service alone is named on a command line."""
    module = spec.cls.__module__
    if module.startswith("stator_target_"):
        file = Path(getattr(sys.modules[module], "__file__", module))
        module = str(file.relative_to(directory)) if file.is_relative_to(directory) else str(file)
    return f"{module}:{spec.cls.__qualname__}"


def join_lines(
    graph: Graph, directory: Path, config: Path | None, overrides: Sequence[tuple[str, str]]
) -> list[JoinLine]:
    """One line for each service that more nodes may run, prefill first: those of the graph, and those they depend on
    that it does not link. Flags are repeated, but for the number of processes, which is this node's own."""
    lines: list[JoinLine] = []
    for spec in _joining(graph):
        command = ["stator", "serve", component_target(spec, directory)]
        command += ["-f", str(config)] if config is not None else []
        command += [f"{flag}={value}" for flag, value in overrides if _concerns(flag, spec.name)]
        lines.append(JoinLine(spec.name, tuple(command)))
    return lines


def join_command(spec: ServiceSpec, directory: str, config: str, head: tuple[str, int] | None, namespace: str) -> str:
    """What starts the service alone on another node. config: where this one's is from, as messages name it.

    head: None where etcd and NATS are named by the environment, as they are here."""
    command = ["stator", "serve", component_target(spec, Path(directory))]
    command += ["-f", config] if (Path(directory) / config).is_file() else []
    command += [] if head is None else ["--join", f"{url_host(head[0])}:{head[1]}"]
    command += [] if namespace == DEFAULT_NAMESPACE else ["--namespace", namespace]
    return shlex.join(command)


def _joining(graph: Graph) -> list[ServiceSpec]:
    specs = dict(graph.services)
    for spec in graph.services.values():
        for other, linked in graph.resolve(spec).values():
            if not linked:
                specs.setdefault(other.name, other)
    by_role = [spec for role in JOINING_ROLES for spec in specs.values() if spec.role == role]
    return by_role or list(graph.services.values())[1:]


def _concerns(flag: str, service: str) -> bool:
    section, _, key = flag.removeprefix("--").partition(".")
    return section in (service, "Common") and key != "ServiceArgs.workers"


def format_join(lines: Sequence[JoinLine], head: tuple[str, int], namespace: str, token_place: str) -> str:
    if not lines:
        return ""
    address = f"{url_host(head[0])}:{head[1]}"
    extra = [] if namespace == DEFAULT_NAMESPACE else ["--namespace", namespace]
    text = [
        f"  One more {line.what}, here or on another node:\n"
        f"    {shlex.join([*line.command, '--join', address, *extra])}"
        + (f"\n    {line.otherwise.format(head=address)}" if line.otherwise else "")
        for line in lines
    ]
    return "\n".join([*text, f"  Another node needs the token: {token_place}"])


def format_guests(guests: Sequence[str], target: str, head: tuple[str, int] | None, token_file: Path | None) -> str:
    """How graphs join in the other namespaces that a frontend here serves. head: None where etcd and NATS are named by
    the environment. token_file: of the head, if that is where its token is."""
    flags = [] if head is None else ["--join", f"{url_host(head[0])}:{head[1]}"]
    flags += [] if head is None or token_file is None else ["--token-file", str(token_file)]
    return "\n".join(
        f"  Models of namespace {name} are served here too, once a graph of it joins:\n"
        f"    {shlex.join(['stator', 'serve', target, '-f', 'CONFIG', *flags, '--namespace', name])}"
        for name in guests
    )


def format_exports(lines: Sequence[JoinLine], external: ExternalPlanes, namespace: str) -> str:
    """As `format_join`, for nodes that find each other through etcd and NATS. Nothing secret is shown."""
    export = shlex.join(
        [
            "export",
            f"NATS_SERVER={','.join(external.nats.servers)}",
            f"ETCD_ENDPOINTS={','.join(external.etcd.endpoints)}",
        ]
    )
    extra = [] if namespace == DEFAULT_NAMESPACE else ["--namespace", namespace]
    text = [f"  Other nodes find this deployment by (with addresses that they reach):\n    {export}"]
    if external.secured:
        text.append("  and the NATS_AUTH_* and ETCD_AUTH_* that are set here.")
    text += [f"  One more {line.what}:\n    {shlex.join([*line.command, *extra])}" for line in lines]
    return "\n".join(text)


def format_serving(serving: Serving, advertise: str) -> str:
    """The address and a request to paste. Wildcard hosts are shown as the address that others reach."""
    url = reachable(serving.url, advertise)
    body = {
        "model": serving.model,
        "messages": [{"role": "user", "content": "Tell me a story."}],
        "max_tokens": 100,
        "stream": True,
    }
    return (
        f"  Address: {url}/v1    model: {serving.model}\n"
        f"  Try it:\n"
        f"    curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' \\\n"
        f"      -d {shlex.quote(json.dumps(body, ensure_ascii=False))}"
    )


def reachable(url: str, advertise: str) -> str:
    parts = urlsplit(url)
    if parts.hostname is None or not is_wildcard(parts.hostname):
        return url.rstrip("/")
    return parts._replace(netloc=f"{url_host(advertise)}:{parts.port}").geturl().rstrip("/")
