"""What an attacker makes, one by one: each is refused in one sentence, at once and for little."""

from __future__ import annotations

import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import zipfile
from typing import TYPE_CHECKING, Any

import pytest
import safetensors.torch
import torch
from torch.distributed.checkpoint.state_dict_saver import save

from dora_dynamics.checkpoints import CheckpointError, compare_checkpoints
from dora_dynamics.commands import sites
from dora_dynamics.diagnosis import diagnose
from dora_dynamics.errors import InputError
from dora_dynamics.runs.directory import RunDirectoryError, load_runs
from tests.report.report_runs import make_run
from tests.robustness.bad_files import answer, soon
from tests.robustness.test_bad_checkpoints import Q, base, peft_adapter, weights

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["base"]

pytestmark = pytest.mark.filterwarnings("ignore")

HASHED_FOR_EVER = b"\x80\x02})" + b"2\x86" * 60 + b"K\x01s."
"""A dictionary whose key is a tuple of 2^60 tuples."""
A_MEMO_OF_GIGABYTES = b"\x80\x02Nr\xff\xff\xff\x3f."
MORE_THAN_THERE_IS = b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"."


def rezipped(file: Path, compression: int, **records: bytes) -> None:
    """The same archive with other compression, or with other records."""
    with zipfile.ZipFile(file) as archive:
        content = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(name, records.get(name.rpartition("/")[2].replace(".", "_"), data))


def torch_file(folder: Path) -> Path:
    torch.save(weights(1), folder / "a.pt")
    return folder / "a.pt"


def compressed(folder: Path) -> Path:
    rezipped(torch_file(folder), zipfile.ZIP_DEFLATED)
    return folder / "a.pt"


def bomb(folder: Path) -> Path:
    rezipped(torch_file(folder), zipfile.ZIP_DEFLATED, data_pkl=bytes(1 << 26))
    return folder / "a.pt"


def pickled(content: bytes) -> Callable[[Path], Path]:
    def in_archive(folder: Path) -> Path:
        rezipped(torch_file(folder), zipfile.ZIP_STORED, data_pkl=content)
        return folder / "a.pt"

    return in_archive


def old_pickle(folder: Path) -> Path:
    start = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2)
    (folder / "a.pt").write_bytes(start + HASHED_FOR_EVER)
    return folder / "a.pt"


def metadata(content: bytes) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        (folder / ".metadata").write_bytes(content)
        return folder

    return build


def twice_the_first_rows(folder: Path) -> Path:
    """A distributed checkpoint whose chunks are as large as the whole, and not the whole."""
    save(dict(weights(1)), checkpoint_id=folder)
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

    with (folder / ".metadata").open("rb") as stream:
        known = pickle.load(stream)  # noqa: S301  # written two lines above
    half = ChunkStorageMetadata(offsets=torch.Size([0, 0]), sizes=torch.Size([3, 4]))
    known.state_dict_metadata[Q].chunks = [half, half]
    place = next(v for k, v in known.storage_data.items() if k.fqn == Q)
    known.storage_data[MetadataIndex(Q, torch.Size([0, 0]))] = place
    (folder / ".metadata").write_bytes(pickle.dumps(known))
    return folder


def named(name: str) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        header = {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
        text = json.dumps(header).encode()
        (folder / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
        return folder / "a.safetensors"

    return build


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "a.safetensors")
    return folder / "a.safetensors"


def pipe_among_shards(folder: Path) -> Path:
    safetensors.torch.save_file(weights(1), folder / "a.safetensors")
    os.mkfifo(folder / "b.safetensors")
    return folder


def endless(folder: Path) -> Path:
    (folder / "a.safetensors").symlink_to("/dev/zero")
    return folder / "a.safetensors"


def sparse(name: str) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        with (folder / name).open("wb") as stream:
            stream.truncate(10 * 10**9)
        return folder if name.startswith((".", "adapter", "model")) else folder / name

    return build


def adapter(**changes: Any) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        peft_adapter(folder)
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_bytes()) | changes))
        return folder

    return build


