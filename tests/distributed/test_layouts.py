"""Four processes, gloo: every parallel layout computes what one process computes."""

import pytest

from distributed.model_worker import LAYOUTS, single_process
from qwen3_5.build import finalize, initialize
from stages import torchrun


@pytest.mark.slow
@pytest.mark.parametrize("kind", LAYOUTS)
def test_logits_and_every_gradient_equal_the_single_process(root, tmp_path, environment, kind):
    initialize()
    single_process(kind, tmp_path / "expected.pt")
    finalize()
    worker = root / "tests" / "distributed" / "model_worker.py"
    torchrun(4, str(worker), kind, str(tmp_path / "expected.pt"), env=environment)
