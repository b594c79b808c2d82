"""Decoder prefill of a LLaVA-shaped model with random weights: vanilla beside AdaptInfer, interleaved in one run.

    python benchmarks/prefill.py --shape llava-1b --dtype float32 --budgets 192,128,64

Speed depends on shapes, not on weights, so nothing is downloaded. What is timed is one forward call from token
embeddings to the last token's logits: all decoder layers, the scoring, norm and lm_head; not the vision tower, which
pruning inside the language model leaves as it is.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from common import write
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from adaptinfer import AdaptInfer, attach, preset

SHAPES = {
    # hidden size, layers, heads, key/value heads, intermediate size
    "llava-0.2b": (1024, 16, 16, 4, 2816),
    "llava-1b": (2048, 22, 32, 4, 5632),
    "llava-1.5-7b": (4096, 32, 32, 32, 11008),
}
VISION, BEFORE, AFTER = 576, 35, 57
IMAGE = 5


def build(shape: str, dtype: torch.dtype, device: str) -> LlavaForConditionalGeneration:
    """A model of that shape with random weights, made on the device."""
    hidden, layers, heads, kv_heads, intermediate = SHAPES[shape]
    text = LlamaConfig(
        vocab_size=32064,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
        max_position_embeddings=4096,
    )
    # The tower is never run here, so it is made as small as it can be.
    tower = CLIPVisionConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1)
    config = LlavaConfig(text_config=text, vision_config=tower, image_token_index=IMAGE)
    config.image_token_id = IMAGE
    with torch.device(device):
        model = LlavaForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval()


def main(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "llava-0.2b",
    dtype: str = "float32",
    budgets: Annotated[
        str, typer.Option(help="True averages of vision tokens per layer, comma-separated.")
    ] = "192,128,64",
    published: Annotated[bool, typer.Option(help="Add the paper's nominal-64 schedule (32 layers only).")] = False,
    repeats: int = 7,
    batch: int = 1,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    json: Annotated[Path | None, typer.Option(help="Where to write the results.")] = None,
) -> None:
    model = build(shape, getattr(torch, dtype), device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(6, 32000, (batch, BEFORE + VISION + AFTER), generator=generator)
    ids[:, BEFORE : BEFORE + VISION] = IMAGE
    ids = ids.to(device)

    pruners = {"keep all (attached)": AdaptInfer(budget=VISION)}
    pruners |= {f"true {budget}": AdaptInfer(budget=float(budget)) for budget in budgets.split(",")}
    if published:
        pruners["published nominal 64"] = AdaptInfer(schedule=preset("llava-1.5-7b/64"))
    seconds: dict[str, list[float]] = {"vanilla": []} | {name: [] for name in pruners}
    details = {}

    def timed(name: str) -> None:
        begin = time.perf_counter()
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds[name].append(time.perf_counter() - begin)
        del out

    with torch.inference_mode():
        for repeat in track(range(repeats + 1), description=f"{shape} {dtype} {device}", console=Console(stderr=True)):
            timed("vanilla")
            for name, pruner in pruners.items():
                with attach(model, pruner) as handle:
                    timed(name)
                report = handle.report
                assert report is not None
                details[name] = {
                    "tokens_per_layer": report.tokens_per_layer[0],
                    "true_average": report.true_average[0],
                    "flops_bound": report.vanilla_flops / report.flops,
                    "kv_bytes": report.kv_bytes,
                    "vanilla_kv_bytes": report.vanilla_kv_bytes,
                }
            if repeat == 0:
                for values in seconds.values():
                    values.clear()  # the first round warms up

    vanilla = statistics.median(seconds["vanilla"])
    table = Table(title=f"Decoder prefill, {shape}, {dtype}, {device}, batch {batch}, {BEFORE}+{VISION}+{AFTER} tokens")
    for column in ("", "true average", "median ms", "min–max ms", "speed-up", "FLOPs bound", "share of bound"):
        table.add_column(column, justify="left" if not column else "right")
    results = {}
    for name, values in seconds.items():
        # Ratios are paired: each repeat's pruned run against the vanilla run beside it.
        ratio = statistics.median(v / p for v, p in zip(seconds["vanilla"], values, strict=True))
        bound = details.get(name, {}).get("flops_bound", 1.0)
        results[name] = {"seconds": values, "speed_up": ratio, "share_of_bound": ratio / bound, **details.get(name, {})}
        table.add_row(
            name,
            f"{details.get(name, {}).get('true_average', VISION):.1f}",
            f"{statistics.median(values) * 1e3:.0f}",
            f"{min(values) * 1e3:.0f}–{max(values) * 1e3:.0f}",
            f"{ratio:.2f}×",
            f"{bound:.2f}×",
            f"{ratio / bound:.0%}",
        )
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    console.print(f"vanilla median {vanilla * 1e3:.0f} ms over {repeats} repeats, all methods interleaved")
    path = write(
        f"prefill_{shape}_{dtype}_{device}_b{batch}",
        {"shape": shape, "dtype": dtype, "device": device, "batch": batch, "repeats": repeats, "results": results},
        json,
    )
    console.print(f"written to {path}", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
