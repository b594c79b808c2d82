"""The scene world of the embedded model: scenes from seeds, their pictures, and questions about them.

========================= ==========================================================================================
:mod:`things`             what a scene is: its things, its background, the names and the splits
:mod:`scene`              scenes drawn at random from a seed
:mod:`render`             pictures of scenes, from :mod:`masks` (shapes, patterns, text) and :mod:`backdrop`
:mod:`questions`          questions about scenes, with their answers and the things that hold the evidence
========================= ==========================================================================================
"""

from adaptinfer.embedded.world.scene import sample_scene
from adaptinfer.embedded.world.things import SPLITS, VERSION, Scene, Thing, split_of

__all__ = ["SPLITS", "VERSION", "Scene", "Thing", "sample_scene", "split_of"]
