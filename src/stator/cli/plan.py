"""Where `stator plan` looks for the graph and the configuration."""

from pathlib import Path

from stator.graph.node import ServeOptions

DEFAULT_TARGET = "graphs.disagg_router:Frontend"
_DEFAULT_MODULE = Path("graphs/disagg_router.py")


def plan_options(
    target: str | None, file: Path, gpus: str | None, overrides: tuple[tuple[str, str], ...], here: Path, examples: Path
) -> ServeOptions:
    """examples: the example graphs that come with Stator. Without a target theirs are used, unless `here` has its own;
    a file that is not `here` may be one of theirs."""
    own = target is not None or (here / _DEFAULT_MODULE).is_file()
    directory = here if own else examples
    config = file
    if not (directory / file).is_file() or (here / file).is_file():
        config = file if own else (here / file).resolve()
    return ServeOptions(
        target=target or DEFAULT_TARGET, directory=directory, config=config, overrides=overrides, assume_gpus=gpus
    )
