"""Everything that decides what comes out of a training run."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Practice:
    """Phase 3: more steps, at lower rates, of what phase 2 leaves half learnt.

    Attributes:
        steps, easy, rate, muon_rate, decay: as of :class:`Config`.
        drilled: until this step some conversations are dense drills, :func:`lessons.drill`.
    """

    steps: int
    drilled: int
    easy: tuple[tuple[int, int], ...]
    rate: float = 5e-4
    muon_rate: float = 1e-3
    decay: float = 0.5


@dataclass(frozen=True)
class Config:
    """Sizes, data and schedule of one run.

    Attributes:
        grid: patches along each side of a picture; grid x grid vision tokens.
        patch: pixels along each side of a patch.
        tower: hidden size, layers and heads of the vision tower. The layer before the last gives the features, as in
            LLaVA; the last one serves caption matching.
        decoder: hidden size, MLP size, layers and heads of the language model.
        tower_steps, tower_batch: phase 1, in pictures.
        tower_rate, tower_muon_rate: its learning rates, as ``rate`` and ``muon_rate``.
        match_weight: weight of caption matching beside the dense per-patch targets.
        align_steps: LLaVA's feature alignment, projector and word embeddings only.
        steps: phase 2, ``batch`` conversations of ``turns`` questions each.
        basics: until this step only kinds that look up one thing are asked, :data:`data.BASICS`.
        described: until this step pictures are described in full instead, :func:`lessons.describe_all`, and sometimes
            until ``basics``.
        crowd: (until this step, things in a scene at most): finding the thing that is meant is learnt among few.
        easy: (until this step, vision tokens shown): at first the language model is shown things and little else.
        rate: AdamW's learning rate, for projector, embeddings, norms and head.
        muon_rate: Muon's, for the decoder layers' matrices.
        decay: the share of the steps, at the end, over which the learning rates fall to zero.
        evaluate_every: steps between two looks at ``held_out`` validation scenes, and between two saves.
        practice: phase 3.
        drilled: of phase 3, see there; phase 2 has none.
    """

    grid: int
    patch: int
    tower: tuple[int, int, int]
    decoder: tuple[int, int, int, int]
    tower_steps: int
    tower_batch: int
    steps: int
    batch: int
    basics: int
    described: int
    crowd: tuple[tuple[int, int], ...]
    easy: tuple[tuple[int, int], ...]
    held_out: int
    evaluate_every: int
    practice: Practice
    drilled: int = 0
    seed: int = 0
    tower_rate: float = 2e-3
    tower_muon_rate: float = 3e-3
    match_weight: float = 0.2
    align_steps: int = 300
    turns: int = 8
    rate: float = 1e-3
    muon_rate: float = 2e-3
    warmup: int = 100
    decay: float = 0.4
    weight_decay: float = 0.01
    clip: float = 1.0

    @property
    def tokens(self) -> int:
        """Vision tokens of a picture."""
        return self.grid * self.grid

    def practising(self) -> Config:
        """This run in phase 3: all kinds from the start, on other scenes."""
        practice = self.practice
        return replace(
            self,
            steps=practice.steps,
            drilled=practice.drilled,
            easy=practice.easy,
            rate=practice.rate,
            muon_rate=practice.muon_rate,
            decay=practice.decay,
            basics=0,
            described=0,
            crowd=(),
            seed=self.seed + 1,
        )

    @property
    def side(self) -> int:
        """Pixels along each side of a picture."""
        return self.grid * self.patch


PRESETS: dict[str, Config] = {
    # Seconds: shows that every part works.
    "toy": Config(
        grid=12,
        patch=12,
        tower=(64, 3, 4),
        decoder=(64, 128, 4, 4),
        tower_steps=20,
        tower_batch=16,
        align_steps=20,
        steps=20,
        batch=4,
        turns=4,
        basics=5,
        described=4,
        crowd=((5, 2),),
        easy=((10, 24),),
        held_out=8,
        evaluate_every=10,
        practice=Practice(steps=10, drilled=8, easy=((6, 24),)),
    ),
    # Hours on two cores.
    "cpu": Config(
        grid=16,
        patch=12,
        tower=(128, 4, 4),
        decoder=(192, 512, 12, 4),
        tower_steps=2600,
        tower_batch=64,
        align_steps=500,
        steps=2800,
        batch=32,
        basics=800,
        described=500,
        crowd=((100, 3), (250, 8)),
        easy=((1900, 16), (2400, 64)),
        held_out=200,
        evaluate_every=100,
        practice=Practice(steps=3600, drilled=2700, easy=((2700, 16), (3200, 64))),
    ),
    # For one data-centre GPU; half an hour is expected, never measured.
    "full": Config(
        grid=24,
        patch=14,
        tower=(192, 6, 6),
        decoder=(256, 704, 16, 4),
        tower_steps=4000,
        tower_batch=256,
        steps=7000,
        batch=64,
        turns=10,
        basics=1000,
        described=600,
        crowd=((100, 3), (250, 8)),
        easy=((1500, 16), (3000, 96), (5000, 256)),
        held_out=500,
        evaluate_every=250,
        practice=Practice(steps=4000, drilled=3000, easy=((1500, 96), (2500, 256))),
    ),
}
