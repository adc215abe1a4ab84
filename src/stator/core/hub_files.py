"""Which files of a model on the hub are needed, and how far their download is.

A repository on the hub often holds the same weights in several formats. One is chosen, as vLLM chooses it
(model_executor/model_loader/default_loader.py), so that an engine finds exactly what it will read.
"""

from collections import deque
from collections.abc import Collection, Iterable
from enum import StrEnum

SAFETENSORS_INDEX = "model.safetensors.index.json"

_SMALL_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken")
_CODE_SUFFIX = ".py"
_CHAT_TEMPLATES = "additional_chat_templates/"
_NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin", "optimizer.pt", "scheduler.pt", "rng_state.pt")


class Needs(StrEnum):
    """What a process wants of a model. TOKENIZER: configuration, tokenizer and templates. WEIGHTS: safetensors too.

    VLLM: what vLLM reads: other formats if there are no safetensors, Mistral's own files if there are any, and the
    code that a checkpoint brings (for trust-remote-code).
    """

    TOKENIZER = "tokenizer"
    WEIGHTS = "weights"
    VLLM = "vllm"


def small_files(names: Iterable[str], needs: Needs) -> list[str]:
    """Everything but weights; of the subdirectories only that of further chat templates."""
    suffixes = (*_SMALL_SUFFIXES, _CODE_SUFFIX) if needs is Needs.VLLM else _SMALL_SUFFIXES
    return sorted(name for name in names if name.endswith(suffixes) and "/" not in name.removeprefix(_CHAT_TEMPLATES))


def weight_files(names: Collection[str], indexed: Collection[str] | None, needs: Needs) -> list[str]:
    """One format of the weights; [] if there is none that is of use.

    indexed: the files that SAFETENSORS_INDEX names, None without such a file. They may lie in subdirectories.
    """
    if needs is Needs.TOKENIZER:
        return []
    top = sorted(name for name in names if "/" not in name)
    consolidated = [name for name in top if name.startswith("consolidated") and name.endswith(".safetensors")]
    if consolidated and needs is Needs.VLLM:
        return consolidated
    if indexed:
        return sorted(set(indexed))
    plain = [name for name in top if name.endswith(".safetensors") and name not in consolidated]
    if plain or needs is Needs.WEIGHTS:
        return plain
    for suffix in (".bin", ".pt"):
        others = [name for name in top if name.endswith(suffix) and name not in _NO_WEIGHTS]
        if others:
            return others
    return []


_UNITS = ("B", "KB", "MB", "GB", "TB", "PB")


def _scale(num_bytes: float) -> tuple[float, str]:
    scale, unit = 1.0, 0
    while num_bytes / scale >= 999.5 and unit < len(_UNITS) - 1:
        scale, unit = scale * 1000, unit + 1
    return scale, _UNITS[unit]


def _digits(value: float) -> str:
    return (
        f"{value:.0f}" if value >= 99.95 or value == int(value) else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
    )


def format_bytes(num_bytes: float) -> str:
    """Decimal units and three digits, as disks and networks are sold: `12.3 GB`."""
    scale, unit = _scale(num_bytes)
    return f"{_digits(num_bytes / scale)} {unit}"


class DownloadProgress:
    """Turns bytes and finished files into lines for the log. Times are seconds of one monotonic clock.

    A line comes at most every `interval_s`, and at the end of each file. Its rate is that of the last ten seconds.
    """

    WINDOW_S = 10.0

    def __init__(self, total_bytes: int, num_files: int, now: float, *, interval_s: float = 5.0) -> None:
        self._total, self._num_files = total_bytes, num_files
        self._interval_s = interval_s
        self._bytes = self._finished = 0
        self._began = self._last_line = now
        self._samples: deque[tuple[float, int]] = deque([(now, 0)])

    def received(self, num_bytes: int, now: float) -> str | None:
        """num_bytes: negative for some that are thrown away. A line if one is due."""
        self._bytes += num_bytes
        if now - self._samples[-1][0] >= 0.5:
            self._samples.append((now, self._bytes))
            while len(self._samples) > 1 and self._samples[1][0] <= now - self.WINDOW_S:
                self._samples.popleft()
        if now - self._last_line < self._interval_s:
            return None
        self._last_line = now
        return self._line(now)

    def finished(self, name: str, now: float) -> str:
        self._finished += 1
        self._last_line = now
        return f"{name} is complete ({self._finished} of {self._num_files} files); {self._line(now)}"

    def done(self, now: float) -> str:
        seconds = now - self._began
        rate = f", {format_bytes(self._bytes / seconds)}/s" if seconds > 0 else ""
        return f"downloaded {format_bytes(self._bytes)} in {seconds:.1f} s{rate}"

    def _line(self, now: float) -> str:
        scale, unit = _scale(max(self._total, self._bytes))
        then, before = self._samples[0]
        rate = f", {format_bytes(max(0, self._bytes - before) / (now - then))}/s" if now > then else ""
        return f"downloaded {_digits(self._bytes / scale)} of {_digits(self._total / scale)} {unit}{rate}"
