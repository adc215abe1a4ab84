"""From a worker's section to its engine."""

from stator.config.schema import WorkerConfig
from stator.engines.base import Engine
from stator.engines.registry import create_engine
from stator.errors import ConfigError


def make_engine(config: WorkerConfig) -> Engine:
    """An engine that has not been started. Raises ConfigError; one about a flag says where the flag was written."""
    values = {**config.engine_args, "model": config.model, "served_model_name": config.served_model_name}
    try:
        return create_engine(config.engine, {key: value for key, value in values.items() if value is not None})
    except ConfigError as error:
        message = str(error)
        for key, origin in config.engine_arg_origins.items():
            if key in message or key.replace("_", "-") in message:
                raise ConfigError(f"{origin}: {message}") from None
        raise
