"""GRPO's gradient through a real tiny model, packed, against transformers' model, one sequence at a time."""

import subprocess
import sys

import pytest
import torch

from milepost.grpo.aggregations import StepTotals
from milepost.grpo.cpu_optimizer import CpuAdam
from milepost.grpo.learner import Learner
from milepost.grpo.policy import Policy
from milepost.grpo.run_state import Progress
from milepost.grpo.samples import TrainingSequence
from milepost.qwen3_5.build import build_model
from milepost.qwen3_5.experts import take_expert_load
from precision import assert_as_precise, assert_sum_as_precise, computing_in, in_float64
from qwen3_5_reference import megatron_names, reference, widened
from settings import algorithm as algorithm_of
from settings import training_settings

pytestmark = [pytest.mark.numerical, pytest.mark.usefixtures("one_process")]

TEMPERATURE = 0.8
SMALL = {"hidden_size": 64, "head_dim": 32, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "vocab_size": 96}
KINDS = {
    "dense": {"intermediate_size": 96},
    "moe": {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
}


def models(kind, mtp_num_layers=0, dtype=torch.float32, **changes):
    """Our model with the weights of a transformers model, both in ``dtype``."""
    architecture, theirs = reference(kind, **SMALL | KINDS[kind] | changes)
    with computing_in(dtype):
        ours = build_model(architecture, dtype=dtype, mtp_num_layers=mtp_num_layers)
    generator = torch.Generator().manual_seed(1)
    weights = megatron_names(architecture, theirs.state_dict())
    for name, parameter in ours.named_parameters():
        whole = weights.get(name, torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * 0.05)
        parameter.data = whole.to(dtype, copy=True)
    return architecture, ours, widened(theirs) if dtype == torch.float64 else theirs


def sequences(shapes, seed=0):
    """Random responses to prompts, equal prompts where of equal length; advantages of both signs, one of them 0."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(SMALL["vocab_size"], (30,), generator=generator)
    return [
        TrainingSequence(
            ids=torch.cat([prompts[:prompt], torch.randint(SMALL["vocab_size"], (response,), generator=generator)]),
            log_probs=-4 + torch.randn(response, generator=generator),
            advantage=[0.9, -1.3, 0.0, 0.4][index % 4],
        )
        for index, (prompt, response) in enumerate(shapes)
    ]


SHAPES = [(12, 9), (1, 70), (12, 3), (30, 1), (30, 20), (12, 33)]


def policy(
    model, budget=10_000, mtp=False, batch=None, log_prob_chunk=16, replays_routing=False, rate=0.0, **algorithm
):
    settings = training_settings(
        training={
            "prompts_per_rollout": 1,
            "samples_per_prompt": len(SHAPES),
            "global_batch": batch or len(SHAPES),
            "max_tokens_per_gpu": budget,
            "log_prob_chunk": log_prob_chunk,
        },
        sampling={"temperature": TEMPERATURE},
        engine={"replay_routing": replays_routing},
        mtp={"train": mtp},
        algorithm=algorithm,
        optimizer={"weight_decay": 0.0, "learning_rate": rate},
    )
    return Policy(model, settings)


def row_counts(of, batch):
    """The number of rows of each pack; equal prompts in one pack share their rows."""
    return [len(b.input_ids[0]) for b in of.micro_batches(batch, StepTotals(len(batch), 1, 1))]


def learner(of):
    return Learner(of, CpuAdam(of.model, of.settings.optimizer), of.settings)


def test_gradients_do_not_depend_on_the_order_of_threads():
    """A shared prompt's last row predicts the first token of all its samples, so their gradients are summed there."""
    of = policy(models("dense")[1])
    batch = sequences([(12, 2 + number % 3) for number in range(400)])
    totals = StepTotals(len(batch), sum(sequence.response_length for sequence in batch), 1)
    batches, threads = of.micro_batches(batch, totals), torch.get_num_threads()

    def gradients():
        of.model.zero_grad()
        of.accumulate_gradients(batches, totals)
        return [p.grad.clone() for p in of.model.parameters() if p.grad is not None]

    torch.set_num_threads(2)
    try:
        first = gradients()
        for _ in range(5):
            assert all(map(torch.equal, first, gradients()))
    finally:
        torch.set_num_threads(threads)


def plain_gradients(architecture, model, batch, algorithm):
    """The loss as in the papers, sequence by sequence with full logits, at the old policy or against the engine's.

    Returns each token's part of the loss, and the gradients.
    """
    parts = []
    for sequence in batch:
        logits = model(input_ids=sequence.ids[None]).logits[0, sequence.prompt_length - 1 : -1] / TEMPERATURE
        full = torch.log_softmax(logits, -1)
        log_probs = full.gather(1, sequence.ids[sequence.prompt_length :, None])[:, 0]
        entropy = -(full.exp() * full).sum(-1)
        old = sequence.log_probs if algorithm.old_log_probs == "engine" else log_probs.detach()
        log_ratio = log_probs - old
        ratio = torch.exp(log_ratio.mean() if algorithm.loss == "gspo" else log_ratio)
        clipped = ratio.clamp(1 - algorithm.clip, 1 + algorithm.clip_high)
        weight = torch.exp(log_probs.detach() - sequence.log_probs).prod().clamp(*algorithm.correction_range)
        surrogate = torch.minimum(ratio * sequence.advantage, clipped * sequence.advantage)
        token_loss = -surrogate * (weight if algorithm.correction == "sequence_truncate" else 1.0)
        token_loss = token_loss.expand(len(log_probs)) - algorithm.entropy_coefficient * entropy
        if algorithm.loss_aggregation == "mean_of_response_means":
            parts.append(token_loss / len(token_loss) / len(batch))
        else:
            parts.append(token_loss / sum(s.response_length for s in batch))
    parts = torch.cat(parts)
    gradients = torch.autograd.grad(parts.sum(), model.parameters())
    return parts, megatron_names(architecture, dict(zip(dict(model.named_parameters()), gradients, strict=True)))


def learned(model, batch, **of_policy):
    """The metrics of a step, and its gradients before they are clipped to a norm of 1."""
    with computing_in(next(model.parameters()).dtype):
        learning = learner(policy(model, **of_policy))
        report = learning.learn(batch, Progress())
        scale = max(1.0, report["grad_norm"] + 1e-6)
        return report, {name: gradient * scale for name, gradient in learning.optimizer.gradients.items()}


@pytest.mark.parametrize(
    ("kind", "budget", "changes"),
    [
        ("dense", 10_000, {}),
        ("dense", 90, {}),
        ("dense", 90, {"loss_aggregation": "token_mean"}),
        ("dense", 1, {"loss_aggregation": "token_mean"}),
        ("moe", 90, {}),
        ("dense", 90, {"loss": "gspo", "old_log_probs": "engine"}),
        ("dense", 90, {"correction": "sequence_truncate", "correction_bounds": [0.3, 3.0]}),
    ],
)
def test_gradients_equal_those_of_transformers_sequence_by_sequence(kind, budget, changes):
    batch = sequences(SHAPES)
    algorithm = {"entropy_coefficient": 0.1, **changes}
    architecture, ours, theirs = models(kind)
    rows = row_counts(policy(ours, budget, **algorithm), batch)
    assert (rows == [sum(map(sum, SHAPES)) - 12 - 12 - 30]) == (budget == 10_000)
    _, ours_in_float64, theirs_in_float64 = models(kind, dtype=torch.float64)
    reference = plain_gradients(architecture, theirs, batch, algorithm_of(**algorithm))
    with in_float64():
        exact = plain_gradients(architecture, theirs_in_float64, batch, algorithm_of(**algorithm))
    for model, dtype in ((ours, torch.float32), (ours_in_float64, torch.float64)):
        report, gradients = learned(model, batch, budget=budget, **algorithm)
        assert_sum_as_precise(report["loss"], dtype, reference[0], exact[0])
        assert_as_precise(gradients, reference[1], exact[1])


def test_leaving_out_responses_without_advantage_changes_no_gradient():
    batch = sequences(SHAPES)
    pruned, whole = (models("dense", dtype=torch.float64)[1] for _ in range(2))
    _, rounded, _ = models("dense")
    for options, kept in (({}, 5), ({"entropy_metric": True}, 6)):
        of = policy(rounded, **options)
        step = Learner(of, None, of.settings)._prepare(batch)
        assert sum(len(of_pack.packed.lengths) for of_pack in step.batches) == kept
    found, exact = learned(pruned, batch), learned(whole, batch, entropy_metric=True)
    _, reference = learned(rounded, batch, entropy_metric=True)
    losses = torch.tensor([-s.advantage / len(batch) for s in batch], dtype=torch.float64)  # of ratios that are all 1
    for report, _ in (found, exact):
        assert_sum_as_precise(report["loss"], torch.float64, losses, losses)
    assert_as_precise(found[1], reference, exact[1])


@pytest.mark.parametrize("metrics", [{}, {"entropy_metric": True}, {"reference_forward": True}])
def test_a_rollout_without_advantages_changes_no_weight_and_counts_no_step(metrics):
    _, ours, _ = models("dense")
    batch = [TrainingSequence(s.ids, s.log_probs, 0.0) for s in sequences(SHAPES)]
    progress = Progress()
    learning = learner(policy(ours, **metrics, rate=1e-2))
    learning.learn(sequences(SHAPES), Progress())  # and Adam's momentum moves none after it
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    report = learning.learn(batch, progress)
    assert progress.optimizer_step == progress.bad_steps == 0 and report["grad_norm"] == 0.0
    assert "entropy" in report or not metrics.get("entropy_metric")
    assert all(torch.equal(p, before[name]) for name, p in ours.named_parameters())


def test_old_log_probs_are_those_before_the_first_of_several_steps():
    """With one step the ratio is 1 with or without them; with three, the second and third step see other ratios."""
    for batch_size, distinct in ((6, False), (2, True)):
        _, ours, _ = models("dense")
        learning = learner(policy(ours, batch=batch_size, old_log_prob_forward=True, rate=1e-2))
        progress = Progress()
        report = learning.learn(sequences(SHAPES), progress)
        assert progress.optimizer_step == 6 // batch_size
        assert (report["ratio"] != 1) == distinct


def test_several_steps_against_the_engine_need_no_old_log_probs(monkeypatch):
    """Each step's ratio is that of the policy as it is to what the engine sampled with."""
    _, ours, _ = models("dense")
    monkeypatch.setattr(Policy, "_log_probs_of", lambda *_: pytest.fail("the engine's log-probs are known"))
    learning = learner(policy(ours, batch=2, old_log_probs="engine", rate=1e-2))
    progress = Progress()
    assert learning.learn(sequences(SHAPES), progress)["ratio"] != 1
    assert progress.optimizer_step == 3


def test_the_reference_stays_where_the_policy_began():
    _, ours, _ = models("dense")
    learning = learner(policy(ours, kl_coefficient=0.1, rate=1e-2))
    batch, progress = sequences(SHAPES), Progress()
    first, second = learning.learn(batch, progress), learning.learn(batch, progress)
    assert first["kl"] == 0 < second["kl"]


def test_mtp_trains_beside_the_policy_and_leaves_its_gradient_alone():
    batch = sequences(SHAPES)
    rounded, alone, with_mtp = (models("dense", 1, dtype)[1] for dtype in (torch.float32, torch.float64, torch.float64))
    _, reference = learned(rounded, batch, entropy_metric=True)
    _, exact = learned(alone, batch, entropy_metric=True)
    report, found = learned(with_mtp, batch, mtp=True)
    assert report["mtp_loss"] > 1.0  # of random weights: log(96) = 4.6 would be guessing
    of_mtp = [name for name in found if name.startswith("mtp.")]
    assert of_mtp and all(found[name].norm() > 0 for name in of_mtp)
    assert_as_precise(
        *({name: g for name, g in gradients.items() if name not in of_mtp} for gradients in (found, reference, exact))
    )


@pytest.mark.parametrize(
    ("kind", "poison"),
    [
        ("dense", "decoder.final_layernorm.weight"),
        ("moe", "decoder.layers.0.pre_mlp_layernorm.weight"),  # all layers' routers choose by NaN
        ("dense", "an advantage"),
    ],
)
def test_a_step_that_is_not_finite_is_skipped_and_counted(kind, poison):
    _, ours, _ = models(kind)
    batch = sequences(SHAPES)
    if poison in (weights := dict(ours.named_parameters())):
        weights[poison].data[0] = float("nan")
    else:
        batch[0] = TrainingSequence(batch[0].ids, batch[0].log_probs, float("inf"))
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    learning, progress = learner(policy(ours, rate=1e-2)), Progress()
    learning.learn(batch, progress)
    assert (progress.optimizer_step, progress.bad_steps, progress.bad_steps_in_a_row) == (0, 1, 1)
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter.nan_to_num(), before[name].nan_to_num()), name
    assert learning.optimizer.state_dict() == {}


