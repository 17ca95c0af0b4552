"""Stack, layer, role, axis and heads of every linear layer, for models of many architectures."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from dora_dynamics.sites import (
    NoHeadsError,
    Site,
    find_sites,
    list_weights,
    select_tensors,
    tensor_names,
)

pytest.importorskip("transformers")
from tests.sites.architectures import ARCHITECTURES, Architecture


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> tuple[Architecture, nn.Module]:
    chosen = ARCHITECTURES[request.param]
    torch.manual_seed(0)
    return chosen, chosen.make()


def expected_of(architecture: Architecture, name: str) -> tuple[str, str, int | None]:
    found = [
        (what, match)
        for pattern, what in architecture.linears.items()
        if (match := re.fullmatch(pattern, name))
    ]
    assert len(found) == 1, f"{name} is described {len(found)} times"
    what, match = found[0]
    stack, _, role = what.rpartition("/")
    return stack, role, int(match[1]) if match.lastindex else None


def matrices(model: nn.Module) -> list[Site]:
    return [
        site for weight in list_weights(model) if weight.kind == "matrix" for site in weight.wholes
    ]


def stored(model: nn.Module, site: Site) -> torch.Tensor:
    weight: torch.Tensor = getattr(model.get_submodule(site.module), site.parameter)
    return weight.detach()


def test_stack_layer_role_and_axis(architecture: tuple[Architecture, nn.Module]) -> None:
    chosen, model = architecture
    sites = matrices(model)
    for site in sites:
        assert (site.stack, site.role, site.layer) == expected_of(chosen, site.name)
        assert site.stored_transposed == (re.search(chosen.transposed, site.name) is not None)
    for pattern in chosen.linears:
        assert any(re.fullmatch(pattern, site.name) for site in sites), pattern


def test_unet_of_diffusers_itself() -> None:
    """The names and heads of the stand-in are those of the real one, where diffusers is there."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    model = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, attention_head_dim=4,
        cross_attention_dim=12, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    chosen = ARCHITECTURES["Stable Diffusion UNet"]
    sites = [site for site in matrices(model) if ".attn" in site.name or ".ff." in site.name]
    for site in sites:
        assert (site.stack, site.role, site.layer) == expected_of(chosen, site.name)
    for pattern in chosen.linears:
        assert any(re.fullmatch(pattern, site.name) for site in sites), pattern
    for site in find_sites(model, ["query"], "head"):
        attention = model.get_submodule(site.module.rpartition(".")[0])
        assert site.head is not None
        assert site.head < attention.heads
    every = [site.head for site in find_sites(model, ["query"], "head")]
    heads = [module.heads for name, module in model.named_modules() if name.endswith("attn1")]
    assert len(every) == sum(heads)


def test_every_linear_layer_is_listed(architecture: tuple[Architecture, nn.Module]) -> None:
    _, model = architecture
    listed = {site.module for site in matrices(model)}
    linear = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    }
    assert linear <= listed


def test_output_axis_is_what_the_layer_puts_out(
    architecture: tuple[Architecture, nn.Module],
) -> None:
    """Zeroing one unit of the oriented weight zeroes that output feature and no other."""
    _, model = architecture
    for site in matrices(model):
        module = model.get_submodule(site.module)
        if site.expert is not None or site.role == "router":
            continue
        weight = site.oriented(stored(model, site))
        x = torch.randn(3, weight.shape[1])
        bias = getattr(module, "bias", None)
        expected = x @ weight.T + (0 if bias is None else bias.detach())
        torch.testing.assert_close(module(x).detach(), expected)


def test_heads(architecture: tuple[Architecture, nn.Module]) -> None:
    chosen, model = architecture
    if not chosen.heads:
        with pytest.raises(NoHeadsError, match="has attention heads"):
            find_sites(model, ["*"], "head")
        return
    sites = find_sites(model, [re.compile("")], "head")
    for what, count in chosen.heads.items():
        stack, role = ["", *what.split("/")][-2:]
        by_module: dict[str, list[int | None]] = {}
        for site in sites:
            if site.role == role and stack in ("", site.stack):
                by_module.setdefault(site.name, []).append(site.head)
        assert by_module
        assert all(heads == list(range(count)) for heads in by_module.values()), by_module


def test_parts_and_heads_cover_each_weight_once(
    architecture: tuple[Architecture, nn.Module],
) -> None:
    _, model = architecture
    for weight in list_weights(model):
        if not weight.blocks:
            continue
        rows = weight.wholes[0].oriented(stored(model, weight.wholes[0])).shape[0]
        whole = weight.wholes[0]
        parts = [part for part in weight.parts if part.expert == whole.expert]
        for sites in (parts, weight.heads(whole)):
            covered = sorted(
                row
                for site in sites
                for start, stop in site.rows or ()
                for row in range(start, stop)
            )
            assert covered in ([], list(range(rows)))


def test_a_file_of_the_model_says_the_same(architecture: tuple[Architecture, nn.Module]) -> None:
    """Names, shapes and config.json alone give the sites that the live model gives."""
    _, model = architecture
    config = getattr(model, "config", None)
    if config is None:
        pytest.skip("a hand-made module has no configuration")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    targets, names = [re.compile("")], tensor_names(model)
    for granularity in ("matrix", "head"):
        try:
            live = find_sites(model, targets, granularity)
        except NoHeadsError:
            with pytest.raises(NoHeadsError):
                select_tensors(shapes, config.to_dict(), targets, granularity, names)
            continue
        stored_sites = select_tensors(shapes, config.to_dict(), targets, granularity, names)
        assert set(live) == set(stored_sites)
