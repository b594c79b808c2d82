"""A second opinion on the scene world's questions: reads a question's text and works out answer and evidence afresh.

It shares no code with the generators, only the names of shapes, colours and the like. It looks at every thing for every
phrase, and fails with an AssertionError where a careful reader could doubt what is meant.
"""

import re
from collections.abc import Callable

from adaptinfer.embedded.world.things import COLOURS, PATTERNS, SHAPES, SIZES, Scene, Thing

Answer = tuple[str, set[int]]


def answer(scene: Scene, text: str, it: int | None = None, second: Scene | None = None) -> Answer:
    """Answer and evidence of a question.

    Args:
        scene: The scene, or the first of two.
        text: The question.
        it: Number of the thing that "it" means.
        second: The second scene, if there are two.
    """
    text = text.replace("color", "colour").replace("object", "thing")
    reader = Reader(scene, it, second)
    for pattern, method in RULES:
        if found := pattern.fullmatch(text):
            return method(reader, **found.groupdict())
    raise AssertionError(f"nobody asks: {text}")


def singular(noun: str) -> str:
    return "cross" if noun in ("cross", "crosses") else noun.removesuffix("s")


def wanted(phrase: str) -> dict[str, str]:
    """``large red stars with the letter A`` as attributes; a bare thing has none."""
    look: dict[str, str] = {}
    head, *text = re.split(" that says | with the letter | with the number ", phrase)
    if text:
        (look["text"],) = text
    *words, noun = head.split()
    if singular(noun) != "thing":
        assert singular(noun) in (*SHAPES, "sign"), phrase
        look["shape"] = singular(noun)
    for word in words:
        (name,) = [n for n, known in (("size", SIZES), ("colour", COLOURS), ("pattern", PATTERNS)) if word in known]
        assert name not in look
        look[name] = word
    return look


def fits(thing: Thing, look: dict[str, str]) -> bool | None:
    """Whether a thing looks so; None if it is a matter of opinion, as the size of a sign is."""
    if any(getattr(thing, name) != value for name, value in look.items() if name != "size"):
        return False
    if "size" in look and thing.shape == "sign":
        return None
    return "size" not in look or thing.size == look["size"]


