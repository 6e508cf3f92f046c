"""Four processes over gloo: every parallel layout computes the same as one process."""

import pytest

from distributed.model_worker import LAYOUTS, single_process
from milepost.qwen3_5.build import finalize, initialize
from stages import torchrun


@pytest.mark.slow
def test_logits_and_every_gradient_equal_the_single_process(root, tmp_path, environment):
    initialize()
    for kind in LAYOUTS:
        single_process(kind, tmp_path / f"{kind}.pt")
    finalize()
    torchrun(4, str(root / "tests" / "distributed" / "model_worker.py"), str(tmp_path), env=environment)
