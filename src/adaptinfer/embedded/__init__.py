"""The embedded model: a small LLaVA of our own that comes with the package and works offline.

It answers questions about simple scenes of coloured shapes, and nothing else. It is there so that the library can be
tried, tested and measured without a download; :func:`path` gives the folder that ``from_pretrained`` loads::

    from transformers import AutoModelForImageTextToText, AutoProcessor
    from adaptinfer import embedded

    model = AutoModelForImageTextToText.from_pretrained(embedded.path())
    processor = AutoProcessor.from_pretrained(embedded.path())

Scenes and their pictures are in :mod:`adaptinfer.embedded.scenes`, questions and answers in
:mod:`adaptinfer.embedded.questions`; how the model was trained is in ``training/`` of the repository. This module
imports nothing heavy.
"""

from pathlib import Path

__all__ = ["path"]


def path() -> Path:
    """The checkpoint folder of the embedded model.

    Raises:
        FileNotFoundError: The folder or its weights are missing, as in an incomplete installation.
    """
    folder = Path(__file__).parent / "checkpoint"
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"the embedded model is not at {folder}; install adaptinfer again, or make the model with training/train.py"
        )
    return folder
