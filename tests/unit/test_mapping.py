"""Copying weights: every Hub value has one place on some rank, for any layout, and mistakes are named."""

from itertools import product

import pytest
import torch

from milepost.checkpoints import mapping
from milepost.checkpoints.safetensors_io import HubCheckpoint
from milepost.checkpoints.shards import Binding, Place, bind, untouched
from milepost.common.errors import UserError
from milepost.qwen3_5.architecture import Architecture
from milepost.qwen3_5.build import build_model
from tiny_hub import DENSE, EXPERTS, MOE, make_tiny_hub, write_weights

LAYER = "model.language_model.layers."
VARIANTS = {
    "dense": dict(kind=DENSE),
    "moe": dict(kind=MOE, shards=3),
    "moe-separate": dict(kind=MOE, fused_experts=False, fused_mtp_experts=True),
}


@pytest.fixture(scope="module")
def hubs(tmp_path_factory):
    """Variant -> (architecture, checkpoint, its tensors)."""
    made = {}
    for name, variant in VARIANTS.items():
        folder = tmp_path_factory.mktemp(name)
        tensors = make_tiny_hub(folder, **variant)
        made[name] = Architecture.from_folder(folder), HubCheckpoint(folder), tensors
    return made


def changed(hub: HubCheckpoint, tensors: dict, tmp_path, **changes) -> HubCheckpoint:
    """The checkpoint with some tensors replaced; None leaves one out."""
    kept = {name: value for name, value in (tensors | changes).items() if value is not None}
    write_weights(tmp_path, kept)
    return HubCheckpoint(tmp_path)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("tensor", "expert"), [(1, 1), (2, 1), (1, EXPERTS), (2, 2)])
def test_every_hub_value_lies_once_on_the_ranks_together(hubs, variant, tensor, expert):
    architecture, hub, _ = hubs[variant]
    for binding in bind(architecture, hub, 1):
        seen = {name: torch.zeros(shape, dtype=torch.int32) for name, shape in binding.hub.items()}
        for rank, expert_rank in product(range(tensor), range(expert if binding.experts else 1)):
            place = Place(expert_rank, expert if binding.experts else 1)
            for piece in binding.pieces(Place(rank, tensor), place):
                seen[piece.hub][piece.source] += 1
        copies = tensor if binding.rule.axis is None else 1  # every rank holds replicated tensors
        assert all(counts.eq(copies).all() for counts in seen.values()), binding.megatron


def shard(hub: HubCheckpoint, binding: Binding, place: Place, shape: tuple[int, ...]) -> torch.Tensor:
    """The shard of the rank at ``place``, NaN where no piece lies."""
    values = torch.full(shape, float("nan"))
    for piece in binding.pieces(place):
        values[piece.target] = hub.read(piece.hub)[piece.source].float()
    return values


def test_a_rank_holds_its_share_of_each_component(hubs):
    architecture, hub, tensors = hubs["dense"]
    bindings = {binding.megatron: binding for binding in bind(architecture, hub, 1)}
    second = Place(1, 2)

    def half(values):
        return values.float().chunk(2)[1]

    gate, up = (tensors[f"{LAYER}0.mlp.{name}_proj.weight"] for name in ("gate", "up"))
    fc1 = shard(hub, bindings["decoder.layers.0.mlp.linear_fc1.weight"], second, (128, 64))
    assert fc1.equal(torch.cat([half(gate), half(up)]))

    attention = {name: tensors[f"{LAYER}0.linear_attn.in_proj_{name}.weight"] for name in ("qkv", "z", "b", "a")}
    query, key, value = attention["qkv"].split([32, 32, 64])
    parts = [query, key, value, attention["z"], attention["b"], attention["a"]]
    in_proj = shard(hub, bindings["decoder.layers.0.self_attention.in_proj.weight"], second, (100, 64))
    assert in_proj.equal(torch.cat([half(part) for part in parts]))

    down = tensors[f"{LAYER}0.mlp.down_proj.weight"].float()
    fc2 = shard(hub, bindings["decoder.layers.0.mlp.linear_fc2.weight"], second, (64, 64))
    assert fc2.equal(down.chunk(2, dim=1)[1])


