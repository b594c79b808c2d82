"""A model whose layers sit on different devices, without such devices: `python two_devices_worker.py NAME ...`.

Tensors of three pretended devices hold CPU data, and every operation on tensors of two of them raises, as CUDA would.
Layers move what they are given to their own device inside `forward`, as accelerate does. Names are those of
`zoo.SETUPS`; each is run whole and spread, and whatever differs is printed. In a process of its own, for it registers a
backend.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import traceback

os.environ["HF_HUB_OFFLINE"] = "1"

import tiny
import torch
import zoo
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer

from adaptinfer import AdaptInfer, Schedule, Stage, attach
from adaptinfer.engine.families import family_of

CPU, FIRST = torch.device("cpu"), "pretend:0"
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}  # torch takes indices on the CPU
GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "eos_token_id": None}
GREEDY["suppress_tokens"] = list(zoo.PLACEHOLDERS)


class Held(torch.Tensor):
    """CPU data that says it is elsewhere."""

    @staticmethod
    def __new__(cls, data, device):
        layout = {"strides": data.stride(), "storage_offset": data.storage_offset(), "dtype": data.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, **layout, device=device)

    def __init__(self, data, device):
        self.held = data

    def tolist(self):
        return self.held.tolist()

    def __repr__(self):
        return f"{self.held!r} on {self.device}"

    def __format__(self, spec):
        return format(self.held, spec)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Pretend(TorchDispatchMode):
    """Sees the functions that make tensors on a device, too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func, args, kwargs):
    """Run an operation on the data; its result is where its operands are, or where it was asked to be."""
    elsewhere, here = [], []

    def sort(value):
        if isinstance(value, torch.Tensor):
            (elsewhere if isinstance(value, Held) else here).append(value)

    tree_map(sort, (args, kwargs))
    name, devices = func.overloadpacket.__name__, {tensor.device for tensor in elsewhere}
    if name == "copy_":
        devices = {args[0].device} - {CPU}
    elif len(devices) > 1 or (devices and name not in INDEXING and any(tensor.ndim for tensor in here)):
        found = sorted({str(tensor.device) for tensor in elsewhere + here})
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found {', '.join(found)}")
    wanted = kwargs.get("device")
    place = torch.device(wanted) if wanted is not None else next(iter(devices), CPU)
    if wanted is not None:
        kwargs = {**kwargs, "device": CPU}
    if name == "histc":  # models of experts cast to float where they see a CPU
        args = (args[0].float(), *args[1:])
    known = {id(tensor.held): tensor for tensor in elsewhere}
    args, kwargs = tree_map(lambda value: value.held if isinstance(value, Held) else value, (args, kwargs))

    def wrap(value):
        if not isinstance(value, torch.Tensor) or (place == CPU and id(value) not in known):
            return value
        if id(value) in known and known[id(value)].device == place:
            return known[id(value)]  # in place
        value = value.clone() if id(value) in known or any(value is tensor for tensor in here) else value
        return value if place == CPU else Held(value, place)

    return tree_map(wrap, func(*args, **kwargs))


def tensor_through_cpu(*args, device=None, make=torch.tensor, **kwargs):
    """torch.tensor reads its operands and writes to its device out of sight of any mode."""
    made = make(*tree_map(lambda value: value.item() if isinstance(value, Held) else value, args), **kwargs)
    return made if device is None else made.to(device)


def moved(value, device):
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(each, device) for key, each in value.items()}
    return type(value)([moved(each, device) for each in value]) if type(value) in (list, tuple) else value


