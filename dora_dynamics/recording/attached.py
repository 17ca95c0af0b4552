"""The context in which a recorder watches an optimizer."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol, TypeVar

from dora_dynamics.recording.troubles import warn_user

if TYPE_CHECKING:
    from types import TracebackType

    from torch.optim import Optimizer


class Watching(Protocol):
    """A recorder, as far as the context goes."""

    def start(self, *optimizers: Optimizer) -> None:
        """Begin, at the present step."""

    def finish(self) -> None:
        """Let go, and record the last step."""

    def give_up(self) -> None:
        """The same where the training failed."""


R = TypeVar("R", bound=Watching)


class Attached(AbstractContextManager[R]):
    """What `Recorder.attach` returns: nothing is recorded before it is entered."""

    def __init__(self, recorder: R, optimizer: Optimizer) -> None:
        """To watch `optimizer` with `recorder`."""
        self._recorder = recorder
        self._optimizer = optimizer
        self._was_entered = False

    def __enter__(self) -> R:
        """Begin, at the present step."""
        self._was_entered = True
        self._recorder.start(self._optimizer)
        return self._recorder

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Let go of the optimizer and record the last step."""
        if kind is None:
            self._recorder.finish()
        else:
            self._recorder.give_up()

    def __del__(self) -> None:
        """Warn where it was never entered, as a call without `with` leaves it."""
        if not self._was_entered and not sys.is_finalizing():
            warn_user(
                "attach alone records nothing: write `with recorder.attach(optimizer):` around the "
                "training loop."
            )
