"""AdaptInfer in one page: score, selection and the attention rows they need, as pure functions on tensors.

No model, no state, no host synchronisation lives here; the engine calls these functions inside a decoder layer.

Names: B batch, H attention heads, K key/value heads, T text rows (the prompt after the last vision token), V vision
tokens still alive, N tokens of the layer's input, L key columns, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

__all__ = [
    "attention_rows",
    "counter_uniform",
    "evenly_spaced",
    "gather_tokens",
    "marked_first",
    "per_sample",
    "positions_of",
    "scatter_tokens",
    "score_of_heads",
    "select_top_k",
    "soft_prior",
    "text_guided_score",
    "text_guided_sums",
    "top_k_mask",
]


def text_guided_score(
    text_to_text: Tensor,
    text_to_vision: Tensor,
    prior_weight: float = 1.0,
    text_mask: Tensor | None = None,
) -> Tensor:
    """How much each vision token matters to the question, at the depth at which the attention was taken.

    AdaptInfer's dynamic text guidance (arXiv 2508.06084, section 3). Per head, the symmetrised text-to-text attention
    S = A + Aᵀ - diag(A) gives every text token a weight w_j = Σ_i S_ij (the soft prior), and a vision token's score is
    the text-to-vision attention weighed by it, summed over heads and text tokens. Nothing is normalised.

    Args:
        text_to_text: post-softmax causal attention between text tokens, [B, H, T, T] (rows are queries).
        text_to_vision: post-softmax attention of the same rows to the vision tokens, [B, H, T, V].
        prior_weight: λ in [0, 1]; S is replaced by λ S + (1 - λ) mean(S). 1 is the paper's setting, 0 a uniform prior.
        text_mask: bool [B, T], False where a text row is padding; None means that all rows are real.

    Returns:
        float32 scores, [B, V].

    Raises:
        ValueError: shapes do not fit together, or ``prior_weight`` lies outside [0, 1].
    """
    if not 0.0 <= prior_weight <= 1.0:
        raise ValueError(f"prior_weight: must lie in [0, 1], not {prior_weight!r}")
    batch, heads, rows, columns = text_to_text.shape
    if rows != columns or text_to_vision.shape[:3] != (batch, heads, rows):
        raise ValueError(
            f"text_to_text must be [B, H, T, T] and text_to_vision [B, H, T, V]; "
            f"got {tuple(text_to_text.shape)} and {tuple(text_to_vision.shape)}"
        )
    return score_of_heads([(text_to_text, text_to_vision)], heads, prior_weight, text_mask)


def score_of_heads(
    groups: Iterable[tuple[Tensor, Tensor]],
    heads: int,
    prior_weight: float,
    text_mask: Tensor | None = None,
    total: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """`text_guided_score` of attention that comes a few heads at a time, as `AdaptInfer` calls it.

    Args:
        groups: (text_to_text, text_to_vision) as in `text_guided_score`, each for some of the heads.
        heads: H, over all groups and all ranks of tensor parallelism.
        prior_weight: as in `text_guided_score`.
        text_mask: as in `text_guided_score`.
        total: adds a tensor up over the ranks; each call is one message between them. None on one rank.

    Returns:
        float32 scores, [B, V].
    """
    parts, rows = [], 0
    for text_to_text, text_to_vision in groups:
        parts.append(text_guided_sums(text_to_text, text_to_vision, text_mask))
        rows = text_to_text.shape[2]
    sums = [torch.stack(each).sum(dim=0) for each in zip(*parts, strict=True)][: 1 if prior_weight == 1.0 else 3]
    sums = sums if total is None else [total(each) for each in sums]
    if prior_weight == 1.0:
        return sums[0]
    weighted, plain, mass = sums
    real_rows = rows if text_mask is None else text_mask.sum(dim=1).clamp(min=1)
    # mean(S) over heads and pairs, once for each of the rows that a column of S~ is summed over
    uniform = mass / (heads * real_rows)
    return prior_weight * weighted + (1.0 - prior_weight) * uniform[:, None] * plain


def text_guided_sums(
    text_to_text: Tensor, text_to_vision: Tensor, text_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The parts of the score that add up over heads, so that a long prompt can be scored a few heads at a time.

    Args:
        text_to_text: as in `text_guided_score`, for some of the heads.
        text_to_vision: as in `text_guided_score`, for the same heads.
        text_mask: as in `text_guided_score`.

    Returns:
        Σ_hj w_hj A_hjv with the prior w of λ = 1, [B, V]; the same with w = 1, [B, V]; Σ_hij S_hij, [B]. All float32.
    """
    attention, to_vision = text_to_text.float(), text_to_vision.float()
    if text_mask is not None:
        attention = attention * (text_mask[:, None, :, None] & text_mask[:, None, None, :])
        to_vision = to_vision * text_mask[:, None, :, None]
    prior = soft_prior(attention)
    # Products and sums, not a matrix product: autocast would take that in half precision.
    weighted = (prior[..., None] * to_vision).sum(dim=(1, 2))
    return weighted, to_vision.sum(dim=(1, 2)), prior.sum(dim=(1, 2))


