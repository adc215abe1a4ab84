"""A graph: the services reachable by links from a root, and who calls whom among them."""

from dataclasses import dataclass
from typing import Any

from stator.errors import ConfigError
from stator.graph.service import ServiceSpec, spec_of


@dataclass(frozen=True, slots=True)
class Graph:
    """services: by name, consumers before those they link; the root first."""

    root: ServiceSpec
    services: dict[str, ServiceSpec]

    @property
    def is_component(self) -> bool:
        """A lone service: it joins a deployment and starts no other."""
        return len(self.services) == 1

    def resolve(self, consumer: ServiceSpec) -> dict[str, tuple[ServiceSpec, bool]]:
        """For each `depends` attribute: the service it stands for, and whether the dependency is active.

        It is active if the service, or one derived from it, is part of this graph. For a component everything it
        depends on counts as active: it runs elsewhere.
        """
        resolved: dict[str, tuple[ServiceSpec, bool]] = {}
        for attribute, declared in consumer.dependencies.items():
            linked = [s for s in self.services.values() if issubclass(s.cls, declared)]
            preferred = [s for s in linked if s.cls in consumer.links] or linked
            if preferred:
                resolved[attribute] = (preferred[0], True)
            else:
                resolved[attribute] = (spec_of(declared), self.is_component)
        return resolved


def build_graph(root: type[Any]) -> Graph:
    """Raises ConfigError when two classes of the graph claim one name."""
    services: dict[str, ServiceSpec] = {}
    pending = [root]
    while pending:
        spec = spec_of(pending.pop(0))
        known = services.get(spec.name)
        if known is None:
            services[spec.name] = spec
            pending.extend(spec.links)
        elif known.cls is not spec.cls:
            raise ConfigError(
                f"two services of this graph are named {spec.name!r}: {_where(known)} and {_where(spec)}; "
                f'give one another name with @service(name="...")'
            )
    return Graph(spec_of(root), services)


def _where(spec: ServiceSpec) -> str:
    return f"{spec.cls.__module__}.{spec.cls.__qualname__}"
