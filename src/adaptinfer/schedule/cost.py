"""What a model's layers cost: FLOPs of a prefill, bytes of a KV cache."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from adaptinfer.schedule.checks import whole

_EXPERTS_A_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "top_k_experts")


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a language model that decide its FLOPs and KV bytes: dense decoder layers with a gated MLP.

    A mixture-of-experts model is counted as if `intermediate_size` were its active width.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int

    def __post_init__(self) -> None:
        for field, value in asdict(self).items():
            object.__setattr__(self, field, whole(field, value, least=1))

    @classmethod
    def from_config(cls, config: Any) -> ModelShape:
        """Read a transformers config, of a language model or of a VLM. Raises ScheduleError("config.<field>: ...").

        Layers that differ (Gemma 4, linear attention, the first dense layers of a mixture of experts) are counted as if
        all were of the kind that is most frequent.
        """
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        kinds = list(getattr(text, "layer_types", None) or [])
        layers = getattr(text, "per_layer_config", None)
        usual = layers[max(range(len(kinds)), key=lambda i: kinds.count(kinds[i]))] if layers and kinds else text

        def read(field: str) -> int:
            return whole(f"config.{field}", getattr(usual, field, None), least=1)

        hidden_size, num_heads = read("hidden_size"), read("num_attention_heads")
        return cls(
            num_layers=whole("config.num_hidden_layers", getattr(text, "num_hidden_layers", None), least=1),
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=getattr(usual, "num_key_value_heads", None) or num_heads,
            head_dim=getattr(usual, "head_dim", None) or hidden_size // num_heads,
            intermediate_size=_active_width(usual)
            or read("ffn_dim" if hasattr(usual, "ffn_dim") else "intermediate_size"),
        )

    def layer_flops(self, tokens: int, kept: int | None = None) -> int:
        """FLOPs (2 x multiply-adds) of one decoder layer given `tokens` tokens that needs outputs for `kept` of them.

        Q, K and V projections run for all tokens (the queries of dropped ones exist before the selection is known),
        output projection and MLP for the kept ones. Attention (Q K^T and A V) is counted at the causal half: a row
        goes over tokens / 2 keys, which is the mean over all rows, and what kept rows meet if they lie anywhere.
        Norms, softmax, rotary embedding and the scoring itself are not counted.
        """
        kept = tokens if kept is None else kept
        attention = 2 * 2 * kept * tokens * self.num_heads * self.head_dim // 2
        return 2 * (tokens * self._qkv_weights + kept * self._other_weights) + attention

    @property
    def dropped_share(self) -> float:
        """Cost of a token in the layer that drops it (Q, K, V) as a share of one that stays; attention left out."""
        return self._qkv_weights / (self._qkv_weights + self._other_weights)

    @property
    def _qkv_weights(self) -> int:
        return self.hidden_size * self.head_dim * (self.num_heads + 2 * self.num_kv_heads)

    @property
    def _other_weights(self) -> int:
        return self.hidden_size * (self.num_heads * self.head_dim + 3 * self.intermediate_size)


def _active_width(text: Any) -> int:
    """Width of a mixture of experts that one token goes through, the shared expert included; 0 without experts."""
    experts = next((n for name in _EXPERTS_A_TOKEN if (n := getattr(text, name, None))), 0)
    width = getattr(text, "moe_intermediate_size", None) or 0
    if not isinstance(experts, int) or not isinstance(width, int) or not experts:
        return 0
    shared = getattr(text, "shared_expert_intermediate_size", None) or 0
    return experts * width + (shared or (getattr(text, "n_shared_experts", None) or 0) * width)