def soft_prior(text_to_text: Tensor) -> Tensor:
    """How much each text token matters, by attention between text tokens: w_j = Σ_i S_ij with S = A + Aᵀ - diag(A).

    Args:
        text_to_text: [B, H, T, T], rows are queries; zeros where a row or column is padding.

    Returns:
        [B, H, T].
    """
    # Without making S: column sum and row sum of A, less the diagonal, which stands in both.
    return text_to_text.sum(dim=2) + text_to_text.sum(dim=3) - text_to_text.diagonal(dim1=2, dim2=3)


def attention_rows(
    query: Tensor, key: Tensor, scaling: float, mask: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """Post-softmax attention of a few query rows; grouped-query heads are handled without repeating the keys.

    Args:
        query: the wanted rows after rotary embedding, [B, H, T, D].
        key: all keys after rotary embedding, [B, K, L, D], H a multiple of K.
        scaling: factor on the dot products.
        mask: what each row may see, [B or 1, 1, T, L]: bool (True = attend) or additive float; None sees everything.
        softcap: logits become softcap · tanh(logits / softcap), as in Gemma 2; None leaves them.

    Returns:
        float32 attention, [B, H, T, L]; the softmax is taken in float32 whatever the model's dtype.
    """
    batch, heads, rows, dim = query.shape
    kv_heads, columns = key.shape[1], key.shape[2]
    grouped = (query * scaling).reshape(batch, kv_heads, heads // kv_heads * rows, dim)
    logits = torch.matmul(grouped, key.transpose(2, 3)).float().view(batch, heads, rows, columns)
    if softcap is not None:
        logits = (logits / softcap).tanh() * softcap
    if mask is not None:
        if mask.dtype == torch.bool:
            # A finite floor: a row that may see nothing (padding) stays finite instead of becoming NaN.
            logits = logits.masked_fill(~mask, torch.finfo(torch.float32).min)
        else:
            logits = logits + mask.float()
    return logits.softmax(dim=-1)


def top_k_mask(score: Tensor, candidates: Tensor, k: int | Tensor) -> Tensor:
    """Mark the k best candidates of each row; of equal scores the earlier token wins.

    Args:
        score: [B, N], any float dtype.
        candidates: bool [B, N]; only these can be chosen.
        k: how many to choose: one number, or an integer tensor [B, 1]. At most the number of candidates is chosen.

    Returns:
        bool [B, N].
    """
    ranked = score.masked_fill(~candidates, float("-inf")).sort(dim=1, descending=True, stable=True).indices
    chosen = (torch.arange(score.shape[1], device=score.device) < k).expand_as(ranked)
    return torch.zeros_like(candidates).scatter(1, ranked, chosen) & candidates


def per_sample(values: Sequence[int], device: torch.device) -> int | Tensor:
    """Numbers known on the host, one a sample, for use against [B, n]: one if all are equal, else int64 [B, 1].

    Filled on the device: a copy from the host would be repeated by a CUDA graph, from memory that is long gone.
    """
    if min(values) == max(values):
        return values[0]
    return torch.cat([torch.full((1, 1), value, device=device) for value in values])


def evenly_spaced(counts: Sequence[int], keeps: Sequence[int], device: torch.device) -> Tensor:
    """Mark keeps[b] of the first counts[b] columns of each row, as evenly as whole numbers allow.

    Column j is marked where (j + 1) k / n passes a whole number: each of k runs of about n / k columns ends with one.

    Returns:
        bool [B, max(counts)].
    """
    column = torch.arange(max(counts), device=device)[None].expand(len(counts), -1)
    n, k = per_sample([max(1, count) for count in counts], device), per_sample(keeps, device)
    return ((column + 1) * k // n > column * k // n) & (column < per_sample(counts, device))


def marked_first(mask: Tensor, count: int) -> Tensor:
    """Positions of the marked tokens in ascending order, followed by the first unmarked ones to fill a rectangle.

    Args:
        mask: bool [B, N] with at most ``count`` True per row.
        count: columns of the result.

    Returns:
        int64 [B, count]; entry i of a row is its i-th marked token as long as it has that many, whatever the other rows
        hold. ``mask.gather(1, positions)`` tells which are real.
    """
    return mask.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :count]


def positions_of(mask: Tensor, count: int) -> Tensor:
    """Positions of the marked tokens in ascending order, at the end of each row; unmarked ones fill it from the left.

    Fillers stand where padding usually does, so that whatever reads tokens in order (a recurrent layer, a convolution,
    a window of the last entries) meets a row's own tokens side by side.

    Args:
        mask: bool [B, N] with at most ``count`` True per row.
        count: columns of the result, at most N.

    Returns:
        int64 [B, count], without repeats.
    """
    order = mask.to(torch.uint8).sort(dim=1, stable=True).indices
    return order[:, mask.shape[1] - count :]


def select_top_k(score: Tensor, k: int) -> Tensor:
    """Positions of the k largest scores of each row, ascending; of equal scores the earlier token wins.

    Args:
        score: [B, V].
        k: 0 <= k <= V.

    Returns:
        int64 [B, k].

    Raises:
        ValueError: k is out of range.
    """
    if not 0 <= k <= score.shape[1]:
        raise ValueError(f"k: must lie between 0 and the {score.shape[1]} tokens scored, not {k}")
    return positions_of(top_k_mask(score, torch.ones_like(score, dtype=torch.bool), k), k)


def gather_tokens(tensor: Tensor, index: Tensor, dim: int, batch_dim: int = 0) -> Tensor:
    """Take each sample's own tokens along one dimension.

    Args:
        tensor: any shape with the batch (or a 1 to broadcast) in ``batch_dim`` and tokens in ``dim``.
        index: int64 [B, n], positions along ``dim``.
        dim: non-negative dimension of the tokens.
        batch_dim: non-negative dimension of the batch.

    Returns:
        ``tensor`` with ``dim`` of size n and ``batch_dim`` of size B.
    """
    batch, count = index.shape
    index = index.to(tensor.device)  # accelerate may have moved the layer's inputs to another device
    if tensor.shape[batch_dim] == 1:
        if batch == 1:
            return tensor.index_select(dim, index[0])
        tensor = tensor.expand(*(batch if axis == batch_dim else size for axis, size in enumerate(tensor.shape)))
    view = [1] * tensor.ndim
    view[batch_dim], view[dim] = batch, count
    shape = list(tensor.shape)
    shape[dim] = count
    return tensor.gather(dim, index.view(view).expand(shape))


def scatter_tokens(tensor: Tensor, index: Tensor, length: int, valid: Tensor | None = None) -> Tensor:
    """Put tokens back at their places in a longer sequence of zeros; the inverse of a gather along dimension 1.

    Args:
        tensor: [B, n, ...].
        index: int64 [B, n], positions in the result.
        length: tokens of the result.
        valid: bool [B, n]; invalid tokens are written as zeros.

    Returns:
        [B, length, ...].
    """
    index = index.to(tensor.device)
    trailing = (1,) * (tensor.ndim - 2)
    if valid is not None:
        tensor = tensor.masked_fill(~valid.to(tensor.device).view(*valid.shape, *trailing), 0)
    out = tensor.new_zeros(tensor.shape[0], length, *tensor.shape[2:])
    return out.scatter_(1, index.view(*index.shape, *trailing).expand_as(tensor), tensor)


def counter_uniform(count: int, seed: int, stream: int, device: torch.device | str = "cpu") -> Tensor:
    """Uniform numbers from a counter: entry i depends on (seed, stream, i) alone, on every device and for every count.

    A hash instead of a generator, so that a prompt gets the same random choice alone and in a batch, where rows of
    different length share one tensor. The mixing function is the 32-bit finaliser of MurmurHash3.

    Returns:
        float32 [count] in [0, 1).
    """
    mask = 0xFFFFFFFF
    start = (seed * 0x9E3779B1 + stream * 0x85EBCA77) & mask
    value = (torch.arange(count, device=device, dtype=torch.int64) * 0x27D4EB2F + start) & mask
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        value = ((value ^ (value >> shift)) * factor) & mask
    return (value >> 8).float() / float(1 << 24)
