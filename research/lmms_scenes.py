"""lmms-eval on drawn scenes, offline: writes a task of scenes and runs lmms-eval's own command with our plug-in.

    pip install 'adaptinfer[lmms-eval]'
    python research/lmms_scenes.py --scenes 25                  # vanilla, and AdaptInfer at 33 %
    python research/lmms_scenes.py --model-args method=random,budget=0.11

It shows that the plug-in works without any download; what it says about accuracy, `adaptinfer eval` says better.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from adaptinfer.evaluation.tasks import load_task

TASK = "adaptinfer_scenes"

YAML = """task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: answer
process_results: !function utils.process_results
generation_kwargs:
  max_new_tokens: 24
  temperature: 0
  do_sample: false
metric_list:
  - metric: exact
    aggregation: mean
    higher_is_better: true
metadata:
  - version: 1.0
"""

UTILS = '''"""Written by research/lmms_scenes.py."""

from PIL import Image

from adaptinfer.evaluation.metrics import METRICS


def doc_to_visual(doc):
    return [Image.open(doc["image"]).convert("RGB")]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def process_results(doc, results):
    return {"exact": METRICS["exact"](results[0], [doc["answer"]])}
'''


def write_task(folder: Path, scenes: int) -> None:
    """The task's YAML, its functions, its questions and its pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    task = load_task("world")
    lines = []
    for sample in task.samples(4 * scenes):
        picture = folder / f"{sample.group}.png"
        if not picture.exists():
            task.pictures(sample)[0].save(picture)
        turn = sample.turns[0]
        entry = {"id": sample.id, "image": str(picture), "question": turn.question, "answer": turn.answers[0]}
        lines.append(json.dumps(entry))
    data = folder / "test.jsonl"
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / f"{TASK}.yaml").write_text(YAML.format(task=TASK, data=data), encoding="utf-8")
    (folder / "utils.py").write_text(UTILS, encoding="utf-8")


def main() -> None:
    """Write the task and run it once per set of model arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=25)
    parser.add_argument("--model-args", nargs="*", default=["", "method=adaptinfer,budget=0.33"])
    parser.add_argument("--folder", type=Path, default=Path("build/lmms_scenes"))
    options = parser.parse_args()
    folder = options.folder.resolve()
    write_task(folder / "task", options.scenes)
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    for arguments in options.model_args:
        chosen = ",".join(filter(None, ["pretrained=embedded", arguments]))
        command = [sys.executable, "-m", "lmms_eval", "--model", "adaptinfer", "--model_args", chosen]
        command += ["--tasks", TASK, "--include_path", str(folder / "task"), "--batch_size", "16"]
        print(" ".join(command), flush=True)
        subprocess.run(command, env={**os.environ, **offline}, check=True)


if __name__ == "__main__":
    main()
