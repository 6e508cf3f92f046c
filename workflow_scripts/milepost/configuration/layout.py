"""Check that a model's settings fit its shape and its GPUs, above all the parallel layout. Does not import torch."""

from collections.abc import Iterator
from typing import NamedTuple

from milepost.configuration.schema import Algorithm, Experts, Hardware, Model, Parallel, Sampling, Training
from milepost.configuration.shape import architecture_of
from milepost.qwen3_5.architecture import Architecture

Rule = tuple[str, str, bool]  # the key, what is allowed, whether it is broken


class Fault(NamedTuple):
    """An invalid setting: its key, and what is allowed."""

    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.key}: {self.message}"


def processes(hardware: Hardware) -> int:
    """The number of training processes: as configured, or else one per GPU, or one on the CPU."""
    return hardware.processes or hardware.gpus or 1


def gpus(model: Model, stage: str) -> int:
    """The GPUs that the job of a stage takes."""
    return {"train": model.hardware.gpus, "evaluate": model.evaluation_gpus}.get(stage, 0)


def fault(model: Model) -> Fault | None:
    """The first invalid setting, or None."""
    return next((Fault(key, message) for key, message, wrong in _rules(model) if wrong), None)


def _rules(model: Model) -> Iterator[Rule]:
    """All rules, the easiest to explain first."""
    yield (
        "sampling.temperature",
        "0 gives every sample of a prompt the same answer: use one above 0",
        model.sampling.temperature == 0,
    )
    yield from _algorithm_rules(model)
    parallel, hardware, engine, training = model.parallel, model.hardware, model.engine, model.training
    world, dense = processes(hardware), parallel.tensor * parallel.pipeline * parallel.context
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
    yield "evaluation.gpus", "needs kind: sglang", engine.kind != "sglang" and model.evaluation.gpus is not None
    yield (
        "evaluation.gpus_per_engine",
        f"{model.evaluation.gpus_per_engine} does not divide the evaluation's {model.evaluation_gpus} GPUs",
        model.evaluation_gpus % (model.evaluation.gpus_per_engine or 1) != 0,
    )
    yield (
        "engine.expert_parallel",
        f"{engine.expert_parallel} does not divide gpus_per_engine {engine.gpus_per_engine}",
        engine.gpus_per_engine % engine.expert_parallel != 0,
    )
    yield (
        "engine.replay_routing",
        "needs kind: sglang, whose choice of experts is replayed",
        engine.replay_routing and engine.kind != "sglang",
    )
    yield (
        "sampling.over_sampling",
        f"{model.sampling.over_sampling:g} groups for each that a rollout takes would wait longer than sampling.max_age"
        f" {model.sampling.max_age} allows: at most {model.sampling.max_age + 1}",
        model.sampling.over_sampling > model.sampling.max_age + 1,
    )
    yield (
        "sampling.over_sampling",
        "more than 1 compares new log-probs with the engine's, which are those of the full distribution: use top_p: 1"
        " and top_k: -1",
        model.sampling.over_sampling > 1 and (model.sampling.top_p != 1 or model.sampling.top_k != -1),
    )
    yield (
        "sampling.over_sampling",
        "more than 1 can't replay the experts of a response that several weights sampled: use engine.replay_routing:"
        " false",
        model.sampling.over_sampling > 1 and engine.replay_routing,
    )
    yield (
        "training.mode",
        "train_only has no engine to validate with: set validation.interval: 0",
        training.mode == "train_only" and model.validation.interval > 0,
    )
    yield (
        "training.mode",
        "train_only replays no experts: use engine.replay_routing: false",
        training.mode == "train_only" and engine.replay_routing,
    )
    for stage in ("sampling", "evaluation"):
        yield (
            f"{stage}.enable_thinking",
            "false closes the think block in the prompt, so no response holds the </think> that reward.think_block:"
            " required asks for: set think_block: optional",
            model.reward.think_block == "required" and not getattr(model, stage).enable_thinking,
        )
    yield "mtp.train", "needs conversion.mtp_num_layers: 1", model.mtp.train and not model.conversion.mtp_num_layers
    if world % dense == 0:
        yield (
            "training.global_batch",
            f"{training.global_batch} is not a multiple of the {world // dense} data-parallel copies",
            training.global_batch % (world // dense) != 0,
        )
    yield "parallel.pipeline", "training takes 1; use tensor, context or expert parallelism", parallel.pipeline != 1
    architecture = architecture_of(model)
    if architecture and (found := conversion_fault(architecture, model.conversion.processes)):
        yield "conversion.processes", found, True
    yield (
        "engine.replay_routing",
        "needs a mixture of experts",
        engine.replay_routing and architecture is not None and not architecture.is_moe,
    )
    if architecture and (found := shape_fault(architecture, parallel, model.experts, on_gpu=hardware.gpus > 0)):
        yield *found, True


def may_be_stale(training: Training, sampling: Sampling) -> bool:
    """Whether other weights than those that are trained may have sampled a token."""
    return sampling.over_sampling > 1 or training.mode == "train_only"


def against_engine(algorithm: Algorithm, training: Training, sampling: Sampling) -> bool:
    """Whether the loss takes its ratio against the log-probs that the engine sampled with.

    If tokens may be stale it does by default: the trainer no longer has the weights that sampled them.
    """
    chosen = algorithm.old_log_probs
    return chosen == "engine" or (chosen == "auto" and may_be_stale(training, sampling))


def _algorithm_rules(model: Model) -> Iterator[Rule]:
    """Combinations of algorithms that compute something else than their names say."""
    algorithm, sampling = model.algorithm, model.sampling
    yield (
        "algorithm.loss_aggregation",
        f"{algorithm.loss_aggregation} does not fit loss: gspo, whose ratio is a mean over each answer's tokens: use"
        " mean_of_response_means",
        algorithm.loss == "gspo" and algorithm.loss_aggregation != "mean_of_response_means",
    )
    yield (
        "algorithm.dual_clip",
        f"bounds the ratio of loss: ppo; {algorithm.loss} has a bound of its own: leave it out",
        algorithm.dual_clip is not None and algorithm.loss != "ppo",
    )
    yield (
        "algorithm.constant_length",
        f"is for loss_aggregation: constant_length; {algorithm.loss_aggregation} ignores it: leave it out",
        algorithm.constant_length is not None and algorithm.loss_aggregation != "constant_length",
    )
    corrected, of_engine = algorithm.correction != "none", against_engine(algorithm, model.training, sampling)
    yield (
        "algorithm.correction",
        f"{algorithm.correction} counts the ratio between trainer and engine twice, since old_log_probs:"
        f" {algorithm.old_log_probs} takes the loss's ratio against the engine: use none, or old_log_probs: trainer",
        corrected and of_engine,
    )
    yield (
        "algorithm.correction_bounds",
        "bound the weights of a correction, and there is none: set algorithm.correction",
        algorithm.correction_bounds is not None and not corrected,
    )
    yield (
        "algorithm.correction" if corrected else "algorithm.old_log_probs",
        f"{algorithm.correction if corrected else 'engine'} compares the engine's probabilities with the trainer's, to"
        f" which sampling.top_p {sampling.top_p:g} and top_k {sampling.top_k} do not apply: use top_p 1 and top_k -1",
        (corrected or of_engine) and (sampling.top_p < 1 or sampling.top_k != -1),
    )
    buffer = algorithm.overlong.buffer or 0
    yield (
        "algorithm.overlong.buffer",
        f"{buffer} is more than sampling.max_response_tokens {sampling.max_response_tokens}, of which it is the end",
        buffer > sampling.max_response_tokens,
    )


def conversion_fault(architecture: Architecture, processes: int) -> str | None:
    """Why this many processes can't split the conversion (experts, or a dense model's matrices), or None."""
    if architecture.is_moe:
        if architecture.num_experts % processes:
            return f"{processes} does not divide the {architecture.num_experts} experts"
    elif architecture.num_query_groups % processes or architecture.linear_num_key_heads % processes:
        return (
            f"{processes} does not divide the {architecture.num_query_groups} key-value groups"
            f" and {architecture.linear_num_key_heads} linear-attention heads"
        )
    return None


def shape_fault(architecture: Architecture, parallel: Parallel, experts: Experts, *, on_gpu: bool) -> Fault | None:
    """The first setting that does not fit a model of this shape, or None."""
    rules = [*_dense_rules(architecture, parallel)]
    if architecture.is_moe:
        rules += _expert_rules(architecture, parallel, experts, on_gpu)
    return next((Fault(key, message) for key, message, wrong in rules if wrong), None)


def _dense_rules(architecture: Architecture, parallel: Parallel) -> Iterator[Rule]:
    tensor, context = parallel.tensor, parallel.context
    for what, number in (
        ("attention heads", architecture.num_attention_heads),
        ("linear-attention key heads", architecture.linear_num_key_heads),
    ):
        yield (
            "parallel.tensor",
            f"tensor {tensor} x context {context} does not divide the {number} {what}",
            number % (tensor * context) != 0,
        )
    groups = architecture.num_query_groups
    yield "parallel.tensor", f"{tensor} does not divide the {groups} key-value groups", groups % tensor != 0
    here = max(1, groups // tensor)
    yield (
        "parallel.context",
        f"{context} neither divides nor is a multiple of the {here} key-value groups of a tensor-parallel rank",
        here % context != 0 and context % here != 0,
    )
    for what, number in (
        ("vocabulary", architecture.vocab_size),
        ("ffn width", architecture.ffn_hidden_size),
        ("shared expert's width", architecture.shared_expert_ffn_hidden_size),
    ):
        if number is not None:
            yield "parallel.tensor", f"{tensor} does not divide the {what} {number}", number % tensor != 0
    layers, pipeline = architecture.num_layers, parallel.pipeline
    yield "parallel.pipeline", f"{pipeline} does not divide the {layers} layers", layers % pipeline != 0
    experts = parallel.expert * parallel.expert_tensor
    yield "parallel.expert", f"{experts} needs a mixture of experts: use 1", not architecture.is_moe and experts != 1


def _expert_rules(architecture: Architecture, parallel: Parallel, experts: Experts, on_gpu: bool) -> Iterator[Rule]:
    number, width = architecture.num_experts, architecture.expert_ffn_hidden_size
    yield (
        "parallel.expert",
        f"{parallel.expert} does not divide the {number} experts",
        number % parallel.expert != 0,
    )
    yield (
        "parallel.expert_tensor",
        f"{parallel.expert_tensor} does not divide an expert's width {width}",
        width % parallel.expert_tensor != 0,
    )
    yield (
        "parallel.sequence",
        "a mixture of experts under tensor parallelism needs sequence: true",
        parallel.tensor > 1 and not parallel.sequence,
    )
    yield (
        "experts.dispatcher",
        "alltoall over expert-tensor ranks needs GPUs: use flex or allgather",
        experts.dispatcher == "alltoall" and parallel.expert_tensor > 1 and not on_gpu,
    )
    yield (
        "experts.deepep",
        "needs GPUs and experts.dispatcher: flex",
        experts.deepep and (not on_gpu or experts.dispatcher != "flex"),
    )
