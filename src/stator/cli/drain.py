"""`stator drain`: instances leave one after another, and no request is lost."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from stator.cli.control import ControlOptions, Deployment, connected
from stator.errors import ConfigError, ErrorCode, StatorError
from stator.ids import InstanceId
from stator.messages.instances import DRAIN_ENDPOINT, DrainPhase, DrainProgress, DrainRequest, InstanceInfo
from stator.runtime.directory import InstanceDirectory

LEAVE_TIMEOUT_S = 60.0
"""For a drained process to end, its engine to be stopped."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class DrainOptions:
    """name: an instance id, the beginning of one, or a service. start_timeout_s: for what is started again to be
    ready."""

    name: str
    all_of_service: bool = False
    restart: bool = False
    timeout_s: float = 60.0
    start_timeout_s: float = 900.0


class Drained(msgspec.Struct, frozen=True):
    """outcome: `drained`, or `cut_off` with num_ended requests, which go on elsewhere if they can. replacement: the
    instance that came instead, with `restart`."""

    instance: str
    service: str
    host: str
    outcome: str
    num_ended: int
    seconds: float
    replacement: str | None = None


async def drain(options: ControlOptions, what: DrainOptions, say: Say) -> list[Drained]:
    """Drain what `what` names. Raises ConfigError for a name that means nothing, StatorError if a drain fails."""
    async with connected(options) as deployment:
        planes = deployment.planes
        await planes.start()
        await planes.directory.wait_for(lambda _: True, 10.0)
        chosen = choose(planes.directory.instances(ready_only=False), what.name, what.all_of_service)
        return [await _drain_one(deployment, instance, what, say) for instance in chosen]


def choose(instances: Sequence[InstanceInfo], name: str, all_of_service: bool) -> list[InstanceInfo]:
    """One instance for each process that is meant. Raises ConfigError, which lists what there is."""
    of_service = [instance for instance in instances if instance.service == name]
    if all_of_service:
        if not of_service:
            services = ", ".join(sorted({i.service for i in instances})) or "there is none"
            raise ConfigError(f"no instance of a service {name}; the services: {services}")
        return list({(instance.host, instance.pid): instance for instance in of_service}.values())
    exact = [instance for instance in instances if instance.instance_id == name]
    found = exact or of_service or [instance for instance in instances if instance.instance_id.startswith(name)]
    if len(found) == 1:
        return found
    known = "\n".join(f"  {i.instance_id} on {i.host}" for i in (found or instances)) or "  there is none"
    if not found:
        raise ConfigError(f"no instance {name}; the instances:\n{known}")
    hint = f", or --all for all of {name}" if of_service else ""
    raise ConfigError(f"{name} means {len(found)} instances; name one{hint}:\n{known}")


async def _drain_one(deployment: Deployment, instance: InstanceInfo, what: DrainOptions, say: Say) -> Drained:
    directory = deployment.planes.directory
    before = {known.instance_id for known in directory.instances(ready_only=False)}
    last = await _follow_drain(deployment, instance, what, say)
    ended = last.num_open if last.phase is DrainPhase.CUT_OFF else 0
    await _wait(
        directory,
        lambda d: d.get(instance.instance_id) is None,
        LEAVE_TIMEOUT_S,
        f"{instance.instance_id} is drained, but its process has not ended; look at its node's output",
    )
    text = f"{instance.instance_id}: drained in {last.elapsed_s:.1f} s"
    say(text + (f"; {ended} requests had no time to finish and were handed on" if ended else ""))
    replacement = None
    if what.restart:
        replacement = await _wait_for_replacement(directory, instance, before, what.start_timeout_s)
        say(f"{instance.instance_id}: started again as {replacement}")
    return Drained(
        instance.instance_id,
        instance.service,
        instance.host,
        last.phase.value,
        ended,
        round(last.elapsed_s, 3),
        replacement,
    )


async def _follow_drain(deployment: Deployment, instance: InstanceInfo, what: DrainOptions, say: Say) -> DrainProgress:
    request = DrainRequest(what.restart, what.timeout_s)
    last: DrainProgress | None = None
    said: tuple[DrainPhase, int] | None = None
    stream = deployment.stream(instance, DRAIN_ENDPOINT, request, DrainProgress)
    async with contextlib.aclosing(stream) as lists:
        async for items in lists:
            progress: DrainProgress
            for progress in items:
                last = progress
                if not progress.phase.is_last and (progress.phase, progress.num_open) != said:
                    said = (progress.phase, progress.num_open)
                    say(f"{instance.instance_id}: {_in_words(progress)}")
    if last is None or not last.phase.is_last:
        raise StatorError(ErrorCode.INSTANCE_LOST, f"{instance.instance_id} was lost before it was drained")
    return last


def _in_words(progress: DrainProgress) -> str:
    if progress.phase is DrainPhase.SUCCESSOR:
        return "waiting for the process that takes its place"
    return f"draining, {progress.num_open} requests left ({progress.elapsed_s:.0f} s)"


async def _wait_for_replacement(
    directory: InstanceDirectory, gone: InstanceInfo, before: set[InstanceId], timeout_s: float
) -> str:
    def new(view: InstanceDirectory) -> list[str]:
        ready = view.instances(service=gone.service)
        return [i.instance_id for i in ready if i.host == gone.host and i.instance_id not in before]

    await _wait(
        directory,
        lambda d: bool(new(d)),
        timeout_s,
        f"{gone.instance_id} is drained, but what its node on {gone.host} starts instead is not ready after "
        f"{timeout_s:g} s; look at that node's output",
    )
    return new(directory)[0]


async def _wait(
    directory: InstanceDirectory, predicate: Callable[[InstanceDirectory], bool], timeout_s: float, otherwise: str
) -> None:
    try:
        await directory.wait_for(predicate, timeout_s)
    except TimeoutError:
        raise StatorError(ErrorCode.DEADLINE, otherwise) from None