CHECKPOINTS: dict[str, Callable[[Path], Path]] = {
    "compressed": compressed,
    "bomb": bomb,
    "hashed for ever": pickled(HASHED_FOR_EVER),
    "hashed for ever, old": old_pickle,
    "memo": pickled(A_MEMO_OF_GIGABYTES),
    "more than there is": pickled(MORE_THAN_THERE_IS),
    "metadata hashed for ever": metadata(HASHED_FOR_EVER),
    "metadata's memo": metadata(A_MEMO_OF_GIGABYTES),
    "metadata of more than there is": metadata(MORE_THAN_THERE_IS),
    "chunks twice": twice_the_first_rows,
    "half a character": named("layers.0.\ud800"),
    "a name for a terminal": named("layers.0.\x1b[2J.q_proj.weight"),
    "a long name": named("layers.0." + "a" * 5000),
    "pipe": pipe,
    "pipe among shards": pipe_among_shards,
    "endless": endless,
    "10 GB .safetensors": sparse("a.safetensors"),
    "10 GB .pt": sparse("a.pt"),
    "10 GB .metadata": sparse(".metadata"),
    "10 GB adapter_config": sparse("adapter_config.json"),
    "10 GB index": sparse("model.safetensors.index.json"),
    "10 GB weights": sparse("model.safetensors"),
    "a pattern for ever": adapter(alpha_pattern={"(([a-z0-9._]+)+)+X": 3}),
    "many patterns": adapter(rank_pattern={".*.*.*.*.*.*.*X": 3}),
    "a rank for gigabytes": adapter(peft_type="LOHA", r=10**9),
    "an alpha beyond numbers": adapter(lora_alpha=10**400),
    "an infinite alpha": adapter(lora_alpha=1e308),
    "a word for false": adapter(use_rslora="false"),
    "patterns in a list": adapter(alpha_pattern=["q_proj", 3]),
    "other targets": adapter(target_modules=["k_proj"]),
    "a kind of its own": adapter(peft_type="../../etc/passwd"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(name: str, tmp_path: Path, base: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    path = CHECKPOINTS[name](folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert answer("compare", base, path, "--targets", "query,value") is None
    with soon(), pytest.raises(CheckpointError):
        compare_checkpoints(base, path, ["query", "value"])
    if "adapter" not in name:
        answer("sites", path)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200_000, f"{grown} KiB of memory were taken"


def test_no_module_is_imported_that_an_adapter_names(tmp_path: Path, base: Path) -> None:
    """PEFT would import what `megatron_core` names, and what a module does is anything."""
    pytest.importorskip("peft")
    folder = tmp_path / "theirs"
    folder.mkdir()
    adapter(use_qalora=True, megatron_config={"a": 1}, megatron_core="this")(folder)
    sys.modules.pop("this", None)
    answer("compare", base, folder, "--targets", "query,value")
    assert "this" not in sys.modules


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "code of its own": {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"},
    },
    "no model": {"model_type": "bert", "architectures": ["Trainer"], "hidden_size": "many"},
    "a function": {"model_type": "bert", "architectures": ["pipeline", 3], "hidden_size": -1},
    "endless": {"model_type": "gpt2", "architectures": ["GPT2Model"], "n_layer": 10**9},
    "unknown": {"model_type": "../../x"},
    "nothing": {},
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_configurations(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(sites, "_MOST_MODULES", 1000)
    (tmp_path / "config.json").write_text(json.dumps(CONFIGURATIONS[name]))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert answer("sites", tmp_path) is None
    assert not (tmp_path / "ran").exists()


def test_no_weight_to_follow(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    assert answer("sites", tmp_path / "a.safetensors") is None


def test_steps_that_no_training_does(tmp_path: Path, base: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    safetensors.torch.save_file(weights(1), folder / "model.safetensors")
    (folder / "trainer_state.json").write_text('{"global_step": 1' + "0" * 40 + "}")
    done = answer("compare", base, folder, "--targets", "query", "--json")
    assert done is not None
    assert json.loads(done)["rows"][0]["step"] == 1  # as where no file tells
    assert answer("compare", base, folder, "--targets", "query", "--steps", "9" * 30) is None
    assert answer("compare", base, folder, "--targets", "query", "--steps", "-3") is None


def many_panels(run: Path) -> None:
    """A row a method: a figure of thousands of panels."""
    file = run / "trajectory.csv"
    header, *lines = file.read_text().splitlines()
    rows = [line.replace(",FT,", f",FT{n},") for n, line in enumerate(lines * 40)]
    file.write_text("\n".join([header, *rows, ""]))


def scattered(run: Path) -> None:
    """Each row of another weight at another step: a matrix of gigabytes of nothing."""
    file = run / "trajectory.csv"
    header, *lines = file.read_text().splitlines()
    cells = [line.split(",") for line in lines * 300]
    rows = [",".join([*row[:2], str(n), f"w{n}", *row[4:]]) for n, row in enumerate(cells)]
    file.write_text("\n".join([header, *rows, ""]))


@pytest.mark.parametrize(
    ("attack", "command"),
    [
        (many_panels, ["plot"]),
        (many_panels, ["plot", "--kind", "coupling"]),
        (many_panels, ["plot", "--kind", "delta_magnitude"]),
        (scattered, ["report"]),
    ],
)
def test_tables(attack: Callable[[Path], None], command: list[str], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", layers=4, roles=("query",), steps=(0, 1, 2, 3))
    attack(run)
    if command == ["report"]:
        pytest.importorskip("bokeh")
    ending = "svg" if command[0] == "plot" else "html"
    assert answer(*command, run, "--out", tmp_path / f"out.{ending}") is None


def kept_weights(run: Path, step: str, weight: torch.Tensor, **sites: Any) -> None:
    site = {"name": "encoder.0.query", "layer": 0, "stack": "", "role": "query"} | sites
    file = run / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"keep": ["weights"]}))
    (run / "weights").mkdir(exist_ok=True)
    safetensors.torch.save_file(
        {"encoder.0.query": torch.ones(8, 3)}, run / "weights" / "baseline.safetensors",
        {"sites": json.dumps([site])},
    )  # fmt: skip
    safetensors.torch.save_file(
        {"encoder.0.query.weight": weight}, run / "weights" / f"step-{step}.safetensors",
        {"scaling": "{}"},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("step", "weight", "sites", "refused"),
    [
        ("3", torch.ones(8, 3) * 2, {}, False),
        ("3", torch.full((8, 3), torch.nan), {}, False),
        ("three", torch.ones(8, 3), {}, False),
        ("²", torch.ones(8, 3), {}, False),
        ("3", torch.ones(3, 8), {}, True),
        ("3", torch.ones(8), {}, True),
        ("3", torch.ones(8, 3), {"rows": [[0, 99], [5, 1]], "kind": "nothing"}, False),
        ("3", torch.ones(8, 3), {"expert": 7}, True),
    ],
)
def test_kept_weights(
    tmp_path: Path, step: str, weight: torch.Tensor, sites: dict[str, Any], *, refused: bool
) -> None:
    run = make_run(tmp_path / "run", layers=4, roles=("query",), steps=(0, 1, 2, 3))
    kept_weights(run, step, weight, **sites)
    assert (answer("diagnose", run, "--alone") is None) is refused


def test_in_a_process_of_its_own(tmp_path: Path, base: Path) -> None:
    """What a person sees: no traceback, nothing but one line, exit code 2."""
    command = [sys.executable, "-m", "dora_dynamics", "compare", str(base)]
    (tmp_path / "theirs").mkdir()
    path = pickled(HASHED_FOR_EVER)(tmp_path / "theirs")
    done = subprocess.run([*command, str(path)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("path", ["x" * 5000, "", "~nobody/x", "//", "[", "*" * 50])
def test_paths(path: str, tmp_path: Path, base: Path) -> None:
    """Names of files that no file can have."""
    for arguments in (["runs"], ["coupling"], ["diagnose"]):
        with soon():
            assert answer(*arguments, path) is None
    assert answer("compare", base, path) is None
    with pytest.raises(InputError):
        diagnose(path, None)
    with pytest.raises(RunDirectoryError):
        load_runs("a\0b")
