"""Recording by many: Ray actors, or the processes that ``accelerate launch`` or ``torchrun`` started.

Which samples make a part, and what each reading is, does not depend on who reads it; so the recording is the same as
one process makes, byte for byte on machines of one kind with as many threads. Ray's actors send their parts back and
need no common disk; an actor that dies is started again, and its part is read anew.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptinfer.calibration.record import Reader
from adaptinfer.calibration.run import Target, check_reach, content_of, record
from adaptinfer.calibration.samples import Source
from adaptinfer.calibration.sources import open_source
from adaptinfer.calibration.store import Recording, check_skipped, digest_of, record_part
from adaptinfer.checkpoints import Checkpoint, DType
from adaptinfer.errors import InputError
from adaptinfer.pruners.contracts import Pruner
from adaptinfer.schedule import ModelShape

_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Job:
    """What to record, in words that another process understands.

    Attributes:
        model: as `Checkpoint` takes it.
        data: as `open_source` takes it.
        folder: for the recording.
        count: samples; a source with fewer gives all that it has.
        method: whose scores.
        seed: which scenes.
        device: as `Checkpoint` takes it.
        dtype: likewise.
        trust_remote_code: likewise.
    """

    model: str
    data: str
    folder: Path
    count: int
    method: Pruner
    seed: int = 0
    device: str = "auto"
    dtype: DType = "auto"
    trust_remote_code: bool = False

    def source(self) -> Source:
        """The samples. Raises InputError if there are none of that name."""
        return open_source(self.data, self.seed)

    @contextmanager
    def opened(self) -> Iterator[Reader]:
        """A reader of the loaded model. Raises InputError, UnsupportedError."""
        checkpoint = Checkpoint(
            self.model, device=self.device, dtype=self.dtype, trust_remote_code=self.trust_remote_code
        )
        processor = checkpoint.processor
        with Reader(checkpoint.load(), processor, self.method) as reader:
            yield reader


def processes() -> tuple[int, int]:
    """(this process's number, how many) as the launcher says; (0, 1) without one. Raises InputError for nonsense."""
    told = []
    for name, alone in (("RANK", "0"), ("WORLD_SIZE", "1")):
        value = os.environ.get(name, alone)
        if not value.isdecimal():
            raise InputError(f"environment: {name} must be a whole number, as launchers set it, not {value!r}")
        told.append(int(value))
    return told[0], told[1]


def record_alone(
    job: Job, progress: Callable[[str], None], budget: Target | None = None
) -> tuple[Recording, ModelShape]:
    """Record in this process, or this process's share of the parts; the first process then waits for the others.

    Args:
        job: what to record.
        progress: told in a few words what is going on.
        budget: refused before anything is read, if the first samples show that no schedule meets it.

    Raises:
        InputError: a sample or folder that cannot be used, see `record`.
        ScheduleError: the budget is out of reach.
    """
    source, (number, share) = job.source(), processes()
    count = min(job.count, len(source))
    progress(f"loading {job.model}")
    with job.opened() as reader:
        recording = Recording(job.folder, content_of(reader, job.model, source))
        if budget is not None and recording.missing(count):
            check_reach(reader, source, count, budget)
        record(reader, source, recording, count, progress, (number, share))
        while number == 0 and (missing := len(recording.missing(count))):
            progress(f"waiting for other processes, {missing} parts are missing")
            time.sleep(_POLL_SECONDS)  # if one of them dies, the launcher ends all
        return recording, reader.shape


def record_with_ray(job: Job, actors: int, progress: Callable[[str], None]) -> tuple[Recording, ModelShape]:
    """Record in Ray Data actors, one model each; each takes a GPU if the cluster has any.

    Raises:
        InputError: without the extra ``ray``, or as `record`.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports]
        import ray.data  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError("--ray needs the extra: pip install 'adaptinfer[ray]'") from None
    source = job.source()
    count = min(job.count, len(source))
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False, logging_level="ERROR")
    gpus = int(job.device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0)
    progress("starting Ray")
    describe = ray.remote(num_cpus=1, num_gpus=gpus)(_describe)
    content, shape = ray.get(describe.remote(job))
    recording = Recording(job.folder, content)
    recording.check_pictures(source, count)
    missing, skipped = [*recording.missing(count), *recording.with_skips(count)], []
    if missing:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        rows = [{"start": part.start, "stop": part.stop} for part in missing]
        parts = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            _Actor,  # pyright: ignore
            fn_constructor_args=(job, digest_of(content)),
            compute=ray.data.ActorPoolStrategy(size=min(actors, len(rows))),
            num_cpus=1,
            num_gpus=gpus,
        )
        for number, row in enumerate(parts.iter_rows(), 1):
            part = range(row["start"], row["stop"])
            recording.write(part, row["data"])
            skipped += recording.skipped_in(part)
            check_skipped(skipped, count)
            progress(f"read {number} of {len(missing)} parts")
    return recording, shape


class _Actor:
    """A model in a process of its own; reads one part a call."""

    def __init__(self, job: Job, digest: str) -> None:
        self._opened = job.opened()
        self._reader, self._source, self._digest = self._opened.__enter__(), job.source(), digest

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        part = range(row["start"], row["stop"])
        return {**row, "data": record_part(self._reader, self._source, part, self._digest)}


def _describe(job: Job) -> tuple[dict[str, Any], ModelShape]:
    with job.opened() as reader:
        return content_of(reader, job.model, job.source()), reader.shape
