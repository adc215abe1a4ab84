"""LoRA adapters: what an instance says of those that it has, and how it is asked to load or unload one."""

import msgspec


class LoraAdapter(msgspec.Struct, frozen=True, omit_defaults=True):
    """An adapter that an engine has loaded.

    name: by which requests ask for it. path: its directory on the instance's node. digest: of its configuration and of
    samples of its weights: equal for equal adapters wherever they lie; empty if not known.
    """

    name: str
    path: str
    digest: str = ""


LOAD_LORA_ENDPOINT = "load_lora"
UNLOAD_LORA_ENDPOINT = "unload_lora"
"""Of decode and prefill workers. Both answer once; a caller that leaves does not stop what it asked for."""


class LoadLora(msgspec.Struct, frozen=True):
    """Answered when the adapter is loaded and discovery has it. path: absolute, on the instance's node.

    INVALID_REQUEST: the name is taken, or the adapter cannot be used here. NOT_FOUND: there is none at the path.
    UNSUPPORTED: the engine has no adapters, or was started without them.
    """

    name: str
    path: str


class LoraLoaded(msgspec.Struct, frozen=True):
    """already: it was there before, the same."""

    adapter: LoraAdapter
    already: bool = False


class UnloadLora(msgspec.Struct, frozen=True, omit_defaults=True):
    """Take the adapter out of discovery, let its requests finish, drop it. NOT_FOUND: it is not loaded.

    timeout_s: what runs then is ended, so that it goes on where the adapter still is.
    """

    name: str
    timeout_s: float = 60.0


class LoraUnloaded(msgspec.Struct, frozen=True):
    """num_ended: requests that had no time to finish."""

    name: str
    num_ended: int = 0
