"""The weights of a live model that can be followed, with what its modules say about them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, cast

from torch import nn

from dora_dynamics.sites.blocks import Heads, heads_of
from dora_dynamics.sites.catalogue import Weight, expert_weight, sub_config, whole_weight
from dora_dynamics.sites.names import clean_name, role_of, stack_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

_EXPERT_PARAMETERS: Final = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
_CONVOLUTIONS: Final = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_DATA_PARALLEL: Final = frozenset({"DistributedDataParallel", "DataParallel"})
_QUERY_HEADS: Final = ("num_attention_heads", "num_heads", "n_heads", "n_head", "heads")
_KEY_VALUE_HEADS: Final = ("num_key_value_heads", "num_kv_heads")

CODES: Final = frozenset({"qweight", "W_q"})
"""Names that the codes of a packed linear layer go by: of GPTQ and AWQ, and of HQQ."""

_BELOW: Final = frozenset({"base_layer", "original_module"})
"""Names of what PEFT puts an adapter on."""

_linear_classes: list[type[nn.Module]] = []


def register_linear(cls: type[nn.Module]) -> type[nn.Module]:
    """Follow modules of this class as linear layers, and nothing inside them; a class decorator.

    For a layer that is no `nn.Linear` and shall be one site all the same: an adapter that wraps
    the layer it adapts, say. Its weight is (out, in).
    """
    if cls not in _linear_classes:
        _linear_classes.append(cls)
    return cls


def list_weights(model: nn.Module) -> Iterator[Weight]:
    """Every weight of `model` that can be followed, in the model's own order."""
    configs: dict[str, Mapping[str, Any]] = {}
    covered: list[str] = []
    for path, module in model.named_modules():
        parent = path.rpartition(".")[0]
        configs[path] = _config(module) or configs.get(parent, {})
        if any(path.startswith(prefix) for prefix in covered):
            continue
        if _is_parametrization(path):
            continue
        inner = _adapted(module)
        if inner is not module or isinstance(module, tuple(_linear_classes)):
            covered.append(f"{path}." if path else "")
        yield from _weights_of(model, path, module, inner, configs[path])


def tensor_names(model: nn.Module) -> list[list[str]]:
    """The names of each tensor that has several, as `Site.tensor` has them, in the model's order.

    Weights are tied where modules hold one and the same parameter; a module that is used in
    several places has all their names. Where an adapter stands on a tied weight, what the module
    applies is its own, and so are its names.
    """
    found: dict[object, dict[str, None]] = defaultdict(dict)
    for path, module in _all_places(model):
        if _is_parametrization(path) or not _BELOW.isdisjoint(path.split(".")):
            continue
        inner, clean = _adapted(module), _clean(model, path)
        parametrized: Any = getattr(inner, "parametrizations", None) or ()
        for name in (*inner._parameters, *parametrized):
            tensor = inner._parameters.get(name)
            if tensor is None and name not in parametrized:
                continue
            is_plain = inner is module and tensor is not None
            key = id(tensor) if is_plain else (id(module), name)
            full = clean if name == "weight" else f"{clean}.{name}" if clean else name
            found[key][full] = None
    return [list(names) for names in found.values() if len(names) > 1]


