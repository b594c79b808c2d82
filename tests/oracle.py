"""The slow truth: an unpruned eager model in which dropped tokens are masked from the layer after their stage on.

Independent of the engine on purpose: attention is the model's own full output, the score is written out as loops in
float64, nothing is gathered, cached or skipped.
"""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import torch


def score(attention: np.ndarray, vision: list[int], text: list[int], prior_weight: float = 1.0) -> dict[int, float]:
    """AdaptInfer's score of each vision token from full post-softmax attention [H, N, N]."""
    heads = attention.shape[0]
    a = attention.astype(np.float64)
    symmetric = np.zeros((heads, len(text), len(text)))
    for h in range(heads):
        for i, row in enumerate(text):
            for j, column in enumerate(text):
                symmetric[h, i, j] = a[h, row, column] if row == column else a[h, row, column] + a[h, column, row]
    symmetric = prior_weight * symmetric + (1 - prior_weight) * symmetric.mean()
    result = {}
    for v in vision:
        total = 0.0
        for h in range(heads):
            for j, row in enumerate(text):
                total += symmetric[h, :, j].sum() * a[h, row, v]
        result[v] = total
    return result


def best(scores: dict[int, float], k: int) -> list[int]:
    """The k best, ascending; of equal scores the earlier."""
    return sorted(sorted(scores, key=lambda v: (-scores[v], v))[:k])


class Oracle:
    """An eager model and the stages to mask at: ``keeps[layer]`` lists how many each sample keeps."""

    def __init__(self, model, keeps: dict[int, list[int]], placeholders, positions="keep", prior_weight=1.0):
        assert model.config.get_text_config()._attn_implementation == "eager"
        self.model, self.keeps, self.placeholders = model, keeps, placeholders
        self.positions, self.prior_weight = positions, prior_weight
        self.alive: dict[
            int, torch.Tensor
        ] = {}  # layer of the stage -> bool [B, N], tokens seen by the layers after it

    def settle(self, inputs) -> list[list[list[int]]]:
        """Choose at every stage; returns the kept positions per stage and sample."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
        vision = torch.zeros_like(mask)
        for token in self.placeholders:
            vision |= ids == token
        alive = torch.ones_like(mask)
        kept = []
        for layer in sorted(self.keeps):
            attention = self._run(inputs, output_attentions=True).attentions[layer]
            chosen = []
            alive = alive.clone()
            for b in range(ids.shape[0]):
                tokens = (vision[b] & alive[b]).nonzero()[:, 0].tolist()
                if not tokens:
                    chosen.append([])
                    continue
                last = vision[b].nonzero().max().item()
                text = [i for i in range(last + 1, ids.shape[1]) if mask[b, i]]
                ranked = score(attention[b].numpy(), tokens, text, self.prior_weight)
                stay = best(ranked, self.keeps[layer][b])
                alive[b, [v for v in tokens if v not in stay]] = False
                chosen.append(stay)
            self.alive[layer] = alive
            kept.append(chosen)
        return kept

    def logits(self, inputs) -> torch.Tensor:
        """Logits of a run in which the settled tokens are masked; the prompt may have grown by new tokens."""
        return self._run(inputs).logits

    def generate(self, inputs, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Greedy tokens [B, steps] and their logits, each step a full run without a cache.

        Placeholders are never generated: a later full run would look for their images.
        """
        inputs, tokens, logits = dict(inputs), [], []
        for _ in range(steps):
            last = self.logits(inputs)[:, -1]
            logits.append(last)
            speakable = last.clone()
            speakable[:, list(self.placeholders)] = float("-inf")
            tokens.append(speakable.argmax(dim=-1))
            inputs = grown(inputs, tokens[-1][:, None])
        return torch.stack(tokens, dim=1), torch.stack(logits, dim=1)

    def generate_with(self, inputs, **options):
        """transformers' own generate on the masked model, without a cache."""
        with self._masked():
            return self.model.generate(**inputs, use_cache=False, **options)

    @torch.no_grad()
    def _run(self, inputs, **kwargs):
        inputs = dict(inputs)
        if "mm_token_type_ids" not in inputs:  # one-dimensional positions go by the padding mask, as in generate
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        with self._masked():
            return self.model(**inputs, use_cache=False, **kwargs)

    @contextmanager
    def _masked(self):
        decoder, hooks = self.model.get_decoder(), []

        def hook_for(number):
            def hook(module, args, kwargs):
                settled = [layer for layer in sorted(self.alive) if layer < number]
                if not settled:
                    return None
                kwargs = dict(kwargs)
                alive = self.alive[settled[-1]]
                total = args[0].shape[1]
                alive = torch.nn.functional.pad(alive, (0, total - alive.shape[1]), value=True)
                alive = alive.repeat_interleave(args[0].shape[0] // alive.shape[0], dim=0)  # beams
                floor = torch.finfo(kwargs["attention_mask"].dtype).min
                kwargs["attention_mask"] = kwargs["attention_mask"].masked_fill(~alive[:, None, None, :], floor)
                if self.positions == "compact":
                    shifted = kwargs["position_ids"] - (~alive).cumsum(dim=1)
                    kwargs["position_embeddings"] = decoder.rotary_emb(args[0], shifted)
                return args, kwargs

            return hook

        for number, layer in enumerate(decoder.layers):
            hooks.append(layer.register_forward_pre_hook(hook_for(number), with_kwargs=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def grown(inputs, tokens: torch.Tensor):
    """Inputs with text tokens [B, n] appended."""
    inputs = dict(inputs)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens], dim=1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], dim=1)
    if "mm_token_type_ids" in inputs:
        more = torch.zeros(tokens.shape, dtype=inputs["mm_token_type_ids"].dtype)
        inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], more], dim=1)
    return inputs
