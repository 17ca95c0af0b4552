"""`dora-dynamics sites`: what of a model would be followed, and what each weight is taken for."""

from __future__ import annotations

import json
from collections import defaultdict
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import click

from dora_dynamics.commands.printing import print_table, say
from dora_dynamics.commands.targets import parse_targets
from dora_dynamics.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from dora_dynamics.sites import Site

_MOST_MODULES: Final = 100_000

_EXAMPLES = """\b
Examples:
  dora-dynamics sites gpt2
  dora-dynamics sites my-model/ --targets query,value
  dora-dynamics sites model.safetensors --targets '*.mlp.*' --all
"""


@click.command(epilog=_EXAMPLES)
@click.argument("model", metavar="MODEL")
@click.option(
    "--targets",
    help="Comma-separated roles (query), ends of module paths (q_proj), globs or /regex/.  "
    "[default: every weight of every kind]",
)
@click.option(
    "--granularity",
    type=click.Choice(["matrix", "head"]),
    default="matrix",
    show_default=True,
    help="Weights and the parts of fused ones, or attention heads.",
)
@click.option("--all", "show_all", is_flag=True, help="One line for each site.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for machines: each site whole.")
def sites(model: str, targets: str | None, granularity: Any, show_all: bool, as_json: bool) -> None:
    """Print what of MODEL would be followed: stack, layer, role, units and axis of each weight.

    MODEL is a folder or file of weights, a folder with just a config.json, or a name on the
    Hugging Face hub. No weight is read: names, shapes and config.json tell, or, where there are
    no weights, the model that transformers builds from config.json without allocating it.
    """
    found, shapes = _find(model, parse_targets(targets), granularity)
    if not found:
        raise InputError(f"{model} holds no weight that can be followed.")
    described = [_describe(site, shapes[site.tensor]) for site in found]
    if as_json:
        click.echo(json.dumps(described, indent=2, ensure_ascii=False))
    elif show_all:
        columns = ["site", "head", "stack", "layer", "role", "units", "unit", "also known as"]
        print_table([line | {"also known as": _others(line)} for line in described], columns)
    else:
        print_table(_by_role(described), list(_by_role(described)[0]))
        for line in described:
            if line["also_known_as"]:
                say(f"{line['site']} is also {_others(line)}.")


def _find(
    model: str, targets: list[Any] | None, granularity: Any
) -> tuple[list[Site], dict[str, tuple[int, ...]]]:
    """The selected sites, and the shape of each tensor by `Site.tensor`."""
    from dora_dynamics.checkpoints.discover import locate
    from dora_dynamics.sites.catalogue import describe_weight, expand
    from dora_dynamics.sites.models import list_weights, tensor_names
    from dora_dynamics.sites.select import select
    from dora_dynamics.sites.tied import once, with_names

    path = locate(model)
    built = _build(path) if _has_only_a_config(path) else None
    if built is not None:
        weights = with_names(list_weights(built), tensor_names(built))
        shapes = {
            site.tensor: tuple(getattr(built.get_submodule(site.module), site.parameter).shape)
            for weight in weights
            for site in weight.wholes
        }
    else:
        from dora_dynamics.checkpoints.catalogue import names_in_contents
        from dora_dynamics.checkpoints.opening import open_checkpoint

        contents = open_checkpoint(path)
        weights, shapes = [], {}
        for name, tensor in contents.tensors.items():
            weight = describe_weight(name, tensor.shape, contents.config)
            if weight is not None:
                weights.append(weight)
                shapes[weight.wholes[0].tensor] = tuple(tensor.shape)
        weights = with_names(weights, names_in_contents(contents))
    if targets is None:
        every = [site for weight in weights for site in expand(weight, granularity)]
        return once(every), shapes
    return once(select(weights, targets, granularity)), shapes


def _has_only_a_config(path: Path) -> bool:
    from dora_dynamics.checkpoints.opening import is_checkpoint

    return path.is_dir() and (path / "config.json").is_file() and not is_checkpoint(path)


