"""How fine-tuning changes weights: the magnitude and direction analysis of the DoRA paper.

The public names are loaded when they are first used, so that importing the package (and asking
the command line for help) costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dora_dynamics import plotting as plotting
    from dora_dynamics.adapters import apply_dora as apply_dora
    from dora_dynamics.adapters import apply_lora as apply_lora
    from dora_dynamics.adapters import merge as merge
    from dora_dynamics.checkpoints import compare_checkpoints as compare_checkpoints
    from dora_dynamics.decomposition import UnitChange as UnitChange
    from dora_dynamics.decomposition import WeightChange as WeightChange
    from dora_dynamics.decomposition import direction as direction
    from dora_dynamics.decomposition import low_rank_change as low_rank_change
    from dora_dynamics.decomposition import magnitude as magnitude
    from dora_dynamics.decomposition import weight_change as weight_change
    from dora_dynamics.diagnosis import Diagnosis as Diagnosis
    from dora_dynamics.diagnosis import diagnose as diagnose
    from dora_dynamics.effective import effective_weight as effective_weight
    from dora_dynamics.effective import register_dequantizer as register_dequantizer
    from dora_dynamics.effective import register_effective_weight as register_effective_weight
    from dora_dynamics.recorder import Recorder as Recorder
    from dora_dynamics.recording.baseline_source import capture_baseline as capture_baseline
    from dora_dynamics.report import write_report as write_report
    from dora_dynamics.runs.directory import load_runs as load_runs
    from dora_dynamics.runs.snapshots import load_units as load_units
    from dora_dynamics.runs.snapshots import remeasure as remeasure
    from dora_dynamics.sites import register_linear as register_linear
    from dora_dynamics.statistics import coupling as coupling
    from dora_dynamics.statistics import select_checkpoints as select_checkpoints

__version__ = "0.1.0"

_HOME = {
    "Diagnosis": "diagnosis",
    "Recorder": "recorder",
    "UnitChange": "decomposition",
    "WeightChange": "decomposition",
    "apply_dora": "adapters",
    "apply_lora": "adapters",
    "capture_baseline": "recording.baseline_source",
    "compare_checkpoints": "checkpoints",
    "coupling": "statistics",
    "diagnose": "diagnosis",
    "direction": "decomposition",
    "effective_weight": "effective",
    "load_runs": "runs.directory",
    "load_units": "runs.snapshots",
    "low_rank_change": "decomposition",
    "magnitude": "decomposition",
    "merge": "adapters",
    "register_dequantizer": "effective",
    "register_effective_weight": "effective",
    "register_linear": "sites",
    "remeasure": "runs.snapshots",
    "select_checkpoints": "statistics",
    "weight_change": "decomposition",
    "write_report": "report",
}

__all__ = [*_HOME, "__version__", "plotting"]


def __getattr__(name: str) -> object:
    if name == "plotting":
        return import_module("dora_dynamics.plotting")
    if name not in _HOME:
        raise AttributeError(f"module 'dora_dynamics' has no attribute {name!r}")
    return getattr(import_module(f"dora_dynamics.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
