"""Where a method stands between LoRA and full fine-tuning, on what evidence, and how surely."""

from dora_dynamics.diagnosis.diagnosing import diagnose
from dora_dynamics.diagnosis.result import Diagnosis

__all__ = ["Diagnosis", "diagnose"]
