"""``adaptinfer calibrate``: a schedule from a model's own attention, on questions of the user's choice.

    samples.py      pictures with questions: a folder with JSONL, a Hugging Face data set, a list
    scenes.py       the same from the built-in scenes; the one file that knows them
    record.py       text-to-vision attention and scores of the unpruned model, one sample after the other
    store.py        readings on disk, in parts that are there whole or not at all
    detect.py       the published detector and what it finds where there is nothing to find
    shifts.py       a detector with a null of its own: distances between the layers' attention distributions
    objective.py    attention mass that survives a schedule, and what a schedule costs
    optimise.py     the schedule that keeps most of it, by dynamic programming
    result.py       what comes out, and the files it is written to
    run.py          all of it in one call
    distributed.py  recording in Ray actors or in the processes of ``accelerate launch``
    plots.py        why this schedule
    cli.py          the sub-command

Two lines do it: ``calibration = adaptinfer.calibrate(model, processor, samples, budget=64)`` and
``AdaptInfer(schedule=calibration.schedule)``.
"""
