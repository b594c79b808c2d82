"""The attention function of an attached model: its own; in a pruning layer it scores first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adaptinfer.engine.families import is_flash, own_attention
from adaptinfer.engine.forward import ACTIVE, outside_graphs
from adaptinfer.functional import gather_tokens, scatter_tokens

ATTENTION = "adaptinfer"
"""The name under which transformers finds it."""
LARGEST_MASK = 2**20  # entries of a mask made for survivors


def attention_in_stage(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The model's own attention function; in a pruning layer it scores first and attends for survivors only."""
    attend, caller, backend = own_attention(module)
    if torch.compiler.is_compiling() and query.shape[2] == 1:
        return attend(caller, query, key, value, attention_mask, **kwargs)
    return attention_of_call(attend, caller, backend, module, query, key, value, attention_mask, kwargs)


@outside_graphs
def attention_of_call(
    attend: Any,
    caller: Any,
    backend: str,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """`attention_in_stage` outside of compiled graphs."""
    forward = ACTIVE.get()
    # Another model may run inside a forward of this one, so the layer's number alone does not tell.
    if forward is None or forward.owner is not module.config.adaptinfer_owner:
        return attend(caller, query, key, value, attention_mask, **kwargs)
    if is_flash(backend) and forward.segment is not None:
        kwargs.pop("position_ids", None)  # survivors' gaps would be taken for the seams of packed sequences
    forward.answer(query, key, attention_mask, kwargs)
    layer = module.layer_idx
    if not forward.scores_in(layer):
        return attend(caller, query, key, value, attention_mask, **kwargs)
    used, visible = forward.choose(layer, query, key, attention_mask, kwargs)
    rows = forward.dropping(layer)
    entered = query.shape[2]
    # All rows under the causal kernel cost half a rectangle; survivors alone need an explicit mask and cost all of it.
    # FlashAttention takes no mask, and a block mask would have to be made, for less than it saves.
    if rows is None or 2 * rows.shape[1] > entered or backend not in ("sdpa", "eager"):
        return attend(caller, query, key, value, attention_mask, **kwargs)
    key, value = key[:, :, :used], value[:, :, :used]
    # The mask of a few rows at a time: of all survivors it would be the largest thing in a long prompt's prefill.
    step = max(1, LARGEST_MASK // (rows.shape[0] * used))
    parts = [
        attend(caller, gather_tokens(query, some, dim=2), key, value, visible(some), **kwargs)[0]
        for some in rows.split(step, dim=1)
    ]
    return scatter_tokens(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1), rows, entered), None
