"""The embedded model: a small LLaVA of our own that comes with the package and works offline.

It answers questions about drawn scenes of shapes and signs, and nothing else. It is there so that the library can be
tried, tested and measured without a download; :func:`path` gives the folder that ``from_pretrained`` loads::

    from transformers import AutoModelForImageTextToText, AutoProcessor
    from adaptinfer import embedded

    model = AutoModelForImageTextToText.from_pretrained(embedded.path())
    processor = AutoProcessor.from_pretrained(embedded.path())

Scenes, their pictures and the questions about them are in :mod:`adaptinfer.embedded.world`; how the model was trained
is in ``research/training/`` of the repository. This module imports nothing heavy.
"""

import json
from pathlib import Path

__all__ = ["patches", "path"]


def path() -> Path:
    """The checkpoint folder of the embedded model.

    Raises:
        FileNotFoundError: The folder or its weights are missing, as in an incomplete installation.
    """
    folder = Path(__file__).parent / "checkpoint"
    if not any(folder.glob("model*.safetensors")):
        raise FileNotFoundError(
            f"the embedded model is not at {folder}; install adaptinfer again, or make the model with "
            "research/training/train.py"
        )
    return folder


def patches() -> tuple[int, int]:
    """Patches along each side of the embedded model's picture, each a vision token, and pixels along a patch's side."""
    vision = json.loads((path() / "config.json").read_text(encoding="utf-8"))["vision_config"]
    return vision["image_size"] // vision["patch_size"], vision["patch_size"]
