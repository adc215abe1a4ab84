"""The LoRA adapters of one vLLM: what they are called, by which number vLLM knows them, and where it finds them.

vLLM hashes an adapter's name and path into its prefix cache, but not what lies there. An adapter that comes back under
the name and path of an earlier one is told to vLLM with the path spelled otherwise, so that no block of the earlier one
is taken for its own.
"""

from pathlib import Path

from stator.engines.lora import DEFAULT_MAX_RANK, not_enabled, on_node, read_adapter
from stator.engines.vllm.args import VllmSettings
from stator.errors import ConfigError, StatorError
from stator.messages.lora import LoraAdapter

Told = tuple[str, int, str]
"""(name, number, path) of vLLM's LoRARequest."""


class VllmAdapters:
    """loaded: by name."""

    def __init__(self, settings: VllmSettings) -> None:
        self._modules = settings.lora_modules
        enabled = bool(settings.lora_modules) or settings.flags.get("enable_lora") is True
        self._max_rank = int(settings.flags.get("max_lora_rank") or DEFAULT_MAX_RANK) if enabled else 0
        self._told: dict[str, Told] = {}
        self._num_told = 0
        self._spellings: dict[tuple[str, str], int] = {}
        self.loaded: dict[str, LoraAdapter] = {}

    def read_modules(self) -> None:
        """Those of the settings, which vLLM loads when they are first asked for. Blocks for a moment. Raises
        ConfigError for one that cannot be used. An id on the hub is vLLM's to find."""
        for name, path in self._modules.items():
            if _may_be_on_hub(path):
                adapter = LoraAdapter(name, path, path)
                self.add(adapter, self.next_told(adapter))
                continue
            try:
                adapter = self.read(name, on_node(path))
                self.add(adapter, self.next_told(adapter))
            except StatorError as error:
                raise ConfigError(f"lora-modules: {name}: {error.message}") from None

    def read(self, name: str, path: str) -> LoraAdapter:
        """Raises as `engines.lora.LoraEngine.load_adapter`."""
        if not self._max_rank:
            raise not_enabled()
        return read_adapter(name, path, max_rank=self._max_rank)

    def next_told(self, adapter: LoraAdapter) -> Told:
        """What vLLM is told of it, never the same twice."""
        self._num_told += 1
        key = (adapter.name, adapter.path)
        num_before = self._spellings.get(key, 0)
        self._spellings[key] = num_before + 1
        return adapter.name, self._num_told, adapter.path + "/." * num_before

    def add(self, adapter: LoraAdapter, told: Told) -> None:
        self._told[adapter.name] = told
        self.loaded[adapter.name] = adapter

    def remove(self, name: str) -> Told | None:
        self.loaded.pop(name, None)
        return self._told.pop(name, None)

    def told(self, name: str) -> Told | None:
        return self._told.get(name)


def _may_be_on_hub(path: str) -> bool:
    return path.count("/") == 1 and path[0] not in "/.~" and not Path(path).exists()
