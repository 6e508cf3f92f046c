"""Grade a file of answers and print the verdicts, so that a reward is tried before it costs GPU time."""

from pathlib import Path

from milepost.common.errors import run
from milepost.common.jobs import job_parser
from milepost.configuration.schema import Reward
from milepost.rewards.check import verdict_table


def main() -> None:
    config = job_parser(__doc__).parse_args().job["config"]
    for settings in config["rewards"]:
        print(verdict_table(Path(config["answers"]), Reward.model_validate(settings)))


if __name__ == "__main__":
    run(main)
