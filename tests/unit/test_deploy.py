"""deploy/: the compose files against the part of the Compose specification that they use, and the dashboard.

Source: https://github.com/compose-spec/compose-spec/blob/main/spec.md
"""

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pytest
from ruamel.yaml import YAML

from stator.observability.metrics import FRONTEND_METRICS, ROUTER_METRICS, WORKER_METRICS

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
METRICS = DEPLOY / "metrics"
COMPOSE = [DEPLOY / "docker-compose.yml", METRICS / "docker-compose.yml"]
DASHBOARD = METRICS / "grafana" / "dashboards" / "stator.json"
SOURCE = "stator-prometheus"

Duration = Annotated[str, msgspec.Meta(pattern=r"^\d+(ms|s|m)$")]


class Healthcheck(msgspec.Struct, forbid_unknown_fields=True):
    test: list[str]
    interval: Duration
    timeout: Duration
    retries: Annotated[int, msgspec.Meta(ge=1)]
    start_period: Duration


class Condition(msgspec.Struct, forbid_unknown_fields=True):
    condition: Literal["service_started", "service_healthy", "service_completed_successfully"]


class Service(msgspec.Struct, forbid_unknown_fields=True):
    image: str
    volumes: list[str]
    healthcheck: Healthcheck
    restart: Literal["no", "always", "on-failure", "unless-stopped"]
    command: list[str] = []
    ports: list[str] = []
    profiles: list[str] = []
    network_mode: str | None = None
    environment: dict[str, str] = {}
    depends_on: dict[str, Condition] = {}


class Compose(msgspec.Struct, forbid_unknown_fields=True):
    services: dict[str, Service]
    volumes: dict[str, None]
    name: str | None = None
    include: list[str] = []


def load_yaml(path: Path) -> Any:
    return YAML(typ="safe").load(path.read_text())


def load(path: Path) -> Compose:
    return msgspec.convert(load_yaml(path), Compose)


@pytest.mark.parametrize("path", COMPOSE, ids=["deploy", "metrics"])
def test_files_and_volumes_that_services_name_are_there(path: Path) -> None:
    compose = load(path)
    used: set[str] = set()
    for service in compose.services.values():
        for volume in service.volumes:
            source, target, *mode = volume.split(":")
            assert target.startswith("/")
            if source.startswith("."):
                assert (path.parent / source).exists() and mode == ["ro"], volume
            else:
                used.add(source)
        assert set(service.depends_on) <= set(compose.services)
    assert used == set(compose.volumes)
    assert all((path.parent / file).is_file() for file in compose.include)


@pytest.mark.parametrize("path", COMPOSE, ids=["deploy", "metrics"])
def test_images_are_pinned_and_nothing_listens_beyond_this_machine_unless_told(path: Path) -> None:
    for name, service in load(path).services.items():
        tag = service.image.rpartition(":")[2]
        assert re.fullmatch(r"v?\d+\.\d+(\.\d+)?(-alpine)?", tag), f"{name}: {service.image}"
        assert service.healthcheck.test[0] == "CMD" and service.restart == "unless-stopped"
        if service.network_mode == "host":
            assert not service.ports
            addresses = [*service.command, *service.environment.values()]
            assert any("${STATOR_METRICS_HOST:-127.0.0.1}" in text for text in addresses), name
        for port in service.ports:
            assert port.startswith("${STATOR_SERVICES_HOST:-127.0.0.1}:"), port


def test_one_command_starts_all_and_the_other_file_only_the_services() -> None:
    assert set(load(COMPOSE[0]).services) == {"etcd", "nats"}
    more = load(COMPOSE[1])
    assert more.include == ["../docker-compose.yml"]
    assert {name: service.profiles for name, service in more.services.items()} == {
        "prometheus": ["metrics"],
        "grafana": ["metrics"],
    }
    assert "COMPOSE_PROFILES=metrics" in (METRICS / ".env").read_text().splitlines()


def test_grafana_finds_its_source_and_its_dashboard() -> None:
    provisioning = METRICS / "grafana" / "provisioning"
    (source,) = load_yaml(provisioning / "datasources" / "prometheus.yml")["datasources"]
    assert source["uid"] == SOURCE and source["url"] == "http://127.0.0.1:9090"
    interval = load_yaml(METRICS / "prometheus.yml")["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == interval
    (provider,) = load_yaml(provisioning / "dashboards" / "stator.yml")["providers"]
    grafana = load(COMPOSE[1]).services["grafana"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in grafana.volumes


def test_panels_show_what_is_exported() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) == len({panel["title"] for panel in panels})
    exported = {f"stator_{spec.name}" for spec in (*FRONTEND_METRICS, *WORKER_METRICS, *ROUTER_METRICS)}
    for panel in panels:
        assert panel["datasource"]["uid"] == SOURCE and panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"] in ("short", "s", "percentunit", "reqps", "ops")
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == SOURCE and target["legendFormat"]
            names = {name.removesuffix("_bucket") for name in re.findall(r"stator_\w+", target["expr"])}
            assert names and names <= exported, target["expr"]
    taken = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in panels]
    assert len(set(taken)) == len(taken) and all(p["gridPos"]["x"] + p["gridPos"]["w"] <= 24 for p in panels)
