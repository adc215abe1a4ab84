import os
import shutil
import subprocess

import pytest
from processes import STARTED


def namespaces_work() -> bool:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"st-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    if made:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return made


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a laptop without root the multi-host tests are left out, and say so; where they are required they fail."""
    marked = [item for item in items if item.get_closest_marker("netns")]
    if not marked or os.environ.get("STATOR_REQUIRE_NETNS") or namespaces_work():
        return
    reason = "needs root and network namespaces (`ip netns`); run as root, or see the CI run"
    for item in marked:
        item.add_marker(pytest.mark.skip(reason=reason))


def pytest_sessionfinish() -> None:
    for command in STARTED:
        if command.process.poll() is None:
            command.kill_tree()