class Reader:
    def __init__(self, scene: Scene, it: int | None, second: Scene | None) -> None:
        self.scene, self.it, self.second = scene, it, second
        self.things = scene.things

    def all(self, phrase: str, things: tuple[Thing, ...] | None = None) -> list[int]:
        verdicts = [fits(thing, wanted(phrase)) for thing in (self.things if things is None else things)]
        assert None not in verdicts, f"doubt about {phrase}"
        return [number for number, verdict in enumerate(verdicts) if verdict]

    def one(self, phrase: str, things: tuple[Thing, ...] | None = None) -> int:
        (number,) = self.all(phrase, things)
        return number

    def exists(self, a: str) -> Answer:
        found = self.all(a)
        return "yes" if found else "no", set(found)

    def attribute(self, attribute: str, the: str) -> Answer:
        number = self.one(the)
        assert attribute not in wanted(the), "the question answers itself"
        return self._value(number, attribute), {number}

    def _value(self, number: int, attribute: str) -> str:
        thing = self.things[number]
        assert thing.shape != "sign" or attribute == "colour", "a sign's shape, size and pattern are not asked"
        return getattr(thing, attribute)

    def symbol(self, symbol: str, the: str) -> Answer:
        number = self.one(the)
        return self._symbol(number, symbol), {number}

    def _symbol(self, number: int, symbol: str) -> str:
        text = self.things[number].text
        assert len(text) == 1 and (text.isupper() if symbol == "letter" else text.isdigit())
        return text

    def count(self, group: str) -> Answer:
        found = self.all(group)
        assert len(found) <= 6
        return str(len(found)), set(found)

    def where(self, the: str) -> Answer:
        number = self.one(the)
        return self._where(number), {number}

    def _where(self, number: int) -> str:
        thing, third = self.things[number], self.scene.grid / 3
        names = []
        for at, (low, high) in ((thing.y, ("top", "bottom")), (thing.x, ("left", "right"))):
            assert abs(at - third) >= 0.35 and abs(at - 2 * third) >= 0.35, "on a border"
            names.append(low if at < third else high if at > 2 * third else "")
        return " ".join(filter(None, names)) or "middle"

    def cell(self, the: str) -> Answer:
        number = self.one(the)
        thing, side = self.things[number], self.scene.grid / 8
        for at in (thing.x, thing.y):
            assert all(abs(at - border * side) >= 0.2 for border in range(1, 8)), "on a border"
        return f"{'abcdefgh'[int(thing.x // side)]} {int(thing.y // side) + 1}", {number}

    def relation(self, the: str, relation: str, other: str) -> Answer:
        one, two = self.one(the), self.one(other)
        right, down = self.things[one].x - self.things[two].x, self.things[one].y - self.things[two].y
        by = {"left": -right, "right": right, "above": -down, "higher": -down, "below": down, "lower": down}[relation]
        assert abs(by) >= 1
        return "yes" if by > 0 else "no", {one, two}

    def more(self, group: str, others: str) -> Answer:
        ones, twos = self.all(group), self.all(others)
        assert not set(ones) & set(twos) and len(ones) != len(twos)
        return "yes" if len(ones) > len(twos) else "no", {*ones, *twos}

    def which(self, the: str, other: str, comparative: str) -> Answer:
        numbers = self.one(the), self.one(other)
        one, two = (self.things[number] for number in numbers)
        assert one.shape != two.shape and "sign" not in (one.shape, two.shape)
        if comparative in ("bigger", "smaller"):
            assert one.size != two.size
            first = (one.width > two.width) == (comparative == "bigger")
        else:
            assert abs(one.y - two.y) >= 1
            first = (one.y < two.y) == (comparative == "higher")
        return (one if first else two).shape, set(numbers)

    def odd(self, attribute: str, group: str) -> Answer:
        numbers = self.all(group)
        values = [self._value(number, attribute) for number in numbers]
        (odd,) = [value for value in values if values.count(value) == 1]
        assert len(values) >= 3 and len(set(values)) == 2
        return odd, set(numbers)

    def read(self, the: str) -> Answer:
        side = the.removesuffix(" sign")
        if side in ("leftmost", "rightmost", "highest", "lowest"):
            signs = [number for number, thing in enumerate(self.things) if thing.shape == "sign"]
            out = 1 if side in ("leftmost", "highest") else -1
            at = {n: out * (self.things[n].x if side.endswith("most") else self.things[n].y) for n in signs}
            number = min(signs, key=at.__getitem__)
            assert len(signs) > 1 and all(at[other] - at[number] >= 1 for other in signs if other != number)
        else:
            number = self.one(the)
        assert self.things[number].shape == "sign"
        return self.things[number].text, {number}

    def caption(self) -> Answer:
        large = [number for number, thing in enumerate(self.things) if thing.size == "large" and thing.shape != "sign"]
        large.sort(key=lambda number: (int(self.things[number].y), int(self.things[number].x)))
        assert 1 <= len(large) <= 4
        return " , ".join(f"{self.things[n].colour} {self.things[n].shape}" for n in large), set(large)

    def same(self, attribute: str, link: str, the: str) -> Answer:
        one = self.one(the)
        if link in ("letter", "number"):
            value, link = self._symbol(one, link), "text"
        else:
            value = getattr(self.things[one], link)
        assert link not in wanted(the) and value != "plain"
        (other,) = [n for n, thing in enumerate(self.things) if getattr(thing, link) == value and n != one]
        return self._value(other, attribute), {one, other}

    def near(self, attribute: str, side: str, the: str) -> Answer:
        one = self.one(the)
        here, ahead = self.things[one], []
        for number, thing in enumerate(self.things):
            right, down = thing.x - here.x, thing.y - here.y
            if side in ("above", "below"):
                right, down = down, right
            along = -right if side in ("left", "above") else right
            if 0 < along <= 4 and abs(down) <= 1.6:
                ahead.append((number, along, abs(down)))
        ((other, along, across),) = ahead
        assert 1 <= along <= 3 and across <= 1 and across <= along / 2
        return self._value(other, attribute), {one, other}

    def it_attribute(self, attribute: str) -> Answer:
        assert self.it is not None
        return self._value(self.it, attribute), {self.it}

    def it_symbol(self, symbol: str) -> Answer:
        assert self.it is not None
        return self._symbol(self.it, symbol), {self.it}

    def it_where(self) -> Answer:
        assert self.it is not None
        return self._where(self.it), {self.it}

    def both(self, a: str) -> Answer:
        ones, twos = self._in_both(a)
        return "yes" if ones and twos else "no", self._across(ones, twos)

    def which_picture(self, group: str) -> Answer:
        ones, twos = self._in_both(group)
        assert ones or twos
        more = len(ones) - len(twos)
        return "first" if more > 0 else "second" if more < 0 else "same", self._across(ones, twos)

    def alike(self, attribute: str, the: str) -> Answer:
        assert self.second is not None
        one, two = self.one(the), self.one(the, self.second.things)
        values = getattr(self.things[one], attribute), getattr(self.second.things[two], attribute)
        return "yes" if values[0] == values[1] else "no", self._across([one], [two])

    def _in_both(self, phrase: str) -> tuple[list[int], list[int]]:
        assert self.second is not None
        return self.all(phrase), self.all(phrase, self.second.things)

    def _across(self, ones: list[int], twos: list[int]) -> set[int]:
        return {*ones, *(len(self.things) + number for number in twos)}


