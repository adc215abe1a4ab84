"""From a worker's section to its engine."""

from stator.config.schema import WorkerConfig
from stator.engines.base import Engine, EngineHost
from stator.engines.registry import create_engine
from stator.messages.engine import EngineInfo


def make_engine(config: WorkerConfig) -> Engine:
    """An engine that has not been started. Raises ConfigError; one about a flag says where the flag was written."""
    with config.located():
        return create_engine(config.engine, config.engine_values())


async def start_engine(engine: Engine, config: WorkerConfig, host: EngineHost) -> EngineInfo:
    """Load the model. Raises ConfigError as `make_engine` does."""
    with config.located():
        return await engine.start(host)
