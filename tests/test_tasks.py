"""Task lists: parsing, errors, when a task is over."""

import math

import pytest

from rllib_pnn.training.tasks import Task, parse_tasks


def test_parses_mappings_and_tasks():
    tasks = parse_tasks([{"name": "a", "env_config": {"variant": "pong"}, "until": {"num_env_steps": 4e6}}, Task("b")])
    assert [t.name for t in tasks] == ["a", "b"]
    assert tasks[0].to_json() == {"name": "a", "env_config": {"variant": "pong"}, "until": {"num_env_steps": 4e6}}
    assert Task.parse(tasks[0].to_json()) == tasks[0]


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([], "at least one task"),
        ("pong", "expected a list"),
        ([{"env_config": {}}], r"tasks\[0\]: name: missing"),
        ([{"name": ""}], "non-empty"),
        ([{"name": "a/b"}], "can't name files"),
        ([{"name": "a"}, {"name": "a"}], r"tasks\[1\].name: 'a' is the name of tasks\[0\] too"),
        ([{"name": "a", "untill": {}}], "did you mean 'until'"),
        ([{"name": "a", "until": {"episode_reward_mean": 1}}], "did you mean 'episode_return_mean'"),
        ([{"name": "a", "until": {"num_env_steps": -1}}], "more than 0"),
        ([{"name": "a", "until": {"num_env_steps": "many"}}], "expected a number"),
        ([{"name": "a", "until": {"episode_return_mean": math.nan}}], "expected a number"),
        ([{"name": "a", "env_config": 3}], "expected a mapping"),
        ([7], "expected a mapping"),
    ],
)
def test_bad_tasks_give_one_line(tasks, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_tasks(tasks)
    assert "\n" not in str(error.value)


def test_is_over_at_whichever_comes_first():
    task = Task("a", {}, {"episode_return_mean": 18, "num_env_steps": 100})
    assert not task.is_over(17.9, 99)
    assert task.is_over(18.0, 1)
    assert task.is_over(-21.0, 100)
    assert not task.is_over(math.nan, 99)  # no episode ended yet
    assert not Task("b").is_over(1e9, 10**12)  # no end
