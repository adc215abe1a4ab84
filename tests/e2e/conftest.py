import os
import shutil
import subprocess

import pytest
from processes import STARTED

from stator.testing.real_servers import end_all, missing_servers


def namespaces_work() -> bool:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"st-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    if made:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return made


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a laptop without root or the servers, the tests that need them are left out, and say so.

    Where they are required they fail."""
    marked = [item for item in items if item.get_closest_marker("netns")]
    if marked and not os.environ.get("STATOR_REQUIRE_NETNS") and not namespaces_work():
        skip(marked, "needs root and network namespaces (`ip netns`); run as root, or see the CI run")
    marked = [item for item in items if item.get_closest_marker("servers")]
    if marked and not os.environ.get("STATOR_REQUIRE_SERVERS") and (missing := missing_servers()):
        skip(marked, f"needs real servers: apt-get install -y {' '.join(missing)}")


def skip(items: list[pytest.Item], reason: str) -> None:
    for item in items:
        item.add_marker(pytest.mark.skip(reason=reason))


def pytest_sessionfinish() -> None:
    end_all()
    for command in STARTED:
        if command.process.poll() is None:
            command.kill_tree()
