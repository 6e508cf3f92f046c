"""The settings of a training as one object."""

from pydantic import Field

from milepost.configuration import schema
from milepost.configuration.layout import against_engine, may_be_stale


class Settings(schema.Section):
    """The sections of the configuration that a training reads."""

    training: schema.Training
    validation: schema.Validation
    parallel: schema.Parallel
    algorithm: schema.Algorithm
    optimizer: schema.Optimizer
    mtp: schema.Mtp
    sampling: schema.Sampling
    engine: schema.Engine
    experts: schema.Experts
    reward: schema.Reward  # of the first training set
    reward_of: dict[str, schema.Reward] = Field({})  # of the other training sets, if it differs from ``reward``
    reward_code: dict[str, str] | None = None  # digests of a user's functions by file: part of the run's identity
    validation_reward: schema.Reward | None = None  # if it differs from ``reward``
    validation_reward_code: dict[str, str] | None = None
    replayed: str | None = None  # digest of the saved rollouts that it trains on: part of the run's identity
    hardware: schema.Hardware

    @property
    def ratio_against_engine(self) -> bool:
        """Whether the loss takes its ratio against the log-probs that the engine sampled with."""
        return against_engine(self.algorithm, self.training, self.sampling)

    @property
    def may_be_stale(self) -> bool:
        """Whether other weights than those that are trained may have sampled a token."""
        return may_be_stale(self.training, self.sampling)

    def graded_by(self, dataset: str) -> schema.Reward:
        """The reward of a training set's responses."""
        return self.reward_of.get(dataset, self.reward)

    @property
    def validated_by(self) -> schema.Reward:
        """The reward of the validation during training."""
        return self.validation_reward or self.reward