def _build(folder: Path) -> Any:
    """The model that a config.json describes, on the meta device: structure without weights."""
    try:
        import transformers
    except ImportError as error:
        raise click.ClickException(
            f"{folder} holds no weights, only a config.json: install transformers to build the "
            "model from it (pip install 'dora-dynamics[hf]')."
        ) from error
    import torch

    from dora_dynamics.checkpoints.errors import first_line
    from dora_dynamics.checkpoints.folder import read_json

    read_json(folder / "config.json")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with _no_more_modules_than(_MOST_MODULES), torch.device("meta"):
            return _model_class(config, transformers)(config)
    except Exception as error:  # a configuration of a stranger can raise anything
        raise InputError(
            f"{folder} holds no weights, and transformers makes no model of its config.json "
            f"({type(error).__name__}: {first_line(error)})."
        ) from error


def _model_class(config: Any, transformers: Any) -> Any:
    """The class of model that a configuration names, if it is one of transformers' own."""
    names = config.architectures if isinstance(config.architectures, list) else []
    for name in names:
        named = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
            return named
    return partial(transformers.AutoModel.from_config, trust_remote_code=False)


@contextmanager
def _no_more_modules_than(most: int) -> Iterator[None]:
    """Stop a model from being built that a typing error, or a stranger, made endless."""
    from torch.nn.modules.module import register_module_module_registration_hook

    count = 0

    def counted(*_: object) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise InputError(f"the model has more than {most:,} modules")

    handle = register_module_module_registration_hook(counted)
    try:
        yield
    finally:
        handle.remove()


def _describe(site: Site, shape: tuple[int, ...]) -> dict[str, Any]:
    rows, features = _rows_and_features(site, shape)
    units = rows if site.rows is None else sum(stop - start for start, stop in site.rows)
    return {
        "site": site.name,
        "head": site.head,
        "stack": site.stack,
        "layer": site.layer,
        "role": site.role,
        "kind": site.kind,
        "units": units,
        "features": features,
        "unit": _UNIT[site.kind, site.stored_transposed],
        "stored_transposed": site.stored_transposed,
        "rows": site.rows,
        "also_known_as": list(site.also_known_as),
    }


_UNIT = {
    ("matrix", False): "row",
    ("matrix", True): "column (stored transposed)",
    ("embedding", False): "token",
    ("filters", False): "filter",
    ("vector", False): "the whole vector",
}


def _others(line: Mapping[str, Any]) -> str:
    return ", ".join(line["also_known_as"])


def _rows_and_features(site: Site, shape: tuple[int, ...]) -> tuple[int, int]:
    import math

    if site.expert is not None:
        shape = shape[1:]
    if site.kind == "vector":
        return 1, math.prod(shape)
    rows, features = shape[0], math.prod(shape[1:])
    return (features, rows) if site.stored_transposed else (rows, features)


def _by_role(described: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line for each stack and role: how many sites, in which layers, of which size."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for line in described:
        groups[line["stack"], line["role"]].append(line)
    table = []
    for (stack, role), lines in groups.items():
        heads = {line["head"] for line in lines} - {None}
        sizes = {f"{line['units']} × {line['features']}" for line in lines}
        table.append(
            {
                "role": role,
                "stack": stack,
                "sites": len({line["site"] for line in lines}),
                "layers": _ranges({line["layer"] for line in lines} - {None}),
                "heads": max(heads) + 1 if heads else "",
                "units × features": sizes.pop() if len(sizes) == 1 else f"{len(sizes)} sizes",
                "unit": lines[0]["unit"],
                "such as": lines[0]["site"],
            }
        )
    return table


def _ranges(layers: set[int]) -> str:
    if not layers:
        return ""
    whole = set(range(min(layers), max(layers) + 1)) == layers and len(layers) > 1
    return f"{min(layers)}–{max(layers)}" if whole else ", ".join(map(str, sorted(layers)))
