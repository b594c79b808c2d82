"""What is asked in training only, at first: plain and dense, so that the language model learns to find things.

A question about one thing among a dozen gives a model that cannot find things yet hardly anything to learn from. Each
word of a full description does: what comes after "red star" is on the one thing that "red star" means.
"""

from __future__ import annotations

from adaptinfer.embedded.world.chance import Chance
from adaptinfer.embedded.world.describe import View
from adaptinfer.embedded.world.questions import Question
from adaptinfer.embedded.world.scene import COLOURS, SHAPES, SIGN, Scene
from adaptinfer.embedded.world.wordings import a, phrase, put


def describe_all(scene: Scene, chance: Chance) -> Question:
    """All things of a scene in random order, each with all of its attributes in one random order, and its places."""
    view = View(scene)
    order = chance.shuffle(("shape", "colour", "pattern", "size", "text", "third", "cell"))
    words = []
    for number in chance.shuffle(range(len(scene.things))):
        said = {**view.pick(number, ("shape", "colour", "pattern", "size", "text"))}
        said["third"], said["cell"] = view.third(number) or "", view.cell(number) or ""
        words.append(" ".join(said[name] for name in order if said[name]))
    return Question("describe", "list the things", " , ".join(words), ())


def roll_call(scene: Scene, chance: Chance, count: int) -> list[Question]:
    """Whether there is a thing of some shape or colour, as often with yes as with no."""
    view = View(scene)
    options = []
    for name, domain in (("shape", (*SHAPES, SIGN)), ("colour", COLOURS)):
        there = set(view.values(name))
        absent = [value for value in domain if value not in there]
        if absent:  # a scene can have all colours
            options.append((name, [value for value in domain if value in there], absent))
    asked = []
    for _ in range(count if options else 0):
        name, there, absent = chance.choice(options)
        found = chance.happens(0.5)
        text = put("exists", chance, a=a(phrase({name: chance.choice(there if found else absent)}, chance)))
        asked.append(Question("roll", text, "yes" if found else "no", ()))
    return asked
