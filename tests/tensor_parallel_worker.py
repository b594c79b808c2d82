"""One rank of the tensor-parallel run of test_parallel.py: `python tensor_parallel_worker.py FOLDER RANK RANKS [all]`.

Loads the same tiny checkpoints twice, split by transformers over all ranks and whole, runs both through the same cells
(the quick ones, or all) and writes down what each gave.
"""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"

import tiny
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers.cache_utils import StaticLayer
from transformers.distributed import DistributedConfig

from adaptinfer import AdaptInfer, Schedule, Stage, UnsupportedError, attach, disabled
from adaptinfer.engine import parallel
from adaptinfer.pruners import METHODS, Random, TextGuided

STAGES = Schedule((Stage(1, 20), Stage(3, 6)), tiny.LAYERS)
GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "eos_token_id": None}
METHODS_THAT_SPLIT = ("pyramiddrop", "dart", "feather", "fastv", "sparsevlm", "v2drop")  # others are refused
GREEDY["suppress_tokens"] = [tiny.IMAGE, tiny.VIDEO]


def loaded(kind, path: Path, attention: str, **sizes):
    """A checkpoint, whole or split over the ranks, in whichever way this transformers takes the wish."""
    how = {}
    if sizes:
        new = "tp_size" in DistributedConfig.__dataclass_fields__
        how = {"distributed_config": DistributedConfig(**sizes)} if new else {"tp_plan": "auto"}
    return kind.from_pretrained(path, dtype=torch.float32, attn_implementation=attention, **how).eval()


