"""Stock Megatron-Core loads our torch_dist checkpoints under its own names and conventions, and computes the same.

Its model is made of Transformer Engine's modules, which need a GPU; plain ones with the same names replace them here.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt import GPTModel, gpt_layer_specs
from megatron.core.models.gpt import experimental_attention_variant_module_specs as gated_delta_net_specs
from megatron.core.ssm.gated_delta_net import common as gated_delta_net
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import nn
from transformers import AutoModelForImageTextToText

from milepost.checkpoints import mapping, torch_dist
from milepost.checkpoints.safetensors_io import HubCheckpoint
from milepost.common.errors import UserError
from milepost.configuration.schema import Parallel
from milepost.qwen3_5.architecture import Architecture
from milepost.qwen3_5.build import UNTRAINED, build_model, transformer_config
from precision import assert_as_precise, computing_in
from tiny_hub import DENSE, MOE, make_tiny_hub


def rms_norm(x, weight, config):
    """As Transformer Engine computes it: the configuration decides for all norms whether a weight of 0 scales by 1."""
    weight = weight + 1 if config.layernorm_zero_centered_gamma else weight
    return F.rms_norm(x, weight.shape, weight, config.layernorm_epsilon)


class Norm(nn.Module):
    def __init__(self, config, hidden_size, **_):
        super().__init__()
        self.config, self.weight = config, nn.Parameter(torch.empty(hidden_size))

    def forward(self, x):
        return rms_norm(x, self.weight, self.config)


class NormAndLinear(ColumnParallelLinear):
    def __init__(self, input_size, *arguments, config, **settings):
        super().__init__(input_size, *arguments, config=config, **settings)
        self.layer_norm_weight = nn.Parameter(torch.empty(input_size))

    def forward(self, x, *arguments, **settings):
        return super().forward(rms_norm(x, self.layer_norm_weight, self.config), *arguments, **settings)


class PlainModules(LocalSpecProvider):
    def column_parallel_layer_norm_linear(self):
        return NormAndLinear

    def fuse_layernorm_and_linear(self):
        return True

    def layer_norm(self, **_):
        return Norm


@pytest.fixture
def stock(monkeypatch, one_process):
    """Build Megatron-Core's own model of an architecture, by its own specs, with an MTP layer."""
    for specs in (gpt_layer_specs, gated_delta_net_specs):
        monkeypatch.setattr(specs, "TESpecProvider", PlainModules, raising=False)
    # flash-linear-attention's kernel needs a GPU, and torch.compile a compiler.
    monkeypatch.setattr(
        gated_delta_net, "l2norm", lambda x: x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt(), raising=False
    )
    torch.compiler.set_stance("force_eager")

    def build(architecture):
        ours = transformer_config(
            architecture, Parallel(), dtype=torch.float32, recompute="none", mtp_num_layers=1, experts=UNTRAINED
        )
        config = replace(
            ours,
            layernorm_zero_centered_gamma=True,
            use_te_activation_func=False,
            deterministic_mode=True,
            use_cpu_initialization=True,
        )
        layers = gated_delta_net_specs.get_transformer_block_with_experimental_attention_variant_spec(config)
        return GPTModel(
            config,
            layers,
            vocab_size=architecture.vocab_size,
            max_sequence_length=architecture.max_sequence_length,
            position_embedding_type="rope",
            rotary_percent=architecture.rotary_percent,
            rotary_base=architecture.rotary_base,
            share_embeddings_and_output_weights=architecture.tie_embeddings,
            mtp_block_spec=gpt_layer_specs.get_gpt_mtp_block_spec(config, layers, use_transformer_engine=True),
        )

    yield build
    torch.compiler.set_stance("default")


@pytest.mark.numerical
@pytest.mark.parametrize("kind", [DENSE, MOE])
@torch.no_grad()
def test_it_loads_every_weight_and_computes_what_transformers_computes(tmp_path, stock, kind):
    make_tiny_hub(tmp_path / "hub", kind)
    architecture, hub = Architecture.from_folder(tmp_path / "hub"), HubCheckpoint(tmp_path / "hub")
    ours = build_model(architecture, mtp_num_layers=1)
    mapping.from_hub(ours, architecture, hub)
    torch_dist.save(ours, tmp_path / "torch_dist")

    model = stock(architecture)
    for parameter in model.parameters():
        parameter.fill_(float("nan"))
    # Transformer Engine keeps FP8 scales under these names; Megatron's --load does without them by default.
    wanted = {name: value for name, value in model.sharded_state_dict().items() if not name.endswith("_extra_state")}
    found = dist_checkpointing.load(wanted, str(tmp_path / "torch_dist"), strict=StrictHandling.RAISE_ALL)
    model.load_state_dict(found, strict=False)
    assert all(parameter.isfinite().all() for parameter in model.parameters())

    ids = torch.randint(0, 280, (1, 70), generator=torch.Generator().manual_seed(0))
    options = {"dtype": torch.float32, "experts_implementation": "eager"}
    transformers_model = AutoModelForImageTextToText.from_pretrained(tmp_path / "hub", **options).eval()
    reference = transformers_model(input_ids=ids).logits
    with computing_in(torch.float64):
        exact = transformers_model.double()(input_ids=ids).logits
    later = torch.ones(70, 70).triu(1).bool()[None, None]
    assert_as_precise(model(ids, torch.arange(70)[None], later), reference, exact)


def test_megatron_s_load_finds_it_as_a_release(tmp_path, one_process, monkeypatch):
    from megatron.training import checkpointing

    make_tiny_hub(tmp_path / "hub")
    torch_dist.save(build_model(Architecture.from_folder(tmp_path / "hub")), tmp_path / "torch_dist")
    load = tmp_path / "load"
    load.mkdir()
    (load / "release").symlink_to(tmp_path / "torch_dist")
    (load / "latest_checkpointed_iteration.txt").write_text("release")
    off = dict.fromkeys(["ckpt_step", "non_persistent_ckpt_type", "non_persistent_global_ckpt_dir"])
    arguments = SimpleNamespace(exit_on_missing_checkpoint=True, **off)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)  # else it compares ranks over their GPUs
    _, folder, release, kind = checkpointing._load_base_checkpoint(str(load), arguments, rank0=True)
    assert (folder, release, kind) == (str(load / "release"), True, checkpointing.CheckpointType.GLOBAL)


def test_a_checkpoint_with_the_names_of_an_earlier_version_says_so(tmp_path, one_process, monkeypatch):
    make_tiny_hub(tmp_path / "hub")
    model = build_model(Architecture.from_folder(tmp_path / "hub"))
    for layer in model.decoder.layers:
        monkeypatch.setattr(layer.submodules_config, "sharded_state_dict_keys_map", {})
    torch_dist.save(model, tmp_path / "torch_dist")
    with pytest.raises(UserError, match="torch_dist: written by an earlier version, which named norms otherwise: "):
        torch_dist.load(build_model(Architecture.from_folder(tmp_path / "hub")), tmp_path / "torch_dist")
