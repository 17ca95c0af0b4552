"""Coupling of ΔM and ΔD at each level of pooling, with intervals and p-values."""

from dora_dynamics.statistics.coupling_table import CheckpointKind as CheckpointKind
from dora_dynamics.statistics.coupling_table import Interval as Interval
from dora_dynamics.statistics.coupling_table import Level as Level
from dora_dynamics.statistics.coupling_table import coupling as coupling
from dora_dynamics.statistics.coupling_table import layer_codes as layer_codes
from dora_dynamics.statistics.coupling_table import panel as panel
from dora_dynamics.statistics.coupling_table import select_checkpoints as select_checkpoints
