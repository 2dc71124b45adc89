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
from trainer.curves import read_epochs
from trainer.train import SequenceModel

ROOT = Path(__file__).parent.parent


def two_processes(folder: Path) -> None:
    """What `torchrun --nproc-per-node 2` sets, without its agent."""
    common = {
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0",
    }  # fmt: skip
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.ddp_child", str(folder)],
            cwd=ROOT, env=os.environ | common | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    said = [child.communicate(timeout=300)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0], "\n".join(said)


@pytest.mark.slow
def test_two_processes_make_the_gradient_step_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both models in one test: most of its time goes into starting the two processes."""
    monkeypatch.setattr(SequenceModel, "on_before_optimizer_step", None, raising=False)
    two_processes(tmp_path / "two")
    for kind, batch_size in ddp_child.SIZES.items():
        together = torch.load(tmp_path / "two" / f"{kind}.pt", weights_only=True)
        alone = ddp_child.gradients(kind, tmp_path / "one", batch_size)
        assert alone.keys() == together.keys()
        steps = -(-ddp_child.USERS // batch_size) * ddp_child.EPOCHS
        assert {name.split()[0] for name in alone} == {str(step) for step in range(steps)}
        for name, gradient in alone.items():
            torch.testing.assert_close(together[name], gradient, rtol=1e-3, atol=1e-6)
        assert max(float(g.abs().max()) for g in alone.values()) > 1e-3
        rows, wanted = (read_epochs(tmp_path / which / kind / "split" / "epochs.csv") for which in ("two", "one"))
        assert [row["train_loss"] for row in rows] == pytest.approx([row["train_loss"] for row in wanted], rel=0.03)
        assert [row["val_ndcg@10"] for row in rows] == [row["val_ndcg@10"] for row in wanted]