def test_the_load_of_experts_counts_every_visit():
    _, ours, _ = models("moe")
    routed = []
    for layer in ours.decoder.layers:
        layer.mlp.router.register_forward_hook(lambda _, __, output: routed.append(output[1].sum(0)))
    report = learner(policy(ours)).learn(sequences(SHAPES), Progress())
    load = torch.stack(routed).double()  # (layers, experts); one pack, so one pass
    assert report["expert_load_max"] == pytest.approx((load.amax(1) / load.mean(1)).mean().item())
    assert report["expert_load_min"] == pytest.approx((load.amin(1) / load.mean(1)).mean().item())
    assert report["expert_imbalance"] == pytest.approx((load.std(1, correction=0) / load.mean(1)).mean().item())
    assert take_expert_load(ours) is None


STEP = """
import resource
from unit import test_grpo_policy as here
from milepost.qwen3_5.build import initialize

initialize()
_, ours, _ = here.models("dense", vocab_size=40_000)
of = here.policy(ours, log_prob_chunk=64)
optimizer = here.learner(of)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
optimizer.learn(here.sequences([(4, 60)]), here.Progress())  # buffers of the optimizer, and what is loaded at first use
before = peak()
optimizer.learn(here.sequences([(4, 1000)] * 4), here.Progress())
print((peak() - before) / (4 * 1000 * 40_000 * 4))
"""


def test_a_step_never_holds_the_logits_of_all_positions(environment):
    """The peak of host memory rises by less than one copy of the fp32 logits of its 4000 response tokens, which is 1.

    A loss over whole logits holds three copies.
    """
    done = subprocess.run([sys.executable, "-c", STEP], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) < 1
