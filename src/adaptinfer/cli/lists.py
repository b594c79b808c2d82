"""The commands that list what there is: ``adaptinfer methods``, ``models`` and ``presets``."""

from __future__ import annotations

from adaptinfer.cli import terminal
from adaptinfer.schedule import MODEL_SHAPES, PRESETS, Schedule


def methods() -> None:
    """List the pruning methods."""
    from adaptinfer.pruners.contracts import PrunerError
    from adaptinfer.pruners.registry import find, names

    console = terminal.console()
    table = terminal.table(console, "method", "reference", "what it does")
    for name in names():
        try:
            method = find(name)
        except PrunerError as error:  # of another package
            table.add_row(name, "", str(error))
            continue
        table.add_row(name, method.reference, (method.__doc__ or name).strip().splitlines()[0])
    console.print(table)


def models() -> None:
    """List the model families that are tested."""
    from adaptinfer.engine.families import TESTED

    console = terminal.console()
    table = terminal.table(console, "model_type", "models")
    for model_type, models in TESTED.items():
        table.add_row(model_type, models)
    console.print(table)
    console.print("Others are probed when a pruner is attached: they work, or are refused with a reason.")


_PRESET_COLUMNS = ("preset", "layers", "after layer", "keep", "nominal", "true average", "FLOPs saved")
_TEXT_TOKENS = 92  # 35 before the image and 57 after it


def presets() -> None:
    """List the published schedules, with what they save of LLaVA's prefill FLOPs at 92 text tokens."""
    console = terminal.console()
    table = terminal.table(console, *_PRESET_COLUMNS, "without early drop")
    for name, schedule in PRESETS.items():
        if schedule.vision_tokens is None:
            many = 1_000_000  # a share has no count
            nominal, true = f"{schedule.nominal:.0%}", f"{schedule.true_average(many) / many:.1%}"
        else:
            nominal, true = f"{schedule.nominal:g}", f"{schedule.true_average():.1f} of {schedule.vision_tokens}"
        keeps = [f"{stage.keep:.0%}" if isinstance(stage.keep, float) else str(stage.keep) for stage in schedule.stages]
        layers = [str(stage.layer) for stage in schedule.stages]
        saved = ["", ""]
        shape = MODEL_SHAPES.get(name.partition("/")[0])
        if shape is not None:
            vanilla = Schedule((), shape.num_layers, schedule.vision_tokens).prefill_flops(shape, _TEXT_TOKENS)
            saved = [
                f"{1 - schedule.prefill_flops(shape, _TEXT_TOKENS, early_drop=early) / vanilla:.1%}"
                for early in (True, False)
            ]
        table.add_row(name, str(schedule.num_layers), "/".join(layers), "/".join(keeps), nominal, true, *saved)
    console.print(table)
