"""The names that clients may ask a Processor for: its model's, and those of the model's LoRA adapters."""

from collections.abc import Sequence
from typing import overload

from stator.processor.instances import DecodeInstances


class ServedNames(Sequence[str]):
    """models: the model's names, of which the first is the one that instances have. The adapters that any instance has
    follow, by name; they come and go."""

    def __init__(self, models: Sequence[str], instances: DecodeInstances) -> None:
        self._models = tuple(models)
        self._instances = instances

    def adapter(self, name: str) -> str | None:
        """Of a name that is served: the adapter, None for the model itself."""
        return None if name in self._models else name

    def __contains__(self, name: object) -> bool:
        return name in self._models or name in self._instances.adapters(self._models[0])

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        return self._all()[index]

    def __len__(self) -> int:
        return len(self._all())

    def _all(self) -> tuple[str, ...]:
        return (*self._models, *sorted(self._instances.adapters(self._models[0]).difference(self._models)))
