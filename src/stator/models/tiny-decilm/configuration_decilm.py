"""Configuration class for engines that build it through ``auto_map``.

Engines read ``block_configs`` by attribute (``block.attention.no_op``) and write nothing back, so plain namespaces are
enough. The class does not derive from the library's Llama configuration: that one insists on a single FFN width
for all layers, which this architecture does not have.
"""

from types import SimpleNamespace
from typing import Any

from transformers import PretrainedConfig


class DeciLMBlock(SimpleNamespace):
    """One part of a layer; a mapping inside becomes a namespace too, and the whole turns back into JSON."""

    @classmethod
    def of(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return cls(**{key: cls.of(item) for key, item in value.items()})
        return value

    def to_dict(self) -> dict[str, Any]:
        return {k: v.to_dict() if isinstance(v, DeciLMBlock) else v for k, v in vars(self).items()}


class DeciLMConfig(PretrainedConfig):
    model_type = "nemotron-nas"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        block_configs: list[Any] | None = None,
        rope_theta: float = 10000.0,
        rope_parameters: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.block_configs = [DeciLMBlock.of(block) for block in block_configs or []]
        # current releases read one mapping; the two older names of config.json are for other readers
        self.rope_parameters = rope_parameters or {"rope_type": "default", "rope_theta": rope_theta}
        kwargs.pop("rope_scaling", None)
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim"):
            setattr(self, name, kwargs.pop(name, None))
        for name in ("num_key_value_heads", "intermediate_size", "max_position_embeddings", "rms_norm_eps"):
            setattr(self, name, kwargs.pop(name, None))
        self.hidden_act = kwargs.pop("hidden_act", "silu")
        self.attention_bias = kwargs.pop("attention_bias", False)
        self.mlp_bias = kwargs.pop("mlp_bias", False)
        super().__init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        out = super().to_dict()
        blocks = self.block_configs
        out["block_configs"] = [block.to_dict() if isinstance(block, DeciLMBlock) else block for block in blocks]
        return out
