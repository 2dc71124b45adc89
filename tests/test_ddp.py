"""Several processes make the steps that one would make: each takes its share of every batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import ddp_child
from tests.servers import free_port
from tests.trained import KINDS, Kind
from trainer.curves import read_epochs
from trainer.train import SequenceModel

ROOT = Path(__file__).parent.parent


def two_processes(kind: Kind, folder: Path, batch_size: int) -> dict[str, torch.Tensor]:
    """What `torchrun --nproc-per-node 2` sets, without its agent."""
    common = {
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0",
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.ddp_child", kind, str(folder), str(batch_size)]
    children = [
        subprocess.Popen(
            command, cwd=ROOT, env=os.environ | common | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    said = [child.communicate(timeout=300)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0], "\n".join(said)
    found: dict[str, torch.Tensor] = torch.load(folder / "gradients.pt", weights_only=True)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "batch_size"), [("sasrec", 64), ("bert4rec", 60)])
def test_two_processes_make_the_gradient_step_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind, batch_size: int
) -> None:
    """With 60 users a batch the second step has one user: the second process has nobody, and makes the step too."""
    assert kind in KINDS
    monkeypatch.setattr(SequenceModel, "on_before_optimizer_step", None, raising=False)
    alone = ddp_child.gradients(kind, tmp_path / "one", batch_size)
    together = two_processes(kind, tmp_path / "two", batch_size)
    assert alone.keys() == together.keys()
    assert {name.split()[0] for name in alone} == ({"0", "1"} if batch_size == 64 else {"0", "1", "2", "3"})
    for name, gradient in alone.items():
        torch.testing.assert_close(together[name], gradient, rtol=1e-3, atol=1e-6)
    assert max(float(g.abs().max()) for g in alone.values()) > 1e-3
    rows, wanted = (read_epochs(tmp_path / which / kind / "split" / "epochs.csv") for which in ("two", "one"))
    assert [row["train_loss"] for row in rows] == pytest.approx([row["train_loss"] for row in wanted], rel=0.03)
    assert [row["val_ndcg@10"] for row in rows] == [row["val_ndcg@10"] for row in wanted]
