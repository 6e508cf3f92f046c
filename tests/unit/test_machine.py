"""The machine as manifests name it."""

import os
import re

from milepost.common.machine import _value, machine


def test_cores_and_processor_are_named():
    assert re.search(rf"\b{len(os.sched_getaffinity(0))} cores of \S+", machine())


def test_the_kernel_s_files_are_read_by_key(tmp_path):
    file = tmp_path / "information"
    file.write_text("Model: \t\t NVIDIA H200\nIRQ:   \t\t 27\n")
    assert (_value(file, "Model"), _value(file, "UUID"), _value(tmp_path / "none", "Model")) == ("NVIDIA H200", "", "")
