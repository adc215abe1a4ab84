"""A configuration class for Nemotron-NAS checkpoints (model type `nemotron-nas`, architecture DeciLMForCausalLM).

transformers has none, so that these checkpoints bring code of their own, which is written for older releases and runs
only with trust-remote-code. With this class registered that code is never imported: AutoConfig prefers a class that
was registered from outside transformers.

vLLM (model_executor/models/nemotron_nas.py) reads `block_configs` by attribute (`block.attention.no_op`) and
`rope_parameters` as one mapping. The class does not derive from LlamaConfig: that one insists on a single FFN width
for all layers, and these models leave it null.

Where it must be known: in the process that makes vLLM's configuration, and in the engine core, which reads the
checkpoint's configuration again for its tokenizer. Importing this module registers the class; the engine core and the
workers import it when they unpickle the configuration that the first process made. The entry point in the group
`vllm.general_plugins` does the same where Stator is installed (`vllm serve`), but a process that finds Stator on its
PYTHONPATH only has no entry points.
"""

import importlib
from types import SimpleNamespace
from typing import Any, cast

MODEL_TYPE = "nemotron-nas"
ARCHITECTURE = "DeciLMForCausalLM"

# Part of the engine's environment only: this module is imported where vLLM is.
_transformers: Any = importlib.import_module("transformers")
_PretrainedConfig: Any = _transformers.PretrainedConfig


class Block(SimpleNamespace):
    """A layer's `attention` and `ffn`, or one of them: the keys of config.json as attributes."""

    def to_dict(self) -> dict[str, Any]:
        return {key: value.to_dict() if isinstance(value, Block) else value for key, value in vars(self).items()}


def parse_block(value: Any, layer: int) -> Block:
    """A layer's entry of `block_configs`. Raises ValueError for what vLLM would compute wrongly without a word."""
    if isinstance(value, Block):
        return value
    if not isinstance(value, dict) or not {"attention", "ffn"} <= value.keys():
        raise ValueError(f"block_configs[{layer}]: expected a mapping with attention and ffn, found {value!r}")
    entry = cast(dict[str, Any], value)
    parts = {name: _parse_part(entry[name], f"block_configs[{layer}].{name}") for name in ("attention", "ffn")}
    attention, ffn = parts["attention"], parts["ffn"]
    if not attention.no_op and not getattr(attention, "n_heads_in_group", None):
        raise ValueError(f"block_configs[{layer}].attention: n_heads_in_group is missing, and no_op is false")
    if not ffn.no_op and not hasattr(ffn, "ffn_mult") and not hasattr(ffn, "intermediate_size"):
        raise ValueError(f"block_configs[{layer}].ffn: neither ffn_mult nor intermediate_size, and no_op is false")
    return Block(**{**entry, **parts})


def _parse_part(value: Any, path: str) -> Block:
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a mapping, found {value!r}")
    part = cast(dict[str, Any], value)
    if part.get("replace_with_linear"):
        raise ValueError(f"{path}: replace_with_linear is set, and vLLM has no such layers")
    # vLLM takes the width from ffn_mult if there is such an attribute, even if it is null.
    kept = {key: item for key, item in part.items() if not (key in _NULL_IS_ABSENT and item is None)}
    return Block(**{"no_op": False, **kept})


_NULL_IS_ABSENT = ("ffn_mult", "intermediate_size", "hidden_act")


def merge_rope(scaling: dict[str, Any] | None, theta: float) -> dict[str, Any]:
    """One mapping from the two keys of older files: `rope_scaling` (null for none) and `rope_theta`."""
    rope = dict(scaling or {})
    kind = rope.pop("type", None)
    rope.setdefault("rope_type", kind or "default")
    rope.setdefault("rope_theta", theta)
    return rope


class NemotronNasConfig(_PretrainedConfig):
    """What config.json of such a checkpoint says. Keys without a meaning here stay as attributes."""

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        block_configs: list[Any] | None = None,
        vocab_size: int = 128256,
        hidden_size: int = 8192,
        num_hidden_layers: int | None = None,
        num_attention_heads: int = 64,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        intermediate_size: int | None = None,
        hidden_act: str = "silu",
        max_position_embeddings: int = 131072,
        rms_norm_eps: float = 1e-5,
        attention_bias: bool = False,
        mlp_bias: bool = False,
        tie_word_embeddings: bool = False,
        rope_theta: float = 500000.0,
        rope_scaling: dict[str, Any] | None = None,
        rope_parameters: dict[str, Any] | None = None,
        **others: Any,
    ) -> None:
        self.block_configs = [parse_block(block, layer) for layer, block in enumerate(block_configs or [])]
        if num_hidden_layers is not None and num_hidden_layers != len(self.block_configs):
            raise ValueError(
                f"num_hidden_layers is {num_hidden_layers}, but block_configs has {len(self.block_configs)} entries"
            )
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = len(self.block_configs)
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim if head_dim is not None else hidden_size // num_attention_heads
        self.intermediate_size = intermediate_size
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.attention_bias = attention_bias
        self.mlp_bias = mlp_bias
        self.tie_word_embeddings = tie_word_embeddings
        self.rope_parameters = merge_rope(rope_parameters or rope_scaling, rope_theta)
        super().__init__(**others)

    def to_dict(self) -> dict[str, Any]:
        blocks: list[Block] = self.block_configs
        return {**super().to_dict(), "block_configs": [block.to_dict() for block in blocks]}


def register() -> None:
    """Make AutoConfig know the class in this process; again is no harm. Done when this module is imported."""
    _transformers.AutoConfig.register(MODEL_TYPE, NemotronNasConfig, exist_ok=True)


register()
