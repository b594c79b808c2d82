"""The handle on an attached model."""

from __future__ import annotations

from typing import Any

from adaptinfer.engine.attachment import Attachment
from adaptinfer.engine.cache.checks import check_cache_kind
from adaptinfer.engine.calls import Calls
from adaptinfer.engine.entry import DecoderRunner, Entry
from adaptinfer.engine.families import attention_of, family_of
from adaptinfer.engine.guards import check_needs, check_positions
from adaptinfer.engine.hooks import DecoderHooks
from adaptinfer.engine.parallel import Ranks
from adaptinfer.engine.patches import Patches
from adaptinfer.engine.planner import Planner
from adaptinfer.engine.report import Report
from adaptinfer.engine.reporter import Reporter
from adaptinfer.engine.vision.recorder import Recorder
from adaptinfer.errors import AdaptInferError
from adaptinfer.pruners.contracts import Pruner
from adaptinfer.schedule import ModelShape, Schedule

_HANDLE = "_adaptinfer_handle"


class Handle:
    """A pruner on a model. Made by `attach`; a context manager that detaches.

    Attributes:
        pruner: what chooses.
        early_drop: whether pruning layers skip the outputs of tokens that they drop.
    """

    def __init__(self, model: Any, pruner: Pruner, early_drop: bool) -> None:
        if is_attached(model):
            raise AdaptInferError("a pruner is attached to this model already; call its handle's detach() first")
        if not isinstance(pruner, Pruner):
            raise AdaptInferError(f"pruner: must be a pruner such as AdaptInfer(budget=64), not {pruner!r}")
        layers = getattr(model.get_decoder(), "layers", ()) if hasattr(model, "get_decoder") else ()
        if any(hasattr(module.config, "adaptinfer_original") for module in filter(None, map(attention_of, layers))):
            raise AdaptInferError(
                "a pruner is attached to a part of this model already; call its handle's detach() first"
            )
        family = family_of(model)
        check_cache_kind(model)
        check_positions(family, pruner)
        check_needs(family, pruner)
        shape = ModelShape.from_config(model.config)
        self.pruner = pruner
        can = pruner.capabilities
        self.early_drop = early_drop and not can.acts_after  # which needs the outputs of all tokens
        self._model_type = family.model_type
        self._attachment: Attachment | None = Attachment(
            model=model,
            base=model.base_model,
            decoder=model.get_decoder(),
            family=family,
            pruner=pruner,
            ranks=Ranks(model),
            early_drop=self.early_drop,
            calls=Calls(),
        )
        self._calls = self._attachment.calls
        recorder = Recorder(model.base_model, model.config, can.reads, can.merging) if can.before else None
        self._planner = Planner(pruner, family, shape.num_layers)
        self._reporter = Reporter(shape, self._planner, self.early_drop, can.varies)
        self._patches = Patches()
        hooks = DecoderHooks(self._attachment, self._patches)
        self._entry: Entry | None = Entry(self._attachment, self._planner, hooks, recorder, self._reporter)
        self._runs_decoder = False
        hooks.install()
        self._entry.install(self._patches)
        vars(model)[_HANDLE] = self

    def __repr__(self) -> str:
        state = "detached" if self._attachment is None else "attached"
        return f"<Handle: {self.pruner!r} {state}, {self._model_type}, early_drop={self.early_drop}>"

    @property
    def report(self) -> Report | None:
        """The last prefill of this thread or, if it ran none, of any thread; None before the first.

        Read it in the thread that generates.
        """
        return self._reporter.report

    def plan(self, vision_tokens: int) -> Schedule:
        """The schedule for a prompt with that many vision tokens.

        Raises:
            ScheduleError: the budget cannot be met for such a prompt.
        """
        return self._planner.plan(vision_tokens)

    def detach(self) -> None:
        """Leave the model exactly as it was before `attach`, and let go of it. Doing it twice is harmless.

        Raises:
            AdaptInferError: a call of the model is running, here or in another thread; its later layers would be wrong.
        """
        if not self._calls.end():
            return
        self._patches.undo()
        attachment, entry = self.attachment, self._entry
        del vars(attachment.model)[_HANDLE]
        self._attachment = self._entry = None
        if entry is not None and entry.runner is not None:
            entry.runner.clear()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    # -- for other parts of the package -----------------------------------------------------------------------------

    @property
    def attachment(self) -> Attachment:
        """The model, its parts and its calls.

        Raises:
            AdaptInferError: the handle was detached.
        """
        if self._attachment is None:
            raise AdaptInferError("this handle was detached from its model")
        return self._attachment

    def run_decoder_by(self, runner: DecoderRunner) -> None:
        """Run the decoder through a runner from now on; one that did so before is cleared."""
        decoder, entry = self.attachment.decoder, self._entry
        assert entry is not None
        before, entry.runner = entry.runner, runner
        if before is not None:
            before.clear()
        if not self._runs_decoder:
            self._runs_decoder = True
            self._patches.override(decoder, "forward", entry.through_runner(decoder.forward))

    def stop_running_by(self, runner: DecoderRunner) -> None:
        """Run the decoder through this runner no longer; another stays in use."""
        if self._entry is not None and self._entry.runner is runner:
            self._entry.runner = None


def handle_of(model: Any) -> Handle:
    """The handle on a model.

    Raises:
        AdaptInferError: no pruner is attached to the model.
    """
    if not is_attached(model):
        raise AdaptInferError("no pruner is attached to this model; call adaptinfer.attach(model, pruner) first")
    return vars(model)[_HANDLE]


def is_attached(model: Any) -> bool:
    """Whether a pruner is attached to a model."""
    return _HANDLE in getattr(model, "__dict__", {})
