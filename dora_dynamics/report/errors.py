"""What can be wrong with a report that was asked for."""

from __future__ import annotations

from dora_dynamics.errors import InputError


class ReportError(InputError):
    """A report cannot be written; the message says why and what to do."""
