"""One of several processes that train, as tests/grpo_run.py; the engine loses its weights before it generates."""

import sys

import torch

import grpo_run
from milepost.rollout.cpu_engine import CpuEngine

generate, load_weights = CpuEngine.generate, CpuEngine.load_weights


def load_and_remember(self, named):
    self.last = [(name, tensor.clone()) for name, tensor in named]
    load_weights(self, self.last)


def generate_after_a_restart(self, *arguments):
    load_weights(self, [(name, torch.zeros_like(tensor)) for name, tensor in self.last])
    self.weights_wanted()
    return generate(self, *arguments)


if __name__ == "__main__":
    CpuEngine.load_weights, CpuEngine.generate = load_and_remember, generate_after_a_restart
    grpo_run.run(sys.argv[1:])
