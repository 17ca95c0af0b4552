"""The weight a module really applies, adapters included, and the pre-trained one behind it."""

from __future__ import annotations

from dora_dynamics.effective.factors import built as built
from dora_dynamics.effective.peft_layers import acting_layer as acting_layer
from dora_dynamics.effective.quantized import dequantized as dequantized
from dora_dynamics.effective.quantized import is_quantized as is_quantized
from dora_dynamics.effective.quantized import quantization_of as quantization_of
from dora_dynamics.effective.quantized import register_dequantizer as register_dequantizer
from dora_dynamics.effective.reading import at_a_glance as at_a_glance
from dora_dynamics.effective.reading import base_weight as base_weight
from dora_dynamics.effective.reading import by_factors as by_factors
from dora_dynamics.effective.reading import dense_weight as dense_weight
from dora_dynamics.effective.reading import effective_weight as effective_weight
from dora_dynamics.effective.reading import is_merged as is_merged
from dora_dynamics.effective.reading import magnitude_parameter as magnitude_parameter
from dora_dynamics.effective.reading import method_of as method_of
from dora_dynamics.effective.reading import quantization_below as quantization_below
from dora_dynamics.effective.reading import read_dense as read_dense
from dora_dynamics.effective.reading import read_effective as read_effective
from dora_dynamics.effective.reading import stored_parameter as stored_parameter
from dora_dynamics.effective.reading import version_of as version_of
from dora_dynamics.effective.registry import (
    register_effective_weight as register_effective_weight,
)
from dora_dynamics.effective.weights import Check as Check
from dora_dynamics.effective.weights import Dense as Dense
from dora_dynamics.effective.weights import EffectiveWeight as EffectiveWeight
from dora_dynamics.effective.weights import LowRank as LowRank
from dora_dynamics.effective.weights import NoDenseWeightError as NoDenseWeightError
