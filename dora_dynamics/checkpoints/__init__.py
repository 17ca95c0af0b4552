"""The same rows as the recorder's from checkpoints on disk, tensor by tensor."""

from __future__ import annotations

from dora_dynamics.checkpoints.compare import compare_checkpoints as compare_checkpoints
from dora_dynamics.checkpoints.errors import CheckpointError as CheckpointError
