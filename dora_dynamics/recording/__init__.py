"""What a recorder works with: it measures steps, writes their rows, and watches the optimizers."""

from __future__ import annotations

from dora_dynamics.recording.recording import Recording as Recording
from dora_dynamics.recording.taking import Taking as Taking
from dora_dynamics.recording.watch import Watch as Watch
