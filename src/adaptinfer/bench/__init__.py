"""``adaptinfer bench``: latency, memory and FLOPs of pruned prefills against vanilla, on real shapes.

    shapes.py       the shapes by name, and models of them with random weights made on the device
    subject.py      the model that is measured: a shape or a checkpoint
    prompts.py      prompts made by hand: text, vision placeholders with pixel tensors, text
    variants.py     what is compared: vanilla, keep-all, methods × budgets, published schedules
    timing.py       clocks, the order of rounds, medians, paired ratios
    memory.py       peak memory of one pass, and what is free
    roofline.py     the second bound: matrix rate and copy bandwidth of this machine
    measure.py      one pass of one variant: first token, decoder prefill, generation, scorer
    runner.py       all rounds of all variants
    environment.py  hardware, versions, commit
    results.py      the JSON document, which plot.py and the command's tables show

Nothing here changes how a model prunes.
"""
