"""Programs on several processes, started by torchrun as users start them.

A process that has used gloo ends, after a barrier, by `os._exit`. Gloo's threads live as long as
anything holds the group (DDP, FSDP and device meshes do, and frames of an exception), and one that
asks for the interpreter while it shuts down aborts the process.
"""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

from tests.conftest import PATIENCE

if TYPE_CHECKING:
    from pathlib import Path


def torchrun(
    processes: int, *program: str, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """A file of Python, or `-m` and a module, with its arguments, on so many processes.

    When one of them fails, torchrun ends the others. The port is one that the system chooses and
    torchrun holds from the first moment on, so that no other test can take it.
    """
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run"),
            *("--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(processes)),
            *program,
        ],
        cwd=cwd, capture_output=True, text=True, check=False, timeout=PATIENCE,
    )  # fmt: skip