def by_torch(model, ranks: int):
    """A whole model split by torch's own tensor parallelism, of which transformers knows nothing."""
    mesh = init_device_mesh("cpu", (ranks,))
    names = {name: ColwiseParallel() for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")}
    names |= {"mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel()}
    names |= {"self_attn.o_proj": RowwiseParallel(), "mlp.down_proj": RowwiseParallel()}
    for layer in model.get_decoder().layers:
        parallelize_module(layer, mesh, names)
    return model


def outcome(model, attach_to, pruner, inputs, **options):
    """What a pruned model does with a prompt."""
    with attach(attach_to, pruner, early_drop=options.pop("early_drop", True)) as handle:
        with torch.no_grad():
            logits = model(**inputs).logits
        report = handle.report
        with disabled(attach_to), torch.no_grad():
            unpruned = model(**inputs).logits
        return {
            "logits": logits,
            "unpruned": unpruned,
            "kept": [[row.tolist() for row in stage] for stage in report.kept],
            "scores": [[row.tolist() for row in stage] for stage in report.scores],
            "tokens": model.generate(**inputs, **GREEDY, **options).tolist(),
        }


def cells(family: str):
    """Name, pruner, prompts and options; the quick ones first."""
    one = tiny.batch(family, [tiny.simple(family, seed=4)])
    padded = tiny.batch(family, [tiny.simple(family, after=5, seed=1), tiny.simple(family, after=13, seed=2)])
    shares = Schedule((Stage(1, 0.4), Stage(2, 0.5)), tiny.LAYERS)
    uneven = tiny.batch(family, [tiny.simple(family, seed=5, images=2), tiny.simple(family, after=6, seed=6)])
    yield "padded", AdaptInfer(schedule=STAGES), padded, {}
    yield "half prior", AdaptInfer(schedule=STAGES, prior_weight=0.5), one, {}
    yield "random", Random(schedule=STAGES, seed=3), padded, {}
    yield "one", AdaptInfer(schedule=STAGES), one, {}
    yield "uneven", AdaptInfer(schedule=shares), uneven, {}
    yield "late drop", AdaptInfer(schedule=STAGES), padded, {"early_drop": False}
    yield "no prior, padded", AdaptInfer(schedule=STAGES, prior_weight=0.0), padded, {}
    yield "beams", AdaptInfer(schedule=STAGES), padded, {"num_beams": 2}
    union = TextGuided(schedule=shares, words="union", normalised=True, rotary=False, coverage=0.3)
    yield "union of words, coverage", union, padded, {}
    yield "counts that vary", TextGuided(schedule=shares, words="max", mass=0.3), padded, {}
    for name in METHODS_THAT_SPLIT:
        yield name, METHODS[name](schedule=shares), padded, {}
    if "cumulative_length" in getattr(StaticLayer, "__annotations__", {}):  # transformers 5.5
        yield "static", AdaptInfer(schedule=STAGES), padded, {"cache_implementation": "static"}


def compare(family: str, attention: str, path: Path, kind, ranks: int, quick: bool):
    """Every cell on a split and on a whole model."""
    split = loaded(kind, path, attention, tp_size=ranks)
    whole = loaded(kind, path, attention)
    for name, pruner, inputs, options in itertools.islice(cells(family), 3 if quick else None):
        yield f"{family}, {attention}, {name}", [outcome(m, m, pruner, inputs, **options) for m in (split, whole)]
    if quick and family != "llava":
        return
    if quick:
        for name, pruner, inputs, options in itertools.islice(cells(family), 8, 13):
            yield f"{family}, {attention}, {name}", [outcome(m, m, pruner, inputs, **options) for m in (split, whole)]
    pruner = AdaptInfer(schedule=STAGES, prior_weight=0.5)
    expected = outcome(whole, whole, pruner, inputs)
    yield f"{family}, {attention}, base model", [outcome(split, split.base_model, pruner, inputs), expected]
    by_hand = by_torch(loaded(kind, path, attention), ranks)
    yield f"{family}, {attention}, torch's own", [outcome(by_hand, by_hand, pruner, inputs), expected]


def compare_unsummed(family: str, path: Path, kind, rank: int, ranks: int):
    """What must not be added up: ranks that share out parameters hold all heads, and read prompts of their own."""
    if "fsdp_size" not in DistributedConfig.__dataclass_fields__:
        return
    inputs = tiny.batch(family, [tiny.simple(family, after=5 + rank, seed=7 + rank)])
    pruner = AdaptInfer(schedule=STAGES, prior_weight=0.5)
    models = loaded(kind, path, "sdpa", fsdp_size=ranks), loaded(kind, path, "sdpa")
    yield "own prompts, sharded parameters", [outcome(model, model, pruner, inputs) for model in models]


def guards(family: str, path: Path, kind, ranks: int):
    """What happens without the reduction, and where no group can be found."""
    split = loaded(kind, path, "sdpa", tp_size=ranks)
    inputs = tiny.batch(family, [tiny.simple(family, seed=4)])
    with mock.patch.object(parallel, "sum_over_ranks", lambda tensor, group: tensor):
        yield "not reduced", outcome(split, split, AdaptInfer(schedule=STAGES), inputs)
    refused = [METHODS[name](schedule=STAGES) for name in ("fitprune", "sparsevlm+")]
    for pruner in (*refused, TextGuided(schedule=STAGES, heads=0.5)):
        with attach(split, pruner), torch.no_grad():
            try:
                split(**inputs)
            except UnsupportedError as error:
                yield f"refused {pruner.name}", str(error)
    with attach(split, AdaptInfer(schedule=STAGES)) as handle, torch.no_grad():
        handle.attachment.ranks._groups.clear()
        try:
            split(**inputs)
        except UnsupportedError as error:
            yield "no group", str(error)


def main(folder: Path, rank: int, ranks: int, quick: bool) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    results = {}
    for family, make in tiny.FAMILIES.items():
        path, made = folder / family, make()
        kind = type(made)
        if rank == 0:
            made.save_pretrained(path)
        dist.barrier()
        for attention in ("sdpa", "eager"):
            if not quick or (family, attention) in (("llava", "sdpa"), ("qwen2_5_vl", "eager")):
                results.update(compare(family, attention, path, kind, ranks, quick))
    results.update(compare_unsummed(family, path, kind, rank, ranks))
    results.update(guards(family, path, kind, ranks))
    torch.save(results, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:] != ["all"])
