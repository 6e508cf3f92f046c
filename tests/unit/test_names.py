"""No entry script or package shadows a module that someone may import, so scripts can be run by path."""

import importlib.metadata
import sys

# Modules that are not installed here, but that a user, or a library when it finds them, may import.
WELL_KNOWN = {
    *("accelerate", "apex", "bitsandbytes", "dask", "datasets", "deepspeed", "diffusers", "evaluate", "flash_attn"),
    *("jax", "lightning", "lm_eval", "math_verify", "megatron", "mlflow", "openai", "peft", "pytorch_lightning", "ray"),
    *("sglang", "tensorflow", "torchrun", "torchtune", "transformer_engine", "triton", "trl"),
    *("unsloth", "verl", "vllm", "wandb", "xformers"),
}


def test_nothing_shadows_a_known_module(root):
    names = {path.stem for path in (root / "workflow_scripts").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert {"train", "milepost"} <= names
    known = sys.stdlib_module_names | importlib.metadata.packages_distributions().keys() | WELL_KNOWN
    assert names & known == set()
