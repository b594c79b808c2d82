"""What stays the same for as long as a pruner is attached to a model; all parts of the engine share one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from adaptinfer.engine.calls import Calls
from adaptinfer.engine.families import Family
from adaptinfer.engine.parallel import Ranks
from adaptinfer.errors import AdaptInferError
from adaptinfer.pruners.contracts import Pruner


@dataclass(frozen=True, kw_only=True, eq=False)
class Attachment:
    """A model, the parts of it that the engine works on, and the pruner.

    Attributes:
        model: what the pruner was attached to.
        base: the multimodal model without its head.
        decoder: the text model whose layers prune.
        family: what the engine found in the model.
        pruner: what chooses.
        ranks: over which the model may be split.
        early_drop: whether a pruning layer skips the outputs of tokens that it drops.
        calls: the model's running calls.
    """

    model: Any
    base: Any
    decoder: Any
    family: Family
    pruner: Pruner
    ranks: Ranks
    early_drop: bool
    calls: Calls

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise AdaptInferError("a model with a pruner attached cannot be copied or pickled; detach first")
