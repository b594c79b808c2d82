"""Break the code on purpose, one line at a time, and see the tests go red.

    .venv/bin/python tests/mutants.py [WORDS OF A BUG ...]


Each mutant is a bug that published pruning code has had, or one that an optimisation here invites. It is applied to a
copy of ``src``, the named tests run against the copy, and a mutant that survives is reported and makes the exit code 1.
Takes some minutes, so it is no part of ``make test``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Mutant(NamedTuple):
    bug: str
    file: str
    line: str
    broken: str
    tests: str


MUTANTS = [
    Mutant(
        "adaptinfer serve: fields that it leaves undone are taken in silence",
        "serving/requests.py",
        "        if value is not None and value not in unasked:",
        "        if False:",
        "tests/test_serve.py::test_bad_requests_are_told_so_while_others_go_on",
    ),
    Mutant(
        "graphs: results are left in the graph's buffers, where the next prompt overwrites them",
        "engine/prefill_graph.py",
        "    return tensor[:, tensor.shape[1] - count :].clone(memory_format=torch.contiguous_format)",
        "    return tensor[:, tensor.shape[1] - count :]",
        "tests/test_graphs.py::test_several_buckets",
    ),
    Mutant(
        "graphs: what an earlier, longer prompt left in front of a shorter one counts as vision",
        "engine/prefill_graph.py",
        "        buffer.narrow(dim, 0, left).zero_()",
        "        pass",
        "tests/test_graphs.py::test_many_prompts_of_a_bucket_share_a_graph",
    ),
    Mutant(
        "graphs: positions of the prompt that was captured are those of all",
        "engine/prefill_graph.py",
        "        _fill(self._positions, positions, self._positions.ndim - 1)",
        "        self._positions.copy_(torch.arange(self._bucket.length))",
        "tests/test_graphs.py::test_many_prompts_of_a_bucket_share_a_graph",
    ),
    Mutant(
        "graphs: the padding of a bucket is attended",
        "engine/prefill_graph.py",
        "    seen = (place[:, None] >= place[None, :]) & real[:, None, None, :]",
        "    seen = (place[:, None] >= place[None, :]) & torch.ones_like(real)[:, None, None, :]",
        "tests/test_graphs.py::test_many_prompts_of_a_bucket_share_a_graph",
    ),
    Mutant(
        "graphs: the padding of a bucket goes on as if it had survived",
        "engine/layout.py",
        "        return min(totals) == max(totals) and not (self.bounds and self.real is not None)",
        "        return min(totals) == max(totals)",
        "tests/test_graphs.py::test_many_prompts_of_a_bucket_share_a_graph",
    ),
    Mutant(
        "graphs: text that is not there guides",
        "engine/layout.py",
        "        return index, text.gather(1, index) if self.bounds else mask",
        "        return index, mask",
        "tests/test_graphs.py::test_many_prompts_of_a_bucket_share_a_graph",
    ),
    Mutant(
        "graphs: kept positions are counted in the bucket's length",
        "engine/prefill_graph.py",
        "            index = _last(wide.index, count) - left",
        "            index = _last(wide.index, count)",
        "tests/test_graphs.py::test_many_prompts_of_a_bucket_share_a_graph",
    ),
    Mutant(
        "graphs: prompts with other counts of vision tokens share a graph",
        "engine/compiled.py",
        "        return kind, what, shapes, tuple(sorted(options.items())), weights",
        "        return kind, shapes, tuple(sorted(options.items())), weights",
        "tests/test_graphs.py::test_several_buckets",
    ),
    Mutant(
        "graphs: an answer reads what the answer before it left behind its room",
        "engine/decoding_graph.py",
        "            shared.seen.zero_()",
        "            pass",
        "tests/test_graphs.py::test_many_prompts_of_a_bucket_share_a_graph",
    ),
    Mutant(
        "graphs: padding and fillers are attended while decoding",
        "engine/decoding_graph.py",
        "            shared.seen[:, 0, 0, :held] = _entries_seen(history, held, mask)",
        "            shared.seen[:, 0, 0, :held] = True",
        "tests/test_graphs.py::test_uneven_batch",
    ),
    Mutant(
        "graphs: a new token does not see itself",
        "engine/decoding_graph.py",
        "                shared.seen.index_fill_(3, shared.place, True)",
        "                pass",
        "tests/test_graphs.py::test_many_prompts_of_a_bucket_share_a_graph",
    ),
    Mutant(
        "graphs: compact positions of the layers behind a stage are those of the prompt",
        "engine/decoding_graph.py",
        "                shared.shift.copy_(history.shift)",
        "                pass",
        "tests/test_graphs.py::test_compact_positions",
    ),
    Mutant(
        "graphs: two generations decode in the same buffers",
        "engine/compiled.py",
        "        if graph is None or graph.busy:",
        "        if graph is None:",
        "tests/test_graphs.py::test_generating_inside_a_generation",
    ),
    Mutant(
        "graphs: a later answer overwrites a cache that its user still holds",
        "engine/compiled.py",
        "        graph.release()",
        "        graph.lease = None",
        "tests/test_graphs.py::test_a_cache_outlives_its_graph",
    ),
    Mutant(
        "graphs: a generation that goes on loses its graph to a new prompt",
        "engine/graphs.py",
        "                oldest = next((known for known, entry in self._entries.items() if not entry.busy), None)",
        "                oldest = next(iter(self._entries), None)",
        "tests/test_graphs.py::test_a_graph_in_use_is_not_evicted",
    ),
    Mutant(
        "graphs: more are held than allowed",
        "engine/graphs.py",
        "            while len(self._entries) >= self._most:",
        "            while len(self._entries) > self._most:",
        "tests/test_graphs.py::test_eviction",
    ),
    Mutant(
        "graphs: numbers of the host are copied into a graph from memory that is gone",
        "functional.py",
        "    return torch.cat([torch.full((1, 1), value, device=device) for value in values])",
        "    return torch.tensor(values).to(device, non_blocking=True)[:, None]",
        "tests/test_graphs.py::test_uneven_batch",
    ),
    Mutant(
        "vLLM: text rows are looked for where they stood before earlier stages",
        "serving/vllm_plugin/step.py",
        "            text_index=torch.arange(start - dropped, stop - dropped, device=device)[None],",
        "            text_index=torch.arange(start, stop, device=device)[None] % query.shape[1],",
        "tests/test_serving_plan.py",
    ),
    Mutant(
        "vLLM: vision tokens are looked for where they stood before earlier stages",
        "serving/vllm_plugin/step.py",
        "        self._vision[number] = (alive.cumsum(dim=1) - 1).gather(1, kept)",
        "        self._vision[number] = kept % max(1, length - vision.shape[1] + keep)",
        "tests/test_serving_plan.py",
    ),
    Mutant(
        "vLLM: an answer reads entries that its pruned layers never held",
        "serving/vllm_plugin/plan.py",
        "        return self.prompt.dropped(layer) if self.prompt.prunes else 0",
        "        return self.prompt.dropped(layer) if self.prompt.prunes and self.prefills else 0",
        "tests/test_serving_plan.py",
    ),
    Mutant(
        "vLLM: an answer that is computed again after a preemption guides",
        "serving/vllm_plugin/step.py",
        "        start, stop = self._rows[number].prompt.text",
        "        start, stop = self._rows[number].prompt.text[0], self._rows[number].new",
        "tests/test_serving_plan.py",
    ),
    Mutant(
        "1: the scoring pass forgets causality where SDPA's mask is None",
        "engine/masks.py",
        "    seen = columns <= rows[..., None] + past",
        "    seen = columns < rows[..., None] + length",
        "tests/test_engine_oracle.py::test_prefill_is_the_masked_run",
    ),
    Mutant(
        "2: positions are compacted by accident in the prefill",
        "engine/forward.py",
        "            return gather_tokens(part, rows, dim=part.ndim - 2, batch_dim=part.ndim - 3)",
        "            return part[..., : rows.shape[1], :]",
        "tests/test_engine_oracle.py::test_prefill_is_the_masked_run",
    ),
    Mutant(
        "2: decode positions follow each layer's own cache length",
        "engine/forward.py",
        "        shift = None if before is None else before.shift",
        "        shift = None if before is None else before.length - torch.tensor([[before.columns.shape[1]]])",
        "tests/test_engine_oracle.py::test_cached_decoding_is_recomputation",
    ),
    Mutant(
        "3: survivors are out of order, so tokens are permuted",
        "functional.py",
        "    return order[:, mask.shape[1] - count :]",
        "    return order[:, mask.shape[1] - count :].flip(1)",
        "tests/test_functional.py",
    ),
    Mutant(
        "4: row 0 of the batch chooses for every sample",
        "pruners/contracts.py",
        "        return Selection(top_k_mask(score, candidates, per_sample(keeps, score.device)), score)",
        "        score = score[:1].expand(score.shape)\n"
        "        return Selection(top_k_mask(score, candidates, per_sample(keeps, score.device)), score)",
        "tests/test_engine_exact.py::test_a_batch_is_its_samples",
    ),
    Mutant(
        "5: a pruning layer runs its choice twice",
        "engine/attach.py",
        "    used, visible = forward.choose(",
        "    forward.choose(layer, query, key, attention_mask, kwargs)\n    used, visible = forward.choose(",
        "tests/test_engine_oracle.py::test_prefill_is_the_masked_run",
    ),
    Mutant(
        "6: later layers get the mask rows of other tokens",
        "engine/masks.py",
        "        mask = gather_tokens(mask, rows, dim=2)\n    mask = gather_tokens(mask, at, dim=3)",
        "        mask = mask[:, :, : rows.shape[1]]\n    mask = gather_tokens(mask, at, dim=3)",
        "tests/test_engine_oracle.py::test_prefill_is_the_masked_run",
    ),
    Mutant(
        "7: a plan made for one prompt is used for every later one",
        "engine/attach.py",
        "        if vision_tokens not in self._plans:",
        "        if not self._plans:",
        "tests/test_engine_oracle.py::test_prefill_is_the_masked_run",
    ),
    Mutant(
        "8: ties are broken by whatever the sort does",
        "functional.py",
        '    ranked = score.masked_fill(~candidates, float("-inf")).sort(dim=1, descending=True, stable=True).indices',
        '    ranked = score.masked_fill(~candidates, float("-inf")).flip(1).sort(dim=1, descending=True).indices\n'
        "    ranked = score.shape[1] - 1 - ranked",
        "tests/test_functional.py",
    ),
    Mutant(
        "9: a constant image span instead of the placeholder tokens",
        "engine/layout.py",
        "    vision = input_ids == placeholders[0]",
        "    vision = torch.zeros_like(input_ids, dtype=torch.bool)\n    vision[:, 5:54] = True",
        "tests/test_engine_oracle.py::test_prefill_is_the_masked_run",
    ),
    Mutant(
        "10: the budget is counted after pruning",
        "schedule.py",
        "        return tuple(given for given, _ in self._given_and_kept(vision_tokens))",
        "        return tuple(kept for _, kept in self._given_and_kept(vision_tokens))",
        "tests/test_schedule.py",
    ),
    Mutant(
        "11: the score is a plain mean over text rows",
        "functional.py",
        "    weighted = (prior[..., None] * to_vision).sum(dim=(1, 2))",
        "    weighted = to_vision.mean(dim=(1, 2))",
        "tests/test_functional.py",
    ),
    Mutant(
        "11: the softmax is taken in the model's half precision",
        "functional.py",
        "    logits = torch.matmul(grouped, key.transpose(2, 3)).float().view(batch, heads, rows, columns)",
        "    logits = torch.matmul(grouped, key.transpose(2, 3)).view(batch, heads, rows, columns)",
        "tests/test_engine_cost.py",
    ),
    Mutant(
        "12: the state of a call is a module global",
        "engine/forward.py",
        'ACTIVE: ContextVar[Forward | None] = ContextVar("adaptinfer_forward", default=None)',
        "class _Global:\n"
        "    value = None\n"
        "    def get(self): return self.value\n"
        "    def set(self, value): self.value = value\n"
        "    def reset(self, token): self.value = None\n"
        "ACTIVE = _Global()",
        "tests/test_parallel.py::test_threads_with_prompts_of_their_own",
    ),
    Mutant(
        "12: indices of the second stage are not mapped back to the prompt",
        "engine/choosing.py",
        "            index=relative if segment is None else segment.index.gather(1, relative),",
        "            index=relative,",
        "tests/test_engine_oracle.py::test_prefill_is_the_masked_run",
    ),
    Mutant(
        "the diagonal of S is counted twice",
        "functional.py",
        "    return text_to_text.sum(dim=2) + text_to_text.sum(dim=3) - text_to_text.diagonal(dim1=2, dim2=3)",
        "    return text_to_text.sum(dim=2) + text_to_text.sum(dim=3)",
        "tests/test_functional.py",
    ),
    Mutant(
        "a token's rank depends on the other samples of its batch",
        "engine/layout.py",
        "    index = marked_first(mask, max(counts))",
        "    index = marked_first(mask, max(counts)).sort(dim=1).values",
        "tests/test_methods.py::test_alone_and_in_a_batch",
    ),
    Mutant(
        "early drop attends without the causal mask",
        "engine/attach.py",
        "value, visible(some), **kwargs)",
        "value, None, **kwargs)",
        "tests/test_engine_exact.py::test_early_drop_changes_nothing",
    ),
    Mutant(
        "early drop leaves the MLP at full size",
        "engine/attach.py",
        "                parts += [getattr(layer, name, None) for name in _MLP]",
        "                parts += []",
        "tests/test_engine_exact.py::test_early_drop_spares_the_work",
    ),
    Mutant(
        "fillers of an uneven batch are attended",
        "engine/masks.py",
        "            outside = outside | ~valid.to(mask.device)",
        "            outside = outside | (at < 0)",
        "tests/test_engine_oracle.py",
    ),
    Mutant(
        "detaching forgets the attention modules' own config",
        "engine/attach.py",
        "            attention.config = config\n",
        "            pass\n",
        "tests/test_engine_exact.py::test_detached_is_never_attached",
    ),
    Mutant(
        "keeping all goes through the pruning path",
        "engine/attach.py",
        "            if keeps != left:",
        "            if True:",
        "tests/test_engine_exact.py::test_keeping_all_is_vanilla_bit_for_bit",
    ),
    Mutant(
        "a failed call leaves its state behind",
        "engine/attach.py",
        "                finally:\n                    ACTIVE.reset(token)",
        "                except Exception:\n                    ACTIVE.reset(token)\n                    raise",
        "tests/test_engine_exact.py::test_a_failed_call_leaves_nothing_behind",
    ),
    Mutant(
        "masked vision tokens are counted, and the question is cut instead",
        "engine/layout.py",
        "        vision = vision & real  # a masked image is padding: nothing attends to it",
        "        pass",
        "tests/test_engine_more.py::test_a_masked_part_of_an_image_is_padding",
    ),
    Mutant(
        "the padding of a later turn is read from the wrong end of the mask",
        "engine/masks.py",
        "return mask[:, -length:].bool()",
        "return mask[:, :length].bool()",
        "tests/test_engine_more.py",
    ),
    Mutant(
        "video tokens are no vision tokens",
        "engine/families.py",
        '("image_token_id", "image_token_index", "video_token_id", "video_token_index")',
        '("image_token_id", "image_token_index")',
        "tests/test_engine_more.py::test_video",
    ),
    Mutant(
        "compact positions forget what earlier turns dropped",
        "engine/forward.py",
        "            shift = within if shift is None else within + shift",
        "            shift = within",
        "tests/test_engine_more.py",
    ),
    Mutant(
        "compact positions of later tokens forget what earlier turns dropped",
        "engine/forward.py",
        "shift if before is None or before.shift is None else shift + before.shift.to(shift.device)",
        "shift",
        "tests/test_engine_more.py",
    ),
    Mutant(
        "a reordered batch keeps the old history",
        "engine/cache.py",
        "        super().reorder_cache(beam_idx)\n        self._take(beam_idx)",
        "        super().reorder_cache(beam_idx)",
        "tests/test_engine_more.py::test_reordering_moves_the_history",
    ),
    Mutant(
        "another model's layers are taken for this one's",
        "engine/attach.py",
        " or forward.owner is not module.config.adaptinfer_owner:",
        ":",
        "tests/test_engine_more.py::test_another_attached_model_inside_a_forward",
    ),
    Mutant(
        "the pruning layer attends for the dropped rows too",
        "engine/attach.py",
        "    if rows is None or 2 * rows.shape[1] > entered or",
        "    if True or",
        "tests/test_engine_exact.py::test_early_drop_spares_the_work",
    ),
    Mutant(
        "padding is reported as text",
        "engine/attach.py",
        "            text_tokens=tuple(map(operator.sub, layout.real_counts, vision)),",
        "            text_tokens=tuple(forward.length - v for v in vision),",
        "tests/test_engine_more.py::test_report_counts_a_samples_own_tokens",
    ),
    Mutant(
        "a layer reads the device",
        "engine/choosing.py",
        "        self._counts = self.keeps[layer] = keeps\n",
        "        self._counts = self.keeps[layer] = keeps\n        kept_vision.sum().item()\n",
        "tests/test_engine_cost.py::test_no_layer_reads_the_device",
    ),
    Mutant(
        "the mask is rebuilt in every layer",
        "engine/forward.py",
        "        if key not in self._memo:",
        "        if True:",
        "tests/test_engine_cost.py::test_masks_and_embeddings_are_made_once_per_stage",
    ),
    Mutant(
        "scores are computed for every row of the prompt",
        "pruners/views.py",
        "        query = gather_tokens(self.query, rows, dim=2)\n",
        "        full = attention_rows(self.query, self.key, self.scaling)\n"
        "        query = gather_tokens(self.query, rows, dim=2) + 0 * full.mean()\n",
        "tests/test_engine_cost.py::test_no_buffer_grows_with_the_square_of_the_prompt",
    ),
    Mutant(
        "trap 4: DeepStack's features go to the tokens that stand where theirs stood",
        "engine/attach.py",
        "            return hidden + forward.spread(features)",
        "            return hidden + features[:, : hidden.shape[1]]",
        "tests/test_families.py",
    ),
    Mutant(
        "trap 5: Gemma 4's shared layers are taken to have keys of their own",
        "engine/families.py",
        "        return self.sources.get(layer, layer)",
        "        return layer",
        "tests/test_families.py",
    ),
    Mutant(
        "trap 5: further inputs per token are not cut",
        "engine/families.py",
        '_TOKEN_INPUTS = ("per_layer_input", "moe_mm_token_type_ids")',
        '_TOKEN_INPUTS = ("moe_mm_token_type_ids",)',
        "tests/test_families.py",
    ),
    Mutant(
        "trap 6: layers that read position ids get those of other tokens",
        "engine/forward.py",
        "                numbers = gather_tokens(numbers, index, dim=numbers.ndim - 1, batch_dim=numbers.ndim - 2)",
        "                numbers = numbers[..., : index.shape[1]]",
        "tests/test_families.py",
    ),
    Mutant(
        "trap 8: a sliding window counts the tokens held",
        "engine/cache.py",
        "        self.cumulative_length += history.dropped - self.dropped",
        "        self.cumulative_length += 0",
        "tests/test_families.py",
    ),
    Mutant(
        "trap 6: FlashAttention takes the survivors' gaps for packed sequences",
        "engine/attach.py",
        '        kwargs.pop("position_ids", None)',
        '        kwargs.get("position_ids", None)',
        "tests/test_decoding.py",
    ),
    Mutant(
        "trap 10: guesses of assisted decoding guide",
        "engine/layout.py",
        "        text = text & (positions < prompt)",
        "        text = text & (positions < length)",
        "tests/test_decoding.py",
    ),
    Mutant(
        "a static cache is given as much room as without pruning",
        "engine/cache.py",
        "            self.capacity = self.total - history.dropped",
        "            self.capacity = self.total",
        "tests/test_decoding.py",
    ),
    Mutant(
        "soft-capped logits are scored bare",
        "functional.py",
        "        logits = (logits / softcap).tanh() * softcap",
        "        logits = logits * 1.0",
        "tests/test_families.py",
    ),
    Mutant(
        "fillers stand among the tokens of a recurrent layer",
        "functional.py",
        "    return order[:, mask.shape[1] - count :]",
        "    return order[:, mask.shape[1] - count :].sort(dim=1).values",
        "tests/test_families.py",
    ),
    Mutant(
        "a compiled step reads the mask of the whole prompt",
        "engine/attach.py",
        "            changed = self._decoding_inputs(layer, hidden, named)",
        "            changed = {}",
        "tests/test_compile.py",
    ),
    Mutant(
        "trap 1: ranks of tensor parallelism score by their own heads",
        "engine/parallel.py",
        "    dist.all_reduce(tensor, group=group)",
        "    dist.barrier(group=group)",
        "tests/test_parallel.py::test_ranks_choose_what_one_process_chooses",
    ),
    Mutant(
        "trap 1: the mean over heads is one over this rank's heads",
        "engine/choosing.py",
        "            all_heads=self._family.heads,",
        "            all_heads=query.shape[1],",
        "tests/test_parallel.py::test_ranks_choose_what_one_process_chooses",
    ),
    Mutant(
        "trap 13: a stage on another device goes by tensors of the stage before",
        "engine/choosing.py",
        "            segment = self.segment.to(device)",
        "            segment = self.segment",
        "tests/test_parallel.py::test_layers_on_several_devices",
    ),
    Mutant(
        "trap 13: positions of new tokens meet columns of another device",
        "engine/masks.py",
        "        positions = positions.to(columns.device)",
        "        positions = positions.to(positions.device)",
        "tests/test_parallel.py::test_layers_on_several_devices",
    ),
    Mutant(
        "methods: the last token's attention is a mean over the question",
        "pruners/views.py",
        "        return self.total(self.to_vision(self.attention(self.last_text)).sum(dim=1)[:, 0]) / self.all_heads",
        "        return self.total(self.to_vision(self.text_attention).sum(dim=(1, 2))) / self.all_heads",
        "tests/test_methods_inside.py::test_it_keeps_what_its_formula_says",
    ),
    Mutant(
        "methods: the last token of a short question is its padding",
        "pruners/views.py",
        "        return self.text_index.gather(1, (self.text_mask.sum(dim=1, keepdim=True) - 1).clamp(min=0))",
        "        return self.text_index[:, -1:]",
        "tests/test_methods_inside.py::test_it_keeps_what_its_formula_says",
    ),
    Mutant(
        "methods: PyramidDrop scores by its own layer",
        "pruners/pyramiddrop.py",
        '        return frozenset({"next"})',
        '        return frozenset({"output"})',
        "tests/test_methods_inside.py::test_it_keeps_what_its_formula_says",
    ),
    Mutant(
        "methods: a layer asked for its keys caches them",
        "engine/forward.py",
        "        without_cache = {name: None for name, value in given.items() if value is cache and cache is not None}",
        "        without_cache = {}",
        "tests/test_methods_inside.py::test_asking_the_next_layer_leaves_no_trace",
    ),
    Mutant(
        "methods: a stage behind its layer reports an early drop",
        "engine/attach.py",
        "        self.early_drop = early_drop and not pruner.acts_behind",
        "        self.early_drop = early_drop",
        "tests/test_methods_inside.py::test_asking_the_next_layer_leaves_no_trace",
    ),
    Mutant(
        "methods: a stage behind its layer is given the layer's input",
        "engine/forward.py",
        "        selection = self._select(dataclasses.replace(view, output=hidden.to(view.query.device)))",
        "        selection = self._select(dataclasses.replace(view, output=view.hidden))",
        "tests/test_methods_inside.py::test_it_keeps_what_its_formula_says",
    ),
    Mutant(
        "methods: DART keeps what is most like its pivots",
        "pruners/dart.py",
        "            kept = kept | top_k_mask(-likeness, left & ~kept, share)",
        "            kept = kept | top_k_mask(likeness, left & ~kept, share)",
        "tests/test_methods_inside.py::test_it_keeps_what_its_formula_says",
    ),
    Mutant(
        "methods: DART's rest goes to its late pivots",
        "pruners/dart.py",
        "        shares = (rest // count + (there.cumsum(dim=1) <= rest % count)) * there",
        "        shares = (rest // count + (there.cumsum(dim=1) > count - rest % count)) * there",
        "tests/test_methods_inside.py::test_it_keeps_what_its_formula_says",
    ),
    Mutant(
        "methods: FEATHER scores with rotary embedding",
        "pruners/feather.py",
        "        plain = view.without_rotary",
        "        plain = view",
        "tests/test_methods_inside.py::test_it_keeps_what_its_formula_says",
    ),
    Mutant(
        "methods: FEATHER samples at every stage",
        "pruners/feather.py",
        "        if view.first:  # no score exceeds 1",
        "        if True:",
        "tests/test_methods_inside.py::test_it_keeps_what_its_formula_says",
    ),
    Mutant(
        "methods: FEATHER's sample is a diagonal pattern",
        "pruners/feather.py",
        "        return (place // width % down == 0) & (place % width % across == 0)",
        "        return place % (down * across) == 0",
        "tests/test_methods_inside.py::test_it_keeps_what_its_formula_says",
    ),
    Mutant(
        "methods: a factor on the angles stays in undone keys",
        "engine/rotary.py",
        "        return self.apply(tensor.float(), cos, -sin) / self.apply(self.apply(ones, cos, sin), cos, -sin)",
        "        return self.apply(tensor.float(), cos, -sin)",
        "tests/test_methods_inside.py::test_a_factor_on_the_angles_comes_off_as_well",
    ),
    Mutant(
        "methods: all words rate",
        "pruners/sparsevlm.py",
        "    return torch.where(raters.any(dim=1, keepdim=True), raters, words)",
        "    return words",
        "tests/test_methods_inside.py::test_it_keeps_what_its_formula_says",
    ),
    Mutant(
        "methods: raters read hidden states of the layer",
        "engine/choosing.py",
        "        return PromptView(embeddings.to(device), *text, *vision)",
        "        return PromptView(self._entered[0].to(device), *text, *vision)",
        "tests/test_methods_inside.py::test_it_keeps_what_its_formula_says",
    ),
    Mutant(
        "methods: position stays in SparseVLM+'s attention",
        "pruners/sparsevlm.py",
        "        position = _of_position(view)",
        "        position = 1.0",
        "tests/test_methods_inside.py::test_it_keeps_what_its_formula_says",
    ),
    Mutant(
        "methods: SparseVLM+ takes all heads",
        "pruners/sparsevlm.py",
        "        count = max(1, math.floor(self.heads * view.all_heads + 0.5))",
        "        count = view.all_heads",
        "tests/test_methods_inside.py::test_it_keeps_what_its_formula_says",
    ),
    Mutant(
        "methods: merged tokens are not counted in the keep",
        "pruners/sparsevlm.py",
        "        best = bisect.bisect_left(range(entering + 1), keep, key=lambda best: best + merges(best)[1])",
        "        best = keep",
        "tests/test_methods_inside.py::test_published_keeps_are_split_as_published",
    ),
    Mutant(
        "methods: survivors go on without what was merged into them",
        "engine/forward.py",
        "        return hidden.scatter(1, index, selection.hidden.to(hidden))",
        "        return hidden",
        "tests/test_methods_inside.py::test_survivors_carry_the_recycled_ones",
    ),
    Mutant(
        "methods: fillers of a short sample overwrite its tokens",
        "pruners/sparsevlm.py",
        "        centres = places.gather(1, centres).masked_fill(~real, tokens)",
        "        centres = places.gather(1, centres)",
        "tests/test_methods.py::test_a_sample_that_keeps_all_beside_one_that_does_not",
    ),
    Mutant(
        "methods: tokens that hardly change stay",
        "pruners/v2drop.py",
        "        return change.norm(dim=-1)",
        "        return -change.norm(dim=-1)",
        "tests/test_methods_inside.py::test_it_keeps_what_its_formula_says",
    ),
    Mutant(
        "methods: FitPrune takes the mean over heads",
        "pruners/fitprune.py",
        "            largest = view.to_vision(attention).amax(dim=1)",
        "            largest = view.to_vision(attention).mean(dim=1)",
        "tests/test_methods_inside.py::test_it_keeps_what_its_formula_says",
    ),
    Mutant(
        "TextGuided: padding words put vision tokens forward",
        "pruners/textguided.py",
        "        rank = rank.masked_fill(~words[:, :, None], count)",
        "        rank = rank + 0",
        "tests/test_textguided.py::test_in_turn_is_the_loop",
    ),
    Mutant(
        "TextGuided: within a round the earlier token comes first, whatever its vote",
        "pruners/textguided.py",
        "    line = votes.amax(dim=1).sort(dim=1, descending=True, stable=True).indices",
        "    line = votes.amax(dim=1).mul(0).sort(dim=1, descending=True, stable=True).indices",
        "tests/test_textguided.py::test_in_turn_worked_by_hand",
    ),
    Mutant(
        "TextGuided: the union is ranked by the sum of ranks",
        "pruners/textguided.py",
        "    called = rank.amin(dim=1)",
        "    called = rank.sum(dim=1)",
        "tests/test_textguided.py::test_in_turn_worked_by_hand",
    ),
    Mutant(
        "TextGuided: heads are chosen without regard to fillers",
        "pruners/textguided.py",
        "    return attention if view.vision_mask is None else attention * view.vision_mask[:, None, None, :]",
        "    return attention",
        "tests/test_textguided.py::test_fillers_weigh_nothing",
    ),
    Mutant(
        "TextGuided: heads are those that look least at the picture",
        "pruners/textguided.py",
        "        mass = torch.cat([some.sum(dim=(2, 3)) for some in votes], dim=1)",
        "        mass = -torch.cat([some.sum(dim=(2, 3)) for some in votes], dim=1)",
        "tests/test_textguided.py::test_it_keeps_what_its_formula_says",
    ),
    Mutant(
        "TextGuided: a few heads at a time, all count by the first ones' choice",
        "pruners/textguided.py",
        "            start = stop",
        "            start = 0",
        "tests/test_textguided.py::test_more_shared_properties",
    ),
    Mutant(
        "TextGuided: heads are normalised over the batch",
        "pruners/textguided.py",
        "            mass = attention.sum(dim=(2, 3), keepdim=True)",
        "            mass = attention.sum(dim=(0, 2, 3), keepdim=True)",
        "tests/test_textguided.py::test_it_keeps_what_its_formula_says",
    ),
    Mutant(
        "TextGuided: votes without position are taken with it",
        "pruners/textguided.py",
        "        seen = view if self.rotary else view.without_rotary",
        "        seen = view",
        "tests/test_textguided.py::test_it_keeps_what_its_formula_says",
    ),
    Mutant(
        "TextGuided: coverage forgets what it has added",
        "pruners/textguided.py",
        "        likeness = torch.maximum(likeness, (points @ new.transpose(1, 2))[..., 0])",
        "        likeness = likeness + 0",
        "tests/test_textguided.py::test_farthest_worked_by_hand",
    ),
    Mutant(
        "TextGuided: coverage forgets what votes have kept",
        "pruners/textguided.py",
        '        nearest.append(similar.masked_fill(~kept[:, None, :], float("-inf")).amax(dim=2))',
        "        nearest.append(similar.amax(dim=2))",
        "tests/test_textguided.py::test_farthest_worked_by_hand",
    ),
    Mutant(
        "TextGuided: the even cover counts what votes took",
        "pruners/textguided.py",
        "            place = (left.cumsum(dim=1) - 1).clamp(min=0, max=even.shape[1] - 1)",
        "            place = torch.arange(left.shape[1]).expand_as(left).clamp(max=even.shape[1] - 1)",
        "tests/test_textguided.py::test_coverage_is_what_its_formula_says",
    ),
    Mutant(
        "varying counts: a later stage counts on tokens that an earlier one dropped",
        "engine/choosing.py",
        "        planned = tuple(map(min, self.stages[view.layer], self._counts))",
        "        planned = self.stages[view.layer]",
        "tests/test_textguided.py::test_each_sample_keeps_what_holds_the_mass",
    ),
    Mutant(
        "varying counts: the report tells the plan",
        "engine/attach.py",
        "        if not self.pruner.varies:",
        "        if True:",
        "tests/test_textguided.py::test_each_sample_keeps_what_holds_the_mass",
    ),
    Mutant(
        "varying counts: fillers hold mass",
        "pruners/textguided.py",
        "            needed = holding(score.masked_fill(~candidates, 0.0), self.mass)",
        "            needed = holding(score + 0.01, self.mass)",
        "tests/test_textguided.py::test_each_sample_keeps_what_holds_the_mass",
    ),
    Mutant(
        "varying counts: a static cache is filled with the wrong counts",
        "engine/guards.py",
        "    if pruner.varies and any(isinstance(layer, StaticLayer) for layer in cache.layers):",
        "    if False:",
        "tests/test_textguided.py::test_varying_counts_are_refused_where_they_must_be_known",
    ),
    Mutant(
        "varying counts: one sample's count for all",
        "pruners/textguided.py",
        "            keeps = tuple(map(min, keeps, needed))",
        "            keeps = (min(keeps[0], needed[0]),) * len(keeps)",
        "tests/test_textguided.py::test_each_sample_keeps_what_holds_the_mass",
    ),
    Mutant(
        "TextGuided: vLLM is not told that queries and keys before rotation are needed",
        "pruners/textguided.py",
        'return frozenset() if self.rotary else frozenset({"rotary"})',
        "return frozenset()",
        "tests/test_textguided.py::test_vllm_serves_what_queries_and_keys_decide",
    ),
    Mutant(
        "methods: FastV's mean counts padding rows",
        "pruners/fastv.py",
        "            received += (view.to_vision(attention) * real[:, None, some, None]).sum(dim=(1, 2))",
        "            received += view.to_vision(attention).sum(dim=(1, 2))",
        "tests/test_methods_inside.py::test_it_keeps_what_its_formula_says",
    ),
    Mutant(
        "calibration: a stage chooses among tokens that the stage before dropped",
        "calibration/objective.py",
        "        rank = np.where(alive, ranks, alive.shape[1])",
        "        rank = ranks",
        "tests/test_calibration_optimise.py::test_kept_mass_follows_every_token",
    ),
    Mutant(
        "calibration: one stage does not spend the budget",
        "calibration/optimise.py",
        "_filled(mass, cost, budget, (layer,), (0,), 0)",
        "_filled(mass, cost, budget - budget // 20, (layer,), (0,), 0)",
        "tests/test_calibration_optimise.py::test_one_stage_is_brute_force_over_every_keep",
    ),
    Mutant(
        "calibration: readings of other pictures are gone on with",
        "calibration/store.py",
        'if mark is not None and mark != row.get("mark"):',
        "if False:",
        "tests/test_calibration.py::test_other_pixels_in_a_list_are_refused",
    ),
    Mutant(
        "calibration: the programme forgets what the pruning layer itself costs on its way back",
        "calibration/optimise.py",
        "            spent -= self._units(before, k)\n",
        "",
        "tests/test_calibration_optimise.py::test_the_programme_is_brute_force",
    ),
    Mutant(
        "calibration: the first of equal gains is taken, not the last as in ruptures",
        "calibration/detect.py",
        "    return depth - 2 - np.argmax(gain[..., ::-1], axis=-1) - 1",
        "    return np.argmax(gain, axis=-1) + 1",
        "tests/test_calibration_detect.py::test_attention_in_layer_0_is_invisible",
    ),
    Mutant(
        "calibration: a shift before layer 1 is not looked for",
        "calibration/shifts.py",
        "            if start:\n",
        "            if True:\n",
        "tests/test_calibration_detect.py::test_planted_shifts_are_found_layer_0_included",
    ),
    Mutant(
        "calibration: a part of fewer samples passes for one of more",
        "calibration/store.py",
        '(header.get("about"), header.get("stop")) == (self._digest, part.stop)',
        'header.get("about") == self._digest',
        "tests/test_calibration.py::test_a_damaged_part_and_one_of_fewer_samples_are_read_again",
    ),
    Mutant(
        "calibration: attention is summed over text rows, so long questions weigh more",
        "calibration/record.py",
        "(view.all_heads * view.text_index.shape[1])",
        "view.all_heads",
        "tests/test_calibration.py::test_a_reading_is_what_the_models_own_attention_says",
    ),
    Mutant(
        "calibration: evaluation scenes shape a schedule",
        "calibration/scenes.py",
        '        if split != "train":',
        "        if False:",
        "tests/test_calibration.py::test_evaluation_scenes_are_refused",
    ),
    Mutant(
        "eval: samples are resampled, and not the pictures that they share",
        "evaluation/statistics.py",
        "means.append((drawn @ sums) / (drawn @ counts))",
        "means.append((drawn @ sums) / counts.sum(axis=0) / 2 + self.values / 2)",
        "tests/test_evaluation.py",
    ),
    Mutant(
        "eval: differences are not paired",
        "evaluation/statistics.py",
        "low, high = _bounds(self.means[:, column] - self.means[:, other])",
        "low, high = _bounds(self.means[:, column] - self.means[::-1, other])",
        "tests/test_evaluation.py",
    ),
    Mutant(
        "eval: four pictures are enough to be better",
        "evaluation/statistics.py",
        "LEAST_GROUPS = 6",
        "LEAST_GROUPS = 4",
        "tests/test_evaluation.py",
    ),
    Mutant(
        "eval: every seed counts as an answer of its own",
        "evaluation/summary.py",
        "counts[row, column] += 1 / seeds",
        "counts[row, column] += 1",
        "tests/test_evaluation.py",
    ),
    Mutant(
        "eval: right to wrong and wrong to right are exchanged",
        "evaluation/summary.py",
        'share(ours["score"] < RIGHT <= theirs["score"] for ours, theirs in pairs)',
        'share(theirs["score"] < RIGHT <= ours["score"] for ours, theirs in pairs)',
        "tests/test_evaluation.py",
    ),
    Mutant(
        "eval: half a block counts as done",
        "evaluation/journal.py",
        '            if entry["left"] == 0:',
        '            if entry["left"] >= 0:',
        "tests/test_evaluation.py",
    ),
    Mutant(
        "eval: what a kill left is not cut off",
        "evaluation/journal.py",
        "        if end < path.stat().st_size:",
        "        if end > path.stat().st_size:",
        "tests/test_evaluation.py",
    ),
    Mutant(
        "eval: a full disk leaves half a block",
        "evaluation/journal.py",
        "                    file.truncate(end)",
        "                    pass",
        "tests/test_evaluation.py",
    ),
    Mutant(
        "eval: evidence is lost at the second stage",
        "evaluation/controls.py",
        "        return ranking.gather(1, alive)",
        "        return ranking[:, : alive.shape[1]]",
        "tests/test_evaluation.py",
    ),
    Mutant(
        "eval: in a batch of several shapes evidence is that of other rows",
        "evaluation/controls.py",
        "ranking if view.rows is None else ranking.index_select(0, view.rows)",
        "ranking[: len(view.features)]",
        "tests/test_evaluation.py::test_evidence_is_kept_before_the_model_too",
    ),
    Mutant(
        "eval: a resized picture is read with all of its tokens",
        "evaluation/runner.py",
        "            return self._batch(samples, pictures, resize), resize",
        "            return self._batch(samples, pictures), resize",
        "tests/test_evaluation_run.py::test_a_resized_picture_costs_what_it_shows",
    ),
    Mutant(
        "eval: a late process shares out what faster ones have left, and not what all saw",
        "cli/eval.py",
        "    todo = ranks.share(units(plan, done))",
        "    todo = ranks.share(units(plan, journal.done()))",
        "tests/test_evaluation_run.py::test_a_late_process_takes_its_own_share",
    ),
    Mutant(
        "eval: a report of a run with holes",
        "evaluation/scale.py",
        "            if missing:",
        "            if False:",
        "tests/test_evaluation_run.py::test_no_report_of_a_run_with_missing_answers",
    ),
    Mutant(
        "eval: answers about a picture that was replaced are kept",
        "evaluation/jsonl.py",
        'return f"{self._digest}/{self.metric}/{self._pictures_digest}"',
        'return f"{self._digest}/{self.metric}"',
        "tests/test_evaluation.py::test_another_picture_of_the_same_name_is_another_task",
    ),
    Mutant(
        "lmms-eval: settings beside a preset or a saved pruner are dropped without a word",
        "evaluation/lmms.py",
        '    if given in (["preset"], ["pruner"]) and settings:',
        "    if False:",
        "tests/test_evaluation_run.py::test_lmms_eval_arguments_that_make_no_sense",
    ),
    Mutant(
        "eval: an agreeing annotator counts for himself",
        "evaluation/metrics.py",
        "min(1.0, (agreeing - (other == said)) / 3)",
        "min(1.0, agreeing / 3)",
        "tests/test_evaluation.py",
    ),
    Mutant(
        "eval: all batches of a random method keep the same tokens",
        "evaluation/conditions.py",
        '            changes["seed"] = _SEED_STRIDE * seed + batch',
        '            changes["seed"] = _SEED_STRIDE * seed',
        "tests/test_evaluation.py",
    ),
    Mutant(
        "before the model: a batch's second row gets the first row's features",
        "engine/selection.py",
        "        index = (index if rows is None else index.index_select(0, rows)).gather(1, positions)",
        "        index = (index if rows is None else index[: len(rows)]).gather(1, positions)",
        "tests/test_engine_before.py::test_keeps_exactly_the_budget_in_order_alone_and_in_a_batch",
    ),
    Mutant(
        "before the model: repeated rows are taken for new pictures",
        "engine/selection.py",
        "        return index.repeat_interleave(self._repeats, dim=0)",
        "        return index.repeat(self._repeats, 1)",
        "tests/test_engine_before.py::test_ways_to_generate",
    ),
    Mutant(
        "before the model: merged features never reach layer 0",
        "engine/selection.py",
        "                hidden = merged if at is None else hidden.index_copy(0, at, merged)",
        "                hidden = merged if at is None else hidden",
        "tests/test_engine_before.py::test_pruned_is_the_masked_run",
    ),
    Mutant(
        "before the model: the class token is counted among the patches",
        "engine/tower.py",
        "            pieces = [piece[:, before:] for piece in pieces]",
        "            pieces = [piece[:, :-before] for piece in pieces]",
        "tests/test_engine_before.py::test_vision_tokens_are_traced_to_their_tower_tokens",
    ),
    Mutant(
        "before the model: Qwen2.5-VL's windows are forgotten",
        "engine/tower.py",
        "            place = torch.arange(count) if order is None else torch.argsort(order.cpu())",
        "            place = torch.arange(count)",
        "tests/test_engine_before.py::test_vision_tokens_are_traced_to_their_tower_tokens",
    ),
    Mutant(
        "before the model: patches are merged along rows only",
        "engine/tower.py",
        "            inner = torch.arange(merge)[:, None] * width + torch.arange(merge)",
        "            inner = torch.arange(merge**2)",
        "tests/test_engine_before.py::test_vision_tokens_are_traced_to_their_tower_tokens",
    ),
    Mutant(
        "before the model: a composition's budget is that of what enters",
        "pruners/before.py",
        "            within = budget_within(budget, vision_tokens, entering)",
        "            within = budget * entering if budget < 1 else budget",
        "tests/test_engine_before.py::test_a_composition_by_hand",
    ),
    Mutant(
        "before the model: layer 0 is told of all tokens",
        "schedule.py",
        "        given, per_layer = kept_at.get(BEFORE, self._prompt_tokens(vision_tokens)), []",
        "        given, per_layer = self._prompt_tokens(vision_tokens), []",
        "tests/test_engine_before.py::test_meets_a_true_average",
    ),
    Mutant(
        "before the model: a token is its own nearest neighbour",
        "pruners/divprune.py",
        '        similar.scatter_(2, own.expand(batch, -1)[..., None], float("-inf"))\n',
        "",
        "tests/test_methods_before.py::test_divprune_picks_the_furthest_of_the_nearest",
    ),
    Mutant(
        "before the model: the determinant forgets what was picked",
        "pruners/cdpruner.py",
        "        factor[:, :, step] = row\n",
        "",
        "tests/test_methods_before.py::test_cdpruner_maximises_the_determinant_step_by_step",
    ),
    Mutant(
        "published code: VisPruner pairs tokens in the picture's order",
        "pruners/vispruner.py",
        "        picked, rest = order[:, :important], order[:, important:]",
        "        picked, rest = order[:, :important], order[:, important:].sort(dim=1).values",
        "tests/test_methods_before.py::test_vispruner_pairs_by_falling_attention",
    ),
    Mutant(
        "published code: VisPruner compares projected features",
        "pruners/vispruner.py",
        "unit(view.unprojected()[0])",
        "unit(view.features)",
        "tests/test_methods_before.py::test_vispruner_compares_what_enters_the_projector",
    ),
    Mutant(
        "published code: PruMerge leaves out the token for the rest",
        "pruners/prumerge.py",
        "        picks = max(1, view.keep - 1)",
        "        picks = view.keep",
        "tests/test_methods_before.py::test_prumerge_by_hand",
    ),
    Mutant(
        "published code: PruMerge's attention is the mean over heads",
        "engine/tower.py",
        "self._received(*_joined(query, key, scaling), mask)",
        "self._received(query, key, scaling, mask).mean(dim=1, keepdim=True)",
        "tests/test_engine_before.py::test_heads_joined_into_one",
    ),
    Mutant(
        "ours: the prior in place of the largest vote",
        "pruners/adaptinferplus.py",
        'TextGuided(budget=1, words="max")',
        "TextGuided(budget=1)",
        "tests/test_engine_before.py::test_ours_is_cdpruner_and_then_the_largest_vote_of_any_word",
    ),
    Mutant(
        "ours: the stages are AdaptInfer's",
        "pruners/adaptinferplus.py",
        "possible=scoring, like=_STAGES)",
        "possible=scoring)",
        "tests/test_engine_before.py::test_stages_of_ours_by_hand",
    ),
    Mutant(
        "published code: VScan looks at the stage's own layer",
        "pruners/vscan.py",
        "from adaptinfer.pruners.pyramiddrop import PyramidDrop",
        "from adaptinfer.pruners.fastv import FastV as PyramidDrop",
        "tests/test_engine_before.py::test_vscan_is_its_scans_and_pyramiddrops_stage",
    ),
    Mutant(
        "published code: line ends of crops join VScan's tokens",
        "pruners/vscan.py",
        "        joins = nearest(features.masked_fill(line_ends, 0), centres, kept).float()",
        "        joins = nearest(features, centres, kept).float()",
        "tests/test_methods_before.py::test_vscan_scans_windows_and_the_whole",
    ),
    Mutant(
        "published code: HiRED divides by attention, not by counts",
        "pruners/hired.py",
        "strong[:, None, :]",
        "early[:, None, :]",
        "tests/test_methods_before.py::test_hired_divides_a_budget_over_crops",
    ),
    Mutant(
        "published code: ToMe leaves tokens in the picture's order",
        "engine/merging.py",
        "    order = torch.cat([active[:, first::2], active[:, 1 - first :: 2]], dim=1)",
        "    order = active",
        "tests/test_tome.py",
    ),
    Mutant(
        "published code: ToMe forgets that the class token has a place",
        "engine/merging.py",
        "keys, group, active, count, first)",
        "keys, group, active, count)",
        "tests/test_tome.py",
    ),
    Mutant(
        "published code: DART compares hidden states as they are",
        "pruners/dart.py",
        "view.final_norm(view.output).to(view.output.device)",
        "view.output",
        "tests/test_methods_inside.py::test_dart_compares_behind_the_last_norm",
    ),
    Mutant(
        "published code: SparseVLM merges 30 % and not one more",
        "pruners/sparsevlm.py",
        "        merged = math.floor(Fraction(repr(self.recycled)) * (entering - best)) + 1",
        "        merged = math.floor(Fraction(repr(self.recycled)) * (entering - best))",
        "tests/test_methods_inside.py::test_one_more_than_the_share_is_merged",
    ),
    Mutant(
        "published code: papers keep original positions before the model",
        "pruners/before.py",
        '    published_positions = "compact"\n',
        "",
        "tests/test_engine_before.py::test_papers_drop_tokens_before_they_number_them",
    ),
]


def outcome(source: Path, tests: str) -> str:
    """``green``, ``red``, or why pytest judged nothing: a test that does not exist must not count as red."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-W", "ignore", "-p", "no:cacheprovider"]
    command += ["-m", "not full and not slow and not gpu", tests]
    path = os.pathsep.join([str(source), str(ROOT / "tests")])
    run = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    if run.returncode == 0:
        return "green"
    failed = run.returncode == 1 and "FAILED tests/" in run.stdout
    return "red" if failed else f"no verdict (pytest ended with {run.returncode}): {(run.stdout + run.stderr)[-300:]}"