def _all_places(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module under each of its paths."""
    try:
        return list(model.named_modules(remove_duplicate=False))
    except RecursionError:  # a module that is below itself
        return list(model.named_modules())


def _weights_of(
    model: nn.Module, path: str, module: nn.Module, inner: nn.Module, config: Mapping[str, Any]
) -> Iterator[Weight]:
    name = _clean(model, path)
    if is_linear(inner):
        transposed = _is_conv1d(inner)
        shape = _linear_shape(inner)
        if shape is not None:
            yield whole_weight(
                name, "weight", "matrix", shape, config=config,
                heads=_heads(model, path, config, shape[transposed]),
                stored_transposed=transposed, module=path,
            )  # fmt: skip
    elif _is_router(inner):
        yield whole_weight(name, "weight", "matrix", _shape(inner, "weight"), module=path)
    elif isinstance(inner, nn.Embedding):
        yield whole_weight(name, "weight", "embedding", _shape(inner, "weight"), module=path)
    elif isinstance(inner, _CONVOLUTIONS):
        yield whole_weight(name, "weight", "filters", _shape(inner, "weight"), module=path)
    elif isinstance(inner, nn.MultiheadAttention) and inner.in_proj_weight is not None:
        yield whole_weight(
            name, "in_proj_weight", "matrix", _shape(inner, "in_proj_weight"),
            config={"model_type": "torch.MultiheadAttention"},
            heads=Heads(inner.num_heads, inner.num_heads, inner.head_dim), module=path,
        )  # fmt: skip
        if inner is not module:  # what is inside is covered, and this is a layer of its own
            around = "base_layer" if hasattr(module, "base_layer") else "original_module"
            yield whole_weight(
                f"{name}.out_proj", "weight", "matrix", _shape(_adapted(inner.out_proj), "weight"),
                config=config, module=f"{path}.{around}.out_proj",
            )  # fmt: skip
    elif _dimensions(inner, "weight") == 1:
        yield whole_weight(name, "weight", "vector", _shape(inner, "weight"), module=path)
    for parameter in _EXPERT_PARAMETERS:
        if _dimensions(inner, parameter) == 3 and hasattr(inner, "is_transposed"):
            yield expert_weight(
                name, parameter, _shape(inner, parameter),
                stored_transposed=bool(inner.is_transposed),
                gate_first=bool(getattr(inner, "is_concatenated", False)), module=path,
            )  # fmt: skip
    if _dimensions(inner, "bias") == 1:
        yield whole_weight(name, "bias", "vector", _shape(inner, "bias"), module=path)


def is_linear(module: nn.Module) -> bool:
    """Whether it multiplies by one matrix: `nn.Linear`, Conv1D, packed, or of a registered class.

    Packed are the layers of GPTQ, AWQ and HQQ: codes in place of the weight, and both sizes.
    """
    return (
        isinstance(module, nn.Linear)
        or _is_conv1d(module)
        or _is_packed(module)
        or isinstance(module, tuple(_linear_classes))
    )


def _linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """Shape of a linear layer's weight as it would be stored unquantised."""
    rows, columns = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if isinstance(rows, int) and isinstance(columns, int):
        return rows, columns
    shape = _shape(module, "weight")
    return (shape[0], shape[1]) if len(shape) == 2 else None


def _adapted(module: nn.Module) -> nn.Module:
    """The layer below PEFT's tuner layers and copies, which says what kind of weight it is."""
    for _ in range(16):
        below = getattr(module, "base_layer", None)
        if below is None and (
            hasattr(module, "modules_to_save") or hasattr(module, "token_adapter")
        ):
            below = getattr(module, "original_module", None)
        if not isinstance(below, nn.Module):
            return module
        module = below
    return module


def _config(module: nn.Module) -> Mapping[str, Any] | None:
    """The configuration a module carries, as a dictionary."""
    config = getattr(module, "config", None)
    if isinstance(config, Mapping):
        return config
    to_dict = getattr(config, "to_dict", None)
    if not callable(to_dict):
        return None
    content = to_dict()
    return content if isinstance(content, Mapping) else None


def _heads(model: nn.Module, path: str, config: Mapping[str, Any], rows: int) -> Heads:
    """Head counts of the attention around a projection: from the configuration, or its module."""
    stack = stack_of(_clean_path(path))
    known = heads_of(sub_config(config, stack), stack)
    if known.query is not None and known.size is not None:
        return known
    parent = model.get_submodule(path.rpartition(".")[0])
    query = _attribute(parent, _QUERY_HEADS)
    size = _attribute(parent, ("head_dim",))
    if query is not None and size is None:
        size = _query_rows(parent, rows) // query
    key_value = _attribute(parent, _KEY_VALUE_HEADS)
    return Heads(query, query if key_value is None else key_value, size)


def _query_rows(parent: nn.Module, default: int) -> int:
    for name, child in parent.named_children():
        inner = _adapted(child)
        if role_of(name) == "query" and is_linear(inner):
            shape = _linear_shape(inner)
            if shape is not None:
                return shape[1] if _is_conv1d(inner) else shape[0]
    return default


def _attribute(module: nn.Module, names: tuple[str, ...]) -> int | None:
    values = (getattr(module, name, None) for name in names)
    return next((v for v in values if isinstance(v, int) and not isinstance(v, bool)), None)


def _is_router(module: nn.Module) -> bool:
    """A router of a mixture of experts: a bare matrix (experts, features) in its own class."""
    return type(module).__name__.endswith("Router") and _dimensions(module, "weight") == 2


def _is_conv1d(module: nn.Module) -> bool:
    """Transformers' Conv1D, told by its name so that transformers need not be installed."""
    return any(
        cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"
        for cls in type(module).__mro__
    )


def _is_packed(module: nn.Module) -> bool:
    held = module._parameters.keys() | module._buffers.keys()
    return bool(held & CODES) and _linear_shape(module) is not None


def _dimensions(module: nn.Module, name: str) -> int:
    """Dimensions of a parameter (below its parametrization), -1 where there is none."""
    tensor = _stored(module, name)
    return -1 if tensor is None else tensor.ndim


def _shape(module: nn.Module, name: str) -> tuple[int, ...]:
    tensor = _stored(module, name)
    return () if tensor is None else tuple(tensor.shape)


def _stored(module: nn.Module, name: str) -> Tensor | None:
    parameter = module._parameters.get(name)
    if parameter is not None:
        return parameter
    parametrizations = getattr(module, "parametrizations", None)
    if parametrizations is None or name not in parametrizations:
        return None
    return cast("Tensor", parametrizations[name].original)


def _is_parametrization(path: str) -> bool:
    return "parametrizations" in path.split(".")


def _clean(model: nn.Module, path: str) -> str:
    wrapped = model
    while type(wrapped).__name__ in _DATA_PARALLEL and path.partition(".")[0] == "module":
        path, wrapped = path.partition(".")[2], cast("nn.Module", wrapped.module)
    return _clean_path(path)


def _clean_path(path: str) -> str:
    while (clean := clean_name(path)) != path:
        path = clean
    return path
