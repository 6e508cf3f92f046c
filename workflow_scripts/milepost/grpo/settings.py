"""The settings of a training as one object."""

from milepost.configuration import schema


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
    reward: schema.Reward
    reward_code: dict[str, str] | None = None  # digests of a user's functions by file: part of the run's identity
    validation_reward: schema.Reward | None = None  # if it differs from ``reward``
    validation_reward_code: dict[str, str] | None = None
    hardware: schema.Hardware

    @property
    def validated_by(self) -> schema.Reward:
        """The reward of the validation during training."""
        return self.validation_reward or self.reward
