"""From a model's name to a local directory: a directory stays, a model on the hub is downloaded if it has to be."""

import asyncio
import contextlib
import logging
import threading
from dataclasses import dataclass
from pathlib import Path

from stator.config.models import hub_id, resolve_model
from stator.core.hub_files import Needs

__all__ = ["Needs", "ResolvedModel", "resolve", "resolve_async"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """directory: has what was asked for. model_id: as configured. revision: the commit on the hub, 40 hex digits; ""
    for a model that is not from there."""

    directory: Path
    model_id: str
    revision: str = ""

    @property
    def engine_model_string(self) -> str:
        """What vLLM is told as `model`, together with `revision`.

        For a model of the hub that is its id, alike on every node wherever its cache is: NIXL compares this text
        between the two sides of a transfer. For others it is the directory.
        """
        return self.model_id if self.revision else str(self.directory)


def resolve(
    model: str,
    revision: str | None = None,
    *,
    needs: Needs = Needs.WEIGHTS,
    stop: threading.Event | None = None,
) -> ResolvedModel:
    """A directory that has what `needs` says. Blocks, for hours if a large model is to be downloaded.

    model: a directory, `stator:NAME` or `org/name`. revision: branch, tag or commit on the hub; None for `main`.
    A branch or tag is turned into the commit that it is at now, and everything is read from that commit.
    stop: once set, the call ends soon with hub_download.Stopped. Raises ConfigError with what to do about it.
    """
    if hub_id(model) is None:
        if revision:
            logger.warning("model %s is not from the hub; revision %s means nothing to it", model, revision)
        return ResolvedModel(resolve_model(model), model)
    # Half a second of imports, which directories do without.
    from stator.config.hub_download import ModelDownload

    download = ModelDownload(model, revision, needs, stop or threading.Event())
    return ResolvedModel(download.run(), model, download.commit)


async def resolve_async(model: str, revision: str | None = None, *, needs: Needs = Needs.WEIGHTS) -> ResolvedModel:
    """`resolve` off the event loop. Cancelled, it returns at once; nothing keeps the process from ending then.

    The thread is a daemon, unlike those of `asyncio.to_thread`: a process must not stay for a read that hangs.
    """
    if hub_id(model) is None:
        return resolve(model, revision, needs=needs)
    loop, stop = asyncio.get_running_loop(), threading.Event()
    future: asyncio.Future[ResolvedModel] = loop.create_future()

    def settle(result: ResolvedModel | None, error: BaseException | None) -> None:
        if future.done():
            return
        if result is not None:
            future.set_result(result)
        elif error is not None:
            future.set_exception(error)

    def work() -> None:
        result: ResolvedModel | None = None
        error: BaseException | None = None
        try:
            result = resolve(model, revision, needs=needs, stop=stop)
        except BaseException as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=work, name=f"download {model}", daemon=True).start()
    try:
        return await future
    finally:
        stop.set()