_SLOTS = {
    "attribute": "colour|shape|pattern|size",
    "link": "colour|shape|pattern|letter|number",
    "symbol": "letter|number",
    "side": "left|right|above|below",
    "relation": "left|right|above|below|higher|lower",
    "comparative": "bigger|smaller|higher|lower",
}


def _pattern(wording: str) -> str:
    """A wording as a regular expression: ``<the>`` is a slot of that name."""
    return re.sub("<(.+?)>", lambda slot: f"(?P<{slot[1]}>{_SLOTS.get(slot[1], '.+?')})", wording)


# Each method with what it reads, the more particular wordings first.
_WORDINGS: list[tuple[Callable[..., Answer], str]] = [
    (Reader.both, "do both pictures have an? <a>"),
    (Reader.both, "(is there|can you see) an? <a> in both pictures"),
    (Reader.which_picture, "(which picture|which of the two pictures) has more <group>"),
    (Reader.which_picture, "in which picture are there more <group>"),
    (Reader.alike, "does the <the> have the same <attribute> in both pictures"),
    (Reader.alike, "is the <the> in both pictures of the same <attribute>"),
    (Reader.alike, "is the <attribute> of the <the> the same in both pictures"),
    (Reader.it_attribute, "what <attribute> (is it|does it have)"),
    (Reader.it_attribute, "(and what|name its) <attribute>"),
    (Reader.it_symbol, "which <symbol> is on it"),
    (Reader.it_symbol, "and which <symbol>"),
    (Reader.it_symbol, "what <symbol> is written on it"),
    (Reader.it_where, "where is it|and where|in which part of the picture is it"),
    (Reader.same, "what <attribute> is the other thing with the same <link> as the <the>"),
    (Reader.same, "(what is|name) the <attribute> of the other thing (with|that has) the same <link> as the <the>"),
    (Reader.near, "what <attribute> is the thing directly (to the )?<side>( of)? the <the>"),
    (Reader.near, "(what is|name) the <attribute> of the thing (that is )?directly (to the )?<side>( of)? the <the>"),
    (Reader.odd, "(what is|name) the odd <attribute> among the <group>"),
    (Reader.odd, "which <attribute> is the odd one out among the <group>"),
    (Reader.caption, "(name|list|what are) the large shapes|which large shapes are there"),
    (Reader.which, "is the <the> or the <other> <comparative>"),
    (Reader.which, "which of the <the> and the <other> is <comparative>"),
    (Reader.which, "name the <comparative> one of the <the> and the <other>"),
    (Reader.more, "are there more <group> than <others>"),
    (Reader.more, "(do you see|does the picture have) more <group> than <others>"),
    (Reader.relation, "(is|is it true that) the <the> (is )?(to the )?<relation>( of| than)? the <other>"),
    (Reader.relation, "does the <the> lie (to the )?<relation>( of| than)? the <other>"),
    (Reader.cell, "(in which cell is|which cell holds|give the cell of) the <the>"),
    (Reader.where, "(where is|in which part of the picture is|what is the position of) the <the>"),
    (Reader.count, "how many <group> (are there|do you see)"),
    (Reader.count, "count the <group>"),
    (Reader.symbol, "(which|what) <symbol> is (written )?on the <the>"),
    (Reader.symbol, "read the <symbol> on the <the>"),
    (Reader.read, "what does the <the> say"),
    (Reader.read, "(what is written on|read) the <the>"),
    (Reader.exists, "(is there|can you see|does the picture show) an? <a>"),
    (Reader.attribute, "what <attribute> is the <the>"),
    (Reader.attribute, "(what is|name) the <attribute> of the <the>"),
    (Reader.attribute, "what <attribute> does the <the> have"),
]
RULES = [(re.compile(_pattern(wording)), method) for method, wording in _WORDINGS]
