"""The forms of questions that compare two scenes, under the same rules as :mod:`adaptinfer.embedded.world.forms`.

Evidence goes on through both pictures: the first thing of the second scene has the number that follows the last of
the first. What was asked already is kept with the first view. Signs are left out where their being common would give
an answer away.
"""

from adaptinfer.embedded.world.chance import Chance
from adaptinfer.embedded.world.describe import SceneView
from adaptinfer.embedded.world.forms import MAX_COUNT, Asked
from adaptinfer.embedded.world.things import COLOURS, SHAPES, SIGN
from adaptinfer.embedded.world.wordings import PICTURES, a, phrase, put


def both(first: SceneView, second: SceneView, chance: Chance) -> Asked | None:
    """``do both pictures have a red star``; a "no" has it in one of them."""
    for attributes in chance.shuffle((("shape",), ("shape", "colour"))):
        one, two = (view.groups(*attributes, numbers=view.shapes) for view in (first, second))
        shared, single = (
            [name for name in sorted(names) if ("both", *name) not in first.asked]
            for names in (one.keys() & two.keys(), one.keys() ^ two.keys())
        )
        if shared and single:
            yes = chance.happens(0.5)
            name = chance.choice(shared if yes else single)
            text = put("both", chance, a=a(phrase(dict(zip(attributes, name, strict=True)), chance)))
            evidence = _evidence(first, one.get(name, []), two.get(name, []))
            return Asked(text, "yes" if yes else "no", evidence, ("both", *name))
    return None


def which_picture(first: SceneView, second: SceneView, chance: Chance) -> Asked | None:
    """``which picture has more stars``: first, second or, where both have some and as many, same."""
    for attribute, names in chance.shuffle((("shape", SHAPES), ("colour", COLOURS))):
        one, two = (view.groups(attribute) for view in (first, second))
        options: dict[str, list[str]] = {answer: [] for answer in PICTURES}
        for name in names:
            ones, twos = (len(groups.get((name,), ())) for groups in (one, two))
            if 0 < max(ones, twos) <= MAX_COUNT and ("which picture", name) not in first.asked:
                options["first" if ones > twos else "second" if twos > ones else "same"].append(name)
        if all(options.values()):
            answer = chance.choice(PICTURES)
            name = chance.choice(options[answer])
            text = put("which picture", chance, group=phrase({attribute: name}, chance, plural=True))
            evidence = _evidence(first, one.get((name,), []), two.get((name,), []))
            return Asked(text, answer, evidence, ("which picture", name))
    return None


def alike(first: SceneView, second: SceneView, chance: Chance) -> Asked | None:
    """``does the star have the same colour in both pictures``, of what each picture has one of."""
    options: dict[bool, list[tuple[str, str, str, list[int]]]] = {True: [], False: []}
    for named, asked in (("shape", "colour"), ("colour", "shape")):
        groups = [view.groups(named) for view in (first, second)]
        for (name,), ones in groups[0].items():
            twos = groups[1].get((name,), [])
            if len(ones) == len(twos) == 1 and ("alike", name) not in first.asked:
                one, two = first.value(ones[0], asked), second.value(twos[0], asked)
                if asked == "colour" or SIGN not in (one, two):
                    options[one == two].append((named, name, asked, _evidence(first, ones, twos)))
    if not all(options.values()):
        return None
    yes = chance.happens(0.5)
    named, name, asked, evidence = chance.choice(options[yes])
    text = put("alike", chance, the=f"the {phrase({named: name}, chance)}", attribute=asked)
    return Asked(text, "yes" if yes else "no", evidence, ("alike", name))


def _evidence(first: SceneView, ones: list[int], twos: list[int]) -> list[int]:
    return ones + [len(first.looks) + number for number in twos]


FORMS = (both, both, which_picture, which_picture, alike)
"""The forms, as :data:`adaptinfer.embedded.world.forms.FORMS` has them."""
