"""Hooks on the optimizers that train the followed weights, and Λ, which their steps add up to."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from dora_dynamics.recording.decay import TotalDecay
from dora_dynamics.recording.optimizers import (
    classes_with_steps,
    is_inner_step,
    trains_any,
    was_skipped,
)
from dora_dynamics.recording.troubles import warn_user

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch.optim import Optimizer
    from torch.utils.hooks import RemovableHandle

    from dora_dynamics.recording.followed import Followed


class Watch:
    """What a recorder sees of the optimizers: when they step, and how much weight decay they do.

    It holds no reference to the recorder; the optimizers do, while they are watched.
    """

    def __init__(self, followed: Mapping[str, Followed]) -> None:
        """Watch no optimizer yet; the tensors live where `followed` says."""
        self._hooks: list[RemovableHandle] = []
        self._followed = followed
        self.total_decay = dict.fromkeys(followed, 0.0)

    @property
    def is_on(self) -> bool:
        """Whether an optimizer is being watched."""
        return bool(self._hooks)

    @property
    def total_decay(self) -> dict[str, float]:
        """Λ of every followed tensor up to now; NaN where it is not known."""
        return self._decay.totals()

    @total_decay.setter
    def total_decay(self, totals: Mapping[str, float]) -> None:
        self._decay = TotalDecay(totals, self._followed)

    def follow(self, followed: Mapping[str, Followed]) -> None:
        """Look for the tensors where they live now."""
        self._followed = followed
        self.total_decay = self.total_decay

    def look_again(self) -> None:
        """Look up anew which parameters carry the magnitudes, at the next step."""
        self._decay.look_again()

    def check_trains(self, optimizers: Sequence[Optimizer]) -> None:
        """Warn where these optimizers train no parameter of the followed weights."""
        if not trains_any(optimizers, [followed.module for followed in self._followed.values()]):
            warn_user(
                "the optimizer trains no parameter of the followed weights: make it after the "
                "adapters are applied, and check requires_grad. An adapter of your own is "
                "followed in place of the layer inside it if it holds that as `base_layer`."
            )

    def begin(
        self,
        optimizers: Sequence[Optimizer],
        before_step: Callable[[Optimizer], None] | None,
        after_step: Callable[[Optimizer], None],
        when_captured: Callable[[], None],
    ) -> None:
        """Call these before every step of the optimizers, and after every step that was made.

        A step that an optimizer's own step calls is a part of it: `before_step` may come again.

        A step that is captured in a CUDA graph is not made, and nothing may be read meanwhile; when
        it is replayed, nothing is called, so that Λ is not known.
        """

        def captured() -> None:
            self.forget_decay()
            when_captured()

        for optimizer in optimizers:
            self._hooks += _hooked(optimizer, before_step, after_step, captured)

    def end(self) -> None:
        """Let go of the optimizers."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._decay.let_go()

    def add_decay(self, optimizer: Optimizer) -> None:
        """Add the weight decay of the step that an optimizer has just made to Λ.

        Raises:
            Exception: what a foreign optimizer or module raises; Λ is not known from then on.
        """
        try:
            self._decay.add(optimizer)
        except Exception:
            self.forget_decay()
            raise

    def forget_decay(self) -> None:
        """Λ is not known from here on."""
        self.total_decay = dict.fromkeys(self.total_decay, math.nan)


def _hooked(
    optimizer: Optimizer,
    before_step: Callable[[Optimizer], None] | None,
    after_step: Callable[[Optimizer], None],
    when_captured: Callable[[], None],
) -> list[RemovableHandle]:
    """The hooks of one optimizer; a compiler leaves them as they are where it compiles the step."""
    above = classes_with_steps(optimizer)

    def after(optimizer: Optimizer, *_: object) -> None:
        if is_inner_step(optimizer, above):
            return
        if is_being_captured():
            when_captured()
        elif not was_skipped(optimizer):
            after_step(optimizer)

    compiler: Any = torch.compiler
    hooks = [optimizer.register_step_post_hook(compiler.disable(after))]
    if before_step is not None:

        def before(optimizer: Optimizer, *_: object) -> None:
            if not is_being_captured():
                before_step(optimizer)

        hooks.append(optimizer.register_step_pre_hook(compiler.disable(before)))
    return hooks


def is_being_captured() -> bool:
    """Whether what is queued now goes into a CUDA graph instead of being done."""
    cuda: Any = torch.cuda
    return bool(cuda.is_initialized() and cuda.is_current_stream_capturing())