def broken(mutant: Mutant) -> str:
    """What the tests say of a copy with the mutant in it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "src"
        shutil.copytree(ROOT / "src", copy, ignore=shutil.ignore_patterns("__pycache__", "checkpoint"))
        checkpoint = Path("adaptinfer/embedded/checkpoint")
        (copy / checkpoint).symlink_to(ROOT / "src" / checkpoint)
        file = copy / "adaptinfer" / mutant.file
        text = file.read_text(encoding="utf-8")
        if text.count(mutant.line) != 1:
            return f"no verdict: the line to break is not in {mutant.file} exactly once"
        file.write_text(text.replace(mutant.line, mutant.broken), encoding="utf-8")
        return outcome(copy, mutant.tests)


def main() -> int:
    wanted = sys.argv[1:]
    chosen = [mutant for mutant in MUTANTS if not wanted or any(word in mutant.bug for word in wanted)]
    sound = {tests: outcome(ROOT / "src", tests) for tests in dict.fromkeys(mutant.tests for mutant in chosen)}
    bad = [f"{verdict}  {tests}, with nothing broken" for tests, verdict in sound.items() if verdict != "green"]
    for mutant in chosen:
        verdict = broken(mutant)
        print(f"{'SURVIVED' if verdict == 'green' else verdict:9} {mutant.bug}", flush=True)
        if verdict != "red":
            bad.append(mutant.bug)
    print(f"{len(chosen)} ways to break the code, {len(bad)} not noticed" + "".join(f"\n  {line}" for line in bad))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
