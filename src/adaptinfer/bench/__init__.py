"""``adaptinfer bench``: latency, memory and FLOPs of pruned prefills beside vanilla, on real shapes.

    shapes.py       the shapes by name, and models of them with random weights made on the device
    prompts.py      prompts made by hand: text, vision placeholders with pixel tensors, text
    variants.py     what stands side by side: vanilla, keep-all, methods x budgets, published schedules
    timing.py       clocks, the order of rounds, medians, paired ratios
    memory.py       peak memory of one pass, and what is free
    roofline.py     the second bound: matrix rate and copy bandwidth of this machine
    measure.py      one pass of one variant: first token, decoder prefill, generation, scorer
    runner.py       all rounds of all variants
    environment.py  hardware, versions, commit
    results.py      the JSON document; tables.py and plot.py show it
    cli.py          the sub-command

Nothing here changes how a model prunes, and nothing outside needs what is here.
"""
