"""``adaptinfer eval``: methods beside vanilla and controls at equal true budgets, with intervals.

    samples.py      what a task is: samples, turns, reference answers
    tasks.py        tasks by name; world.py: drawn scenes; jsonl.py: a task of your own
    metrics.py      one answer against its references: exact, yes_no, vqa, anls
    conditions.py   what stands side by side: vanilla, methods x budgets x positions, sanity rows
    controls.py     the `evidence` control, and what sanity rows do to pictures
    plan.py         a run as plain values, and what is left of it
    answerer.py     a model that answers batches of conversations and says what each prompt cost
    journal.py      one line per answer, appended whole, read back after a kill
    runner.py       every batch under every condition, in one process or several
    processes.py    several processes of accelerate launch; on_ray.py: actors of Ray
    latency.py      time to first token and per token, apart from the answers
    statistics.py   paired bootstrap, precision and recall
    summary.py      answers to figures
    plots.py        figures to pictures; report.py, templates: to Markdown and one HTML file; published.py: papers'
    lmms.py         the plug-in for lmms-eval

Nothing here changes how a model prunes, and nothing outside needs what is here.
"""

from adaptinfer.extras import needs

with needs("eval", "adaptinfer.evaluation"):  # said here, once, and not by whichever module meets it first
    import jinja2  # noqa: F401
    import matplotlib  # noqa: F401
    import scipy  # noqa: F401
