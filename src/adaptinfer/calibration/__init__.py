"""``adaptinfer calibrate``: a schedule from a model's own attention, on the user's own questions.

    samples.py      a sample, and how one is built from a row of named fields
    sources.py      where samples come from: a folder with JSONL, a Hugging Face data set, a list
    scenes.py       the built-in scenes as a source; the one file that knows them
    record.py       text-to-vision attention and scores of the unpruned model, one sample after the other
    store.py        readings on disk, in parts that are written whole or not at all
    detect.py       the published detector, and what it finds where there is nothing to find
    shifts.py       our detector with its own null: distances between the layers' attention distributions
    objective.py    attention mass that survives a schedule, and what a schedule costs
    programme.py    the dynamic programme over (layer, keep, cost)
    optimise.py     the schedule that keeps the most mass under a budget
    result.py       the calibration that comes out, and the files it is written to
    run.py          all of it in one call
    distributed.py  recording in Ray actors or in the processes of ``accelerate launch``
    plots.py        why this schedule

Two lines do it: ``calibration = adaptinfer.calibrate(model, processor, samples, budget=64)`` and
``AdaptInfer(schedule=calibration.schedule)``.
"""

from adaptinfer.extras import needs

with needs("calibrate", "adaptinfer.calibration"):  # before hours of recording, not after
    import matplotlib  # noqa: F401
    import ruptures  # noqa: F401
