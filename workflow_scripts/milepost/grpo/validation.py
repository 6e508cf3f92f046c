"""How a training is validated."""

from typing import Any

from milepost.checkpoints.manifest import Manifest
from milepost.common.files import sha256_of_all
from milepost.configuration.schema import Evaluation
from milepost.grpo.settings import Settings


def validation_settings(settings: Settings) -> Evaluation:
    """The protocol of the evaluation during training."""
    wanted = settings.validation
    return Evaluation(
        datasets=[wanted.dataset],
        samples_per_problem=wanted.samples_per_problem,
        max_response_tokens=wanted.max_response_tokens,
        temperature=wanted.temperature,
        top_p=wanted.top_p,
        top_k=-1,
        enable_thinking=settings.sampling.enable_thinking,
        seed=settings.training.seed,
        pass_at=[1],
        mem_fraction_static=settings.engine.mem_fraction_static,
    )


def validation_protocol(problems: Manifest, settings: Settings) -> dict[str, Any]:
    """Everything that a validation score depends on, except the weights."""
    return {
        **settings.validation.model_dump(mode="json", exclude={"interval"}),
        "enable_thinking": settings.sampling.enable_thinking,
        "problems": sha256_of_all(problems.files),
        "prompts": problems.provenance["config"]["dataset"],  # how prompts are made from the problems
        "reward": settings.validated_by.model_dump(mode="json"),
        "reward_code": settings.validation_reward_code if settings.validation_reward else settings.reward_code,
    }
