"""The slow truth: an unpruned eager model in which dropped tokens are masked from the layer after their stage on.

Independent of the engine on purpose: attention is the model's own full output (its windows, two-way image blocks,
soft-capping and sharp scaling are in it), the score is written out as loops in float64, nothing is cached or skipped.
Layers without attention cannot be masked: they are run on each sample's surviving tokens alone, one sample at a time.
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
        layers = self.model.get_decoder().layers
        attending = [number for number, layer in enumerate(layers) if hasattr(layer, "self_attn")]
        for layer in sorted(self.keeps):
            attentions = self._run(inputs, output_attentions=True).attentions
            assert len(attentions) == len(attending)
            attention = attentions[attending.index(layer)]
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
            inputs = grown(inputs, tokens[-1][:, None], self.model.config.model_type)
        return torch.stack(tokens, dim=1), torch.stack(logits, dim=1)

    def generate_with(self, inputs, **options):
        """transformers' own generate on the masked model, without a cache."""
        with self._masked():
            return self.model.generate(**inputs, use_cache=False, **options)

    @torch.no_grad()
    def _run(self, inputs, **kwargs):
        inputs = dict(inputs)
        if not hasattr(self.model.base_model, "get_rope_index"):  # positions in one dimension, as generate numbers them
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        with self._masked():
            return self.model(**inputs, use_cache=False, **kwargs)

    @contextmanager
    def _masked(self):
        hooks, layers = [], self.model.get_decoder().layers
        for number, layer in enumerate(layers):
            if hasattr(layer, "self_attn"):
                hooks.append(layer.register_forward_pre_hook(self._mask_for(number), with_kwargs=True))
            else:
                layer.forward = self._survivors_for(number, layer.forward)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for layer in layers:
                vars(layer).pop("forward", None)

    def _alive_in(self, number: int, hidden: torch.Tensor) -> torch.Tensor | None:
        """Bool [B, N]: the tokens that a layer is given; None before the first stage. New tokens are given to all."""
        settled = [layer for layer in sorted(self.alive) if layer < number]
        if not settled:
            return None
        alive = self.alive[settled[-1]]
        alive = torch.nn.functional.pad(alive, (0, hidden.shape[1] - alive.shape[1]), value=True)
        return alive.repeat_interleave(hidden.shape[0] // alive.shape[0], dim=0)  # beams

    def _mask_for(self, number: int):
        """Hook of a layer with attention: nobody sees the keys that the layer was not given."""
        source = key_source(self.model.config.get_text_config(), number)

        def hook(module, args, kwargs):
            kwargs, hidden = dict(kwargs), args[0]
            alive = self._alive_in(source, hidden)
            if alive is not None:
                floor = torch.finfo(kwargs["attention_mask"].dtype).min
                kwargs["attention_mask"] = kwargs["attention_mask"].masked_fill(~alive[:, None, None, :], floor)
            alive = self._alive_in(number, hidden)
            if alive is not None and self.positions == "compact":
                shifted = kwargs["position_ids"] - (~alive).cumsum(dim=1)
                kwargs["position_embeddings"] = self.model.get_decoder().rotary_emb(hidden, shifted)
            return args, kwargs

        return hook

    def _survivors_for(self, number: int, run):
        """A layer of linear attention or convolution over each sample's surviving tokens, as if there were no others.

        Rows of dropped tokens and of padding are zeros.
        """

        def forward(hidden, *args, attention_mask=None, position_embeddings=None, position_ids=None, **kwargs):
            alive = self._alive_in(number, hidden)
            if alive is None:
                return run(
                    hidden,
                    *args,
                    attention_mask=attention_mask,
                    position_embeddings=position_embeddings,
                    position_ids=position_ids,
                    **kwargs,
                )
            if attention_mask is not None:
                alive = alive & attention_mask.bool()
            out = torch.zeros_like(hidden)
            for b in range(hidden.shape[0]):
                tokens = alive[b].nonzero()[:, 0]
                rotary = [part.expand(hidden.shape[0], -1, -1)[[b]][:, tokens] for part in position_embeddings]
                out[b, tokens] = run(
                    hidden[[b]][:, tokens], *args, attention_mask=None, position_embeddings=tuple(rotary), **kwargs
                )[0]
            return out

        return forward


def key_source(text_config, layer: int) -> int:
    """The layer whose keys a layer reads. The last layers of Gemma 4 have none: theirs are those of the last layer of
    the same type that has."""
    with_keys = text_config.num_hidden_layers - (getattr(text_config, "num_kv_shared_layers", 0) or 0)
    if layer < with_keys:
        return layer
    types = text_config.layer_types
    return [earlier for earlier in range(with_keys) if types[earlier] == types[layer]][-1]


def grown(inputs, tokens: torch.Tensor, model_type: str | None = None):
    """Inputs with text tokens [B, n] appended."""
    inputs = dict(inputs)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens], dim=1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], dim=1)
    for name in ("mm_token_type_ids", "moe_mm_token_type_ids", "token_type_ids"):
        if name in inputs:
            # No image; PaliGemma's types tell the prompt (0), read in both directions, from the answer (1).
            answer = model_type == "paligemma"
            more = torch.full(tokens.shape, int(answer), dtype=inputs[name].dtype)
            inputs[name] = torch.cat([inputs[name], more], dim=1)
    return inputs


def keeps_of(schedule, prompts, placeholders) -> dict[int, list[int]]:
    """How many vision tokens each prompt keeps, by layer of the stage."""
    rows = [schedule.keeps(sum(token in placeholders for token in prompt)) for prompt in prompts]
    return {stage.layer: [row[s] for row in rows] for s, stage in enumerate(schedule.stages)}