def spread(model):
    """Two layers on a device, everything else on the first."""

    def put(part, device):
        for module in part.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        tensors[name] = Held(tensor.held if isinstance(tensor, Held) else tensor.data, device)

    def moving(module, device):
        forward = module.forward

        @functools.wraps(forward)
        def inner(*args, **kwargs):
            kwargs = {name: value if name in stay else moved(value, device) for name, value in kwargs.items()}
            return forward(*moved(args, device), **kwargs)

        module.forward = inner

    decoder = model.get_decoder()
    stay = decoder._skip_keys_device_placement or ()
    put(model, torch.device(FIRST))
    for number, layer in enumerate(decoder.layers):
        device = torch.device("pretend", number // 2)
        put(layer, device)
        moving(layer, device)
    for name in {"norm", "embedding_norm", "rotary_emb", "pos_emb"} & set(dict(decoder.named_children())):
        moving(getattr(decoder, name), torch.device(FIRST))
    return model


def kept(report):
    return [[row.tolist() for row in stage] for stage in report.kept]


def pruning(model, pruner):
    """The pruner attached for a while, or nothing."""
    return contextlib.nullcontext() if pruner is None else attach(model, pruner)


def generate(name, pruner, model, device):
    """A padded batch: logits, what was kept, greedy tokens."""
    inputs = zoo.batch(name, [zoo.simple(name, after=5, seed=1), zoo.simple(name, after=13, seed=2)])
    inputs = moved(inputs, device)
    with pruning(model, pruner) as handle, torch.no_grad():
        logits = model(**inputs).logits.to(CPU)
        return [logits, handle and kept(handle.report), model.generate(**inputs, **GREEDY).tolist()]


def talk(pruners, cache, model, device):
    """Two turns on one cache, pruned at different layers, a token after each; prompts of one length without a mask."""
    same = [tiny.simple("llava", after=56, seed=1), tiny.simple("llava", after=3, images=2, seed=2)]
    inputs = tiny.batch("llava", same)
    inputs.pop("attention_mask")
    cache, results = cache(), []
    for pruner in pruners:
        with pruning(model, pruner) as handle, torch.no_grad():
            for given in (inputs, {"input_ids": torch.tensor([[7], [8]])}):
                results.append(model(**moved(given, device), past_key_values=cache, use_cache=True).logits.to(CPU))
            results.append(handle and kept(handle.report))
    return results


def differences(ours, expected, tolerance):
    for number, (one, other) in enumerate(zip(ours, expected, strict=True)):
        if isinstance(one, torch.Tensor):
            far = (one - other).abs().max().item()
            if not far <= tolerance:
                yield f"logits {number} differ by {far:.1e}"
        elif one != other:
            yield f"result {number} is {one}, not {other}"


def check(name: str, build, tolerance: float, vanilla, *runs) -> bool:
    """Run the same functions on a whole and on a spread model, and print what differs."""
    whole = build()
    with sdpa_kernel(SDPBackend.MATH):  # which other devices fall back to
        expected = [each(whole, CPU) for each in (vanilla, *runs)]
    trouble = []
    with Pretend():
        model = spread(build())
        for number, each in enumerate((vanilla, *runs)):
            try:
                trouble += differences(each(model, FIRST), expected[number], tolerance)
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)
                places = [f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in where]
                trouble.append(f"{type(error).__name__}: {str(error)[:200]} ({', '.join(places[-8:])})")
            if trouble and not number:
                print(f"cannot be run unpruned: {name}: {trouble[0]}")
                return True
    for line in trouble:
        print(f"{name}: {line}")
    return not trouble


def main(names: list[str]) -> int:
    torch.set_num_threads(1)
    _setup_privateuseone_for_python_backend("pretend")
    torch.tensor = tensor_through_cpu
    well = []
    for name in names:
        for attention in ("sdpa", "eager"):
            build = functools.partial(zoo.SETUPS[name].build, attention)
            family = family_of(build())
            layers = sorted({family.scoring[0], family.scoring[len(family.scoring) // 3], family.scoring[-2]})
            stages = tuple(Stage(layer, share) for layer, share in zip(layers, (0.7, 0.8, 0.5), strict=False))
            schedule = Schedule(stages, len(build().get_decoder().layers))
            pruners = [None, AdaptInfer(schedule=schedule)]
            if family.rotary is not None:
                pruners.append(AdaptInfer(schedule=schedule, positions="compact"))
            runs = [functools.partial(generate, name, pruner) for pruner in pruners]
            well.append(check(f"{name}, {attention}", build, zoo.SETUPS[name].tolerance, *runs))
    for attention, positions in (("sdpa", "keep"), ("eager", "compact")):
        build = functools.partial(tiny.llava, attention)
        pruners = [
            AdaptInfer(schedule=Schedule(stages, tiny.LAYERS), positions=positions)
            for stages in ((Stage(0, 0.6), Stage(3, 0.5)), (Stage(1, 0.5), Stage(4, 5)))
        ]
        config = build().config.get_text_config()
        caches = [functools.partial(DynamicCache, config=config)]
        if "cumulative_length" in getattr(StaticLayer, "__annotations__", {}):  # transformers 5.5
            caches.append(functools.partial(StaticCache, config=config, max_cache_len=300))
        runs = [functools.partial(talk, [None, None], caches[0])]
        runs += [functools.partial(talk, pruners, cache) for cache in caches]
        well.append(check(f"two turns, {attention}, {positions}", build, 1e-5, *runs))
    print(f"{sum(well)} of {len(well)} as on one device")
    return 0 if all(well) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
