import os

import pytest

from stator.testing.real_servers import end_all, missing_servers

# The suites live in the package; their assertions should explain themselves like those of a test file.
pytest.register_assert_rewrite("stator.testing.contracts")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a laptop without the servers their tests are left out, and say so; where they are required they fail."""
    marked = [item for item in items if item.get_closest_marker("servers")]
    if not marked or os.environ.get("STATOR_REQUIRE_SERVERS") or not (missing := missing_servers()):
        return
    reason = f"needs real servers: apt-get install -y {' '.join(missing)}"
    for item in marked:
        item.add_marker(pytest.mark.skip(reason=reason))


def pytest_sessionfinish() -> None:
    end_all()
