"""Records of an earlier version of the pipeline are completed by the keys that have come since, wherever they are."""

from copy import deepcopy

import pytest

from milepost.configuration.new_keys import with_new_keys
from milepost.configuration.schema import Reward

TODAY = Reward.model_validate({"sum": [{"kind": "math"}, {"kind": "exact", "weight": 0.5}]}).model_dump(mode="json")


def part(reward, number):
    return reward["sum"][number]


@pytest.mark.parametrize(
    ("now", "place"),
    [
        ({"reward": TODAY}, lambda record: record["reward"]),
        ({"reward": TODAY}, lambda record: part(record["reward"], 0)),
        ({"reward_of": {"words": TODAY}}, lambda record: record["reward_of"]["words"]),
        ({"reward_of": {"words": TODAY}}, lambda record: part(record["reward_of"]["words"], 1)),
        ({"validation_reward": TODAY}, lambda record: part(record["validation_reward"], 1)),
    ],
)
def test_a_key_at_its_default_is_added_in_every_section(now, place):
    def earlier(key):
        record = deepcopy(now)
        del place(record)[key]
        return record

    assert with_new_keys(earlier("trim"), now) == now
    other = deepcopy(now)
    place(other)["trim"] = False
    assert with_new_keys(earlier("trim"), other) == earlier("trim")


def test_parts_that_were_added_are_no_keys():
    fewer = deepcopy({"reward": TODAY})
    del fewer["reward"]["sum"][1]
    assert with_new_keys(fewer, {"reward": TODAY}) == fewer
