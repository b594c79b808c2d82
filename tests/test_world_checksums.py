"""The same seed makes the same bytes everywhere: scenes, pictures and questions against the published checksums."""

import world_checksums

from adaptinfer.embedded.world.things import SPLITS


def test_this_machine_makes_the_published_world() -> None:
    computed, published = world_checksums.compute(), world_checksums.published()
    assert computed == published, "the world changed: raise VERSION and run python tests/world_checksums.py --write"


def test_every_split_has_a_checksum_of_each_part() -> None:
    published = world_checksums.published()
    sums = [published[split] for split in SPLITS]
    assert published.keys() == set(SPLITS)
    assert all(part.keys() == {"scenes", "pictures", "questions"} for part in sums)
    assert len({total for part in sums for total in part.values()}) == 9
