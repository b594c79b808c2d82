"""Pruned vLLM engines behind Ray Serve: an engine for each replica, which loads the plug-in by itself.

    python examples/vllm_ray.py [--model NAME] [--replicas 2] [--budget 0.33] [--once scene.png QUESTION]

Run it in vLLM's environment (docs/guides/vllm.md) with ``pip install "ray[serve]"``. With ``--once`` it asks one
question over HTTP and leaves; otherwise it serves until interrupted. The body of a request is
``{"question": "What colour is the star?", "image": "... a file in base64 ..."}``.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import urllib.request
import uuid
from pathlib import Path
from typing import Any

import ray
from ray import serve

from adaptinfer import embedded


@serve.deployment
class Answers:
    """A replica: an engine of its own, which prunes because its arguments say so."""

    def __init__(self, model: str, pruner: dict[str, Any]) -> None:
        from transformers import AutoProcessor
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self.processor = AutoProcessor.from_pretrained(model)
        arguments = AsyncEngineArgs(
            model=model,
            dtype="float32",
            max_model_len=512,
            kv_cache_memory_bytes=2**28,
            additional_config={"adaptinfer": pruner},  # travels with the configuration; no environment variable needed
        )
        self.engine = AsyncLLM.from_engine_args(arguments)

    async def __call__(self, request: Any) -> dict[str, str]:
        from PIL import Image
        from vllm import SamplingParams

        body = json.loads(await request.body())
        image = Image.open(io.BytesIO(base64.b64decode(body["image"]))).convert("RGB")
        content = [{"type": "image"}, {"type": "text", "text": body["question"]}]
        prompt = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        settings = SamplingParams(temperature=0, max_tokens=16)
        answer = ""
        async for output in self.engine.generate(
            {"prompt": prompt, "multi_modal_data": {"image": image}}, settings, request_id=uuid.uuid4().hex
        ):
            answer = output.outputs[0].text
        return {"answer": answer.strip()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--budget", type=float, default=0.33)
    parser.add_argument("--once", nargs=2, metavar=("IMAGE", "QUESTION"))
    options = parser.parse_args()
    model = str(embedded.path()) if options.model == "embedded" else options.model
    replicas = Answers.options(num_replicas=options.replicas, ray_actor_options={"num_cpus": 0.5})
    serve.run(replicas.bind(model, {"budget": options.budget}), blocking=options.once is None)
    if options.once is not None:
        image, question = options.once
        body = {"question": question, "image": base64.b64encode(Path(image).read_bytes()).decode()}
        request = urllib.request.Request("http://127.0.0.1:8000/", json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=600) as response:
            print(json.load(response)["answer"])
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
