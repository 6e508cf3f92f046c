"""Which parallel layouts a model and a node admit."""

from typing import NamedTuple

from configuration.schema import Model


class Fault(NamedTuple):
    """A setting that can't be: its key, and what is allowed."""

    key: tuple[str, ...]
    message: str


def processes(model: Model) -> int:
    """Training processes: one a GPU, or as many as configured on CPU."""
    return model.hardware.processes or model.hardware.gpus or 1


def data_parallel(model: Model) -> int:
    """Copies of the dense part of the model over all processes."""
    parallel = model.parallel
    return processes(model) // (parallel.tensor * parallel.pipeline * parallel.context)


def fault(model: Model) -> Fault | None:
    """The first setting of the layout that can't be, or None."""
    return next((Fault(tuple(key.split(".")), message) for key, message, wrong in _rules(model) if wrong), None)


def _rules(model: Model):
    """(key, what is allowed, whether it is broken), cheapest to explain first."""
    parallel, hardware, engine, training = model.parallel, model.hardware, model.engine, model.training
    world, dense = processes(model), parallel.tensor * parallel.pipeline * parallel.context
    routed = parallel.expert * parallel.expert_tensor * parallel.pipeline
    yield (
        "engine.kind",
        f"{engine.kind!r} does not fit hardware.gpus {hardware.gpus}: sglang needs GPUs, cpu takes none",
        (engine.kind == "sglang") != (hardware.gpus > 0),
    )
    yield (
        "parallel",
        f"tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context} = {dense}"
        f" does not divide the {world} training processes",
        world % dense != 0,
    )
    yield (
        "parallel.expert",
        f"expert {parallel.expert} x expert_tensor {parallel.expert_tensor} x pipeline {parallel.pipeline} = {routed}"
        f" does not divide the {world} training processes",
        world % routed != 0,
    )
    yield (
        "engine.gpus_per_engine",
        f"{engine.gpus_per_engine} does not divide hardware.gpus {hardware.gpus}",
        engine.kind == "sglang" and hardware.gpus % engine.gpus_per_engine != 0,
    )
    yield (
        "engine.expert_parallel",
        f"{engine.expert_parallel} does not divide gpus_per_engine {engine.gpus_per_engine}",
        engine.gpus_per_engine % engine.expert_parallel != 0,
    )
    yield "mtp.train", "needs conversion.mtp_num_layers: 1", model.mtp.train and not model.conversion.mtp_num_layers
    if world % dense == 0:
        yield (
            "training.global_batch",
            f"{training.global_batch} is not a multiple of the {world // dense} data-parallel copies",
            training.global_batch % (world // dense) != 0,
        )
    shape = model.architecture
    if shape is None:
        return
    for name, count in (
        ("attention_heads", shape.attention_heads),
        ("key_value_groups", shape.key_value_groups),
        ("linear_key_heads", shape.linear_key_heads),
        ("linear_value_heads", shape.linear_value_heads),
        ("ffn", shape.ffn if shape.experts is None else parallel.tensor),
        ("vocabulary", shape.vocabulary),
    ):
        yield "parallel.tensor", f"{parallel.tensor} does not divide the {count} {name}", count % parallel.tensor != 0
    yield (
        "parallel.pipeline",
        f"{parallel.pipeline} does not divide the {shape.layers} layers",
        shape.layers % parallel.pipeline != 0,
    )
    if shape.experts is None:
        yield "parallel.expert", f"{parallel.expert} needs a mixture of experts: use 1", parallel.expert != 1
    else:
        yield (
            "parallel.expert",
            f"{parallel.expert} does not divide the {shape.experts} experts",
            shape.experts % parallel.expert != 0,
        )