def test_a_rank_holds_whole_key_value_groups(hubs):
    architecture, hub, tensors = hubs["dense"]
    bindings = {binding.megatron: binding for binding in bind(architecture, hub, 1)}
    query, key, value = (tensors[f"{LAYER}3.self_attn.{name}_proj.weight"].float() for name in "qkv")
    heads = query.view(4, 2, 32, 64)  # (heads, query or gate, head dim, hidden)
    second_group = torch.cat([heads[2, 0], heads[3, 0], heads[2, 1], heads[3, 1], key[32:], value[32:]])
    qkv = shard(hub, bindings["decoder.layers.3.self_attention.linear_qkv.weight"], Place(1, 2), (192, 64))
    assert qkv.equal(second_group)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mtp_num_layers", [0, 1])
def test_weights_come_back_from_the_model_bit_for_bit(hubs, one_process, variant, mtp_num_layers):
    architecture, hub, tensors = hubs[variant]
    model = build_model(architecture, mtp_num_layers=mtp_num_layers)  # in fp32, as for training on the CPU
    mapping.from_hub(model, architecture, hub)
    returned = {name: value.clone() for name, value in mapping.to_hub(model, architecture, hub)}
    passed = untouched(hub, mtp_num_layers)
    assert set(returned).isdisjoint(passed) and set(returned) | set(passed) == set(tensors)
    for name, value in returned.items():
        assert value.dtype == tensors[name].dtype and value.equal(tensors[name]), name


def test_no_parameter_is_left_unset(hubs, one_process):
    architecture, hub, _ = hubs["moe"]
    model = build_model(architecture, mtp_num_layers=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    mapping.from_hub(model, architecture, hub)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_log_keeps_its_32_bits(hubs, one_process):
    architecture, hub, tensors = hubs["dense"]
    model = build_model(architecture, dtype=torch.bfloat16)
    mapping.from_hub(model, architecture, hub)
    name = f"{LAYER}0.linear_attn.A_log"
    assert not tensors[name].bfloat16().float().equal(tensors[name])
    assert dict(mapping.to_hub(model, architecture, hub))[name].equal(tensors[name])


def test_a_tensor_that_no_rule_covers_is_named(hubs, tmp_path):
    architecture, hub, tensors = hubs["dense"]
    extra = {f"{LAYER}0.mlp.gate_proj.bias": torch.zeros(128).bfloat16()}
    with pytest.raises(UserError, match=r"no rule covers .*layers\.0\.mlp\.gate_proj\.bias"):
        bind(architecture, changed(hub, tensors, tmp_path, **extra), 1)


@pytest.mark.parametrize(
    "name", [f"{LAYER}1.linear_attn.A_log", "mtp.layers.0.mlp.experts.2.up_proj.weight", "lm_head.weight"]
)
def test_a_missing_tensor_is_named(hubs, tmp_path, name):
    architecture, hub, tensors = hubs["moe"]
    with pytest.raises(UserError, match=f"has no tensor {name}"):
        bind(architecture, changed(hub, tensors, tmp_path, **{name: None}), 1)


def test_a_tensor_of_another_shape_is_named(hubs, tmp_path):
    architecture, hub, tensors = hubs["dense"]
    name = f"{LAYER}3.self_attn.q_proj.weight"
    with pytest.raises(UserError, match=rf"{name} has the shape \(128, 64\), config.json makes it \(256, 64\)"):
        bind(architecture, changed(hub, tensors, tmp_path, **{name: tensors[name][:128].clone()}), 1)


def test_quantized_weights_are_refused(hubs, tmp_path):
    architecture, hub, tensors = hubs["dense"]
    name = f"{LAYER}0.mlp.up_proj.weight"
    quantized = {name: tensors[name].to(torch.float8_e4m3fn)}
    with pytest.raises(UserError, match=rf"{name} is stored as F8_E4M3, which can.t be trained"):
        bind(architecture, changed(hub, tensors, tmp_path, **quantized), 1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinite_weights_are_refused_by_name(hubs, one_process, tmp_path, bad):
    architecture, hub, tensors = hubs["dense"]
    name = f"{LAYER}2.linear_attn.in_proj_qkv.weight"
    values = tensors[name].clone()
    values[100, 3] = bad
    damaged = changed(hub, tensors, tmp_path, **{name: values})
    with pytest.raises(UserError, match=f"{name} holds NaN or infinite"):
        mapping.from_hub(build_model(architecture), architecture, damaged)


def test_a_layout_that_does_not_divide_is_named(hubs):
    architecture, hub, _ = hubs["dense"]
    for binding in bind(architecture, hub, 0):
        if binding.rule.grouped:
            with pytest.raises(UserError, match=r"q_proj.*: 2 can't be split evenly over 4"):
                binding.pieces(Place(0, 4))
