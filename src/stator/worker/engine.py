"""From a worker's section to its engine."""

from random import Random

from stator.config.schema import WorkerConfig
from stator.engines.base import Engine, SpreadEngine
from stator.engines.registry import create_engine
from stator.messages.engine import EngineInfo
from stator.worker.engine_group import GroupShell, Membership
from stator.worker.host import WorkerHost


def make_engine(config: WorkerConfig, rng: Random | None = None) -> Engine:
    """An engine that has not been started. Raises ConfigError; one about a flag says where the flag was written.

    rng: as `create_engine`.
    """
    with config.located():
        return create_engine(config.engine, config.engine_values(), rng=rng)


async def start_engine(
    engine: Engine, config: WorkerConfig, host: WorkerHost, membership: Membership
) -> EngineInfo | None:
    """Load the model. Raises ConfigError as `make_engine` does.

    An engine that spreads over several nodes is started when all of them are there. None: this one is a further node,
    `membership` follows, and requests go to the process of the first.
    """
    with config.located():
        if not isinstance(engine, SpreadEngine) or engine.num_nodes == 1:
            return await engine.start(host)
        group = GroupShell(
            membership,
            num_nodes=engine.num_nodes,
            settings=engine.shared_settings(),
            master_port=engine.master_port,
        )
        engine.place = host.place = await group.join()
        if engine.place.rank == 0:
            return await engine.start(host)
        await engine.start_further_node(host)
        membership.follow(engine.stop)
        return None
