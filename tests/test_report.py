"""The report: one file, offline, everything escaped; and what `rllib analyze` and `rllib prune` call."""

import html.parser
import json
import re
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from run_folders import write_run

from rllib_pnn.analysis.analyze import analyze_run, prune_run
from rllib_pnn.analysis.report import write_report
from rllib_pnn.analysis.runs import RunError
from rllib_pnn.analysis.sensitivity import Sensitivity
from rllib_pnn.network import ColumnStore, ProgressiveNetwork

torch.set_num_threads(1)


class TorqueEnv(gym.Env):
    """Five steps an episode, each of which pays 1; remembers what was sent to it."""

    observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gym.spaces.Box(-2, 2, (1,), np.float32)
    sent = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.np_random.random(3, np.float32), {}

    def step(self, action):
        self.sent.append(float(action[0]))
        self.steps += 1
        return self.np_random.random(3, np.float32), 1.0, self.steps == 5, False, {}


TORQUE = "rllib_pnn_test/Torque-v0"
if TORQUE not in gym.registry:
    gym.register(TORQUE, entry_point=TorqueEnv)


def flat(level):
    return [(step, level, 1) for step in (100, 200, 300, 400)]


class Page(html.parser.HTMLParser):
    """Tags, links and text of a page; fails on tags that do not close in order."""

    VOID = {"meta", "img", "br", "link", "input"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.ids, self.words = [], [], [], set(), []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
        self.ids.add(values.get("id"))
        self.links += [value for key, value in attributes if key in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture
def runs(tmp_path):
    for seed in range(2):
        write_run(tmp_path / "t" / f"s{seed}", {"zoom": flat(-11 + seed)}, architecture="scratch", seed=seed)
    results = {"pong": (18.0, 18.0), "zoom": (17.25, 17.0)}
    write_run(tmp_path / "t" / "chain", {"pong": flat(1), "zoom": flat(-1)}, column_results=results)
    return tmp_path / "t"


def store_columns(run, env="CartPole-v1", shape=(4,), outputs=2):
    """A run folder with two frozen columns of a policy that balances CartPole a little."""
    network = ProgressiveNetwork(shape, outputs, [{"dense": 8}, {"dense": 6}], lateral_scale=1.0)
    store = ColumnStore(run / "columns")
    for index, task in enumerate(("plain", "mirrored")):
        network.add_column()
        with torch.no_grad():
            network.columns[index].policy.weight.mul_(100)
        network.freeze()
        store.save_column(network, index, task=task, env=env, env_config={}, score=20.0)
    return network


@pytest.fixture
def cartpole(tmp_path):
    run = write_run(tmp_path / "cp", {"plain": flat(20), "mirrored": flat(25)}, env="CartPole-v1", env_configs={})
    return run, store_columns(run)


# -- the report


def test_the_report_stands_alone(runs, tmp_path):
    found = write_report([runs], tmp_path / "out" / "report.html")
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert "script" not in page.tags
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in page.links)
    assert {link[1:] for link in page.links if link.startswith("#")} <= page.ids
    assert page.tags.count("img") == 4  # table, curves, matrix, the run of two tasks
    assert len(found["pictures"]) == 4
    for picture in found["pictures"]:
        with open(picture, "rb") as file:
            assert file.read(8) == b"\x89PNG\r\n\x1a\n"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.html", "report.json", "report_files"]


def test_the_report_says_what_was_computed(runs, tmp_path):
    write_report([runs], tmp_path / "report.html")
    text = Page((tmp_path / "report.html").read_text()).text
    assert re.search(r"The floor is -21, Pong's lowest return, for (zoom, pong|pong, zoom)\.", text)
    # Area 20 over (10 + 11) / 2.
    assert re.search(r"Progressive, 2 columns( 190 \[182, 200\]){3} 1 1 209 169", text)
    assert "zoom 400 -1.00 17.25 17.00 0.25" in text
    # Forward transfer: (20 - 10.5) / (42 - 10.5).
    assert re.search(r"17\.25 17\.00 0\.25 0\.30", text)
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["tables"][0]["rows"][1]["mean"][0] == pytest.approx(100 * 20 / 10.5)


def test_the_last_return_is_that_of_the_last_episodes(tmp_path):
    points = [(300, -20, 2), (600, -18, 2), (910, -18, 0)]
    write_run(tmp_path / "a", {"pong": points}, until={"episode_return_mean": 18, "num_env_steps": 900})
    write_report([tmp_path], tmp_path / "report.html")
    text = Page((tmp_path / "report.html").read_text()).text
    assert "910 -18.00 ended by its steps" in text


def test_names_are_escaped(tmp_path):
    evil = "<script>alert(1)</script>"
    write_run(tmp_path / "x&y<b>", {evil: flat(-3), "b\"'": flat(2)}, source_tasks=["<img src=x>"])
    write_run(tmp_path / "scratch", {evil: flat(-9)}, architecture="scratch")
    bad = write_run(tmp_path / "<i>bad", {"a": flat(0)})
    (bad / "experiment.json").write_text("{")
    write_report([tmp_path], tmp_path / "report.html", title="<u>title</u>")
    source = (tmp_path / "report.html").read_text()
    page = Page(source)
    assert "script" not in page.tags and "u" not in page.tags
    assert not any(link == "x" for link in page.links)
    assert evil in page.text and "<img src=x>" in page.text and "<u>title</u>" in page.text
    assert "<i>bad" in page.text


def test_unreadable_runs_are_listed_and_none_is_an_error(runs, tmp_path):
    (runs / "s0" / "result.json").write_text("junk\n{}\n")
    found = write_report([runs], tmp_path / "report.html")
    assert len(found["problems"]) == 1
    assert "result.json: line 1 is damaged" in Page((tmp_path / "report.html").read_text()).text
    with pytest.raises(RunError, match="line 1 is damaged"):
        write_report([runs / "s0"], tmp_path / "other.html")
    assert not (tmp_path / "other.html").exists()
    with pytest.raises(ValueError, match="no such folder"):
        write_report([tmp_path / "nowhere"], tmp_path / "other.html")


def test_a_report_that_cannot_be_written_is_one_line(runs, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"^[^\n]*file[^\n]*$"):
        write_report([runs], tmp_path / "file" / "report.html")


def test_options_reach_the_scores(runs, tmp_path):
    write_report([runs], tmp_path / "report.html", floor=-31, top=1)
    text = Page((tmp_path / "report.html").read_text()).text
    assert "The floor is -31, given," in text
    assert "best 1 seeds" in text
    assert re.search(r"Progressive, 2 columns 143", text)  # 30 / 21


def test_an_iqm_that_does_not_exist_is_a_dash(tmp_path):
    for seed, level in enumerate((-35, -15)):
        write_run(tmp_path / f"s{seed}", {"zoom": flat(level)}, architecture="scratch", seed=seed)
    write_run(tmp_path / "p", {"zoom": flat(-9)}, source_tasks=["pong"])
    write_report([tmp_path], tmp_path / "report.html", top=1)
    text = Page((tmp_path / "report.html").read_text()).text
    assert re.search(r"Progressive, 2 columns 200 200 – 1 1", text) and "nan" not in text


def test_damaged_analyses_are_notes(runs, tmp_path):
    folder = runs / "chain" / "analysis" / "column_001"
    folder.mkdir(parents=True)
    (folder / "afs.json").write_text("{}")
    (folder / "aps.json").write_text("{")
    found = write_report([runs], tmp_path / "report.html")
    assert sum("afs.json" in note or "aps.json" in note for note in found["notes"]) == 2


@pytest.mark.parametrize("laterals", [[["2"]], 5, {"a": 1}, [1, 2]])
def test_damaged_laterals_are_a_note(runs, tmp_path, laterals):
    folder = runs / "chain" / "analysis" / "column_001"
    folder.mkdir(parents=True)
    shares = {"method": "afs", "column": 1, "layers": ["1: dense 4"], "values": [[0.5, 0.5]], "raw": [[[1.0], [1.0]]]}
    (folder / "afs.json").write_text(json.dumps(shares | {"settings": {"laterals": laterals}}))
    found = write_report([runs], tmp_path / "report.html")
    assert any("afs.json: not a sensitivity" in note for note in found["notes"])


def test_the_report_imports_neither_torch_nor_ray():
    code = "import sys, rllib_pnn.analysis.report; print({'torch', 'ray'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


# -- analyze


def test_analyze_writes_what_the_report_shows(cartpole, tmp_path):
    run, _ = cartpole
    found = analyze_run(run, ["afs", "aps"], num_episodes=4, num_states=64)
    assert (found["column"], found["task"], found["tasks"]) == (1, "mirrored", ["plain", "mirrored"])
    folder = run / "analysis" / "column_001"
    assert sorted(path.name for path in folder.iterdir()) == ["afs.json", "aps.json", "sensitivity.png"]
    for method in ("afs", "aps"):
        stored = Sensitivity.from_json(json.loads((folder / f"{method}.json").read_text()))
        assert stored.method == method and stored.values.shape == (2, 2)
    json.dumps(found, allow_nan=False)
    write_report([run], tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text())
    assert "policy of mirrored" in page.text and re.search(r"AFS over \d+ states, sampled actions", page.text)


def test_afs_is_kept_when_aps_is_refused(cartpole, tmp_path):
    run, _ = cartpole
    options = {"out": tmp_path / "here", "num_episodes": 2, "num_states": 32}
    with pytest.raises(ValueError, match="not above the floor"):
        analyze_run(run, ["afs", "aps"], floor=1000, **options)
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["afs.json"]


def test_an_unknown_floor_is_told_before_anything_is_played(cartpole, tmp_path, monkeypatch):
    run, _ = cartpole
    monkeypatch.setattr("rllib_pnn.analysis.analyze.known_floor", lambda env, config: None)
    monkeypatch.setattr("rllib_pnn.analysis.analyze.play", None)
    with pytest.raises(ValueError, match="its lowest return is not known"):
        analyze_run(run, ["afs", "aps"])


def test_analyze_by_task_name_and_elsewhere(cartpole, tmp_path):
    run, _ = cartpole
    found = analyze_run(run, ["afs"], column="plain", out=tmp_path / "here", num_episodes=2, num_states=32)
    assert found["column"] == 0
    np.testing.assert_array_equal(found["afs"]["values"], [[1], [1]])
    assert (tmp_path / "here" / "sensitivity.png").is_file()


def test_analyze_draws_the_other_methods_earlier_result(cartpole, tmp_path):
    run, _ = cartpole
    folder = tmp_path / "here"
    options = {"out": folder, "num_episodes": 2, "num_states": 32}
    analyze_run(run, ["afs"], **options)
    alone = (folder / "sensitivity.png").stat().st_size
    analyze_run(run, ["aps"], **options)
    assert (folder / "sensitivity.png").stat().st_size > 1.3 * alone


def test_most_used_filters_come_with_convolutions(tmp_path):
    from rllib_pnn.analysis.analyze import most_used_filters
    from rllib_pnn.analysis.fisher import average_fisher_sensitivity

    network = ProgressiveNetwork((2, 10, 10), 3, [{"conv": [8, 4, 2]}, {"dense": 5}])
    network.add_column()
    network.add_column()
    observations = np.random.default_rng(0).integers(0, 255, (20, 2, 10, 10), dtype=np.uint8)
    found = average_fisher_sensitivity(network, observations, actions="expected")
    filters = most_used_filters(network, found)
    assert [len(column) for column in filters] == [6, 6]
    shares = [entry["share"] for entry in filters[0]]
    assert shares == sorted(shares, reverse=True)
    best = filters[1][0]
    assert best["feature"] == int(np.argmax(found.raw[0][1]))
    np.testing.assert_allclose(
        best["weights"], network.columns[1].layers[0].weight[best["feature"]].detach().numpy(), atol=1e-5
    )


def test_bad_input_is_one_line(cartpole, tmp_path):
    run, _ = cartpole
    empty = write_run(tmp_path / "empty", {"a": flat(0)})
    for call, message in [
        (lambda: analyze_run(run, ["fisher"]), "methods: expected one or more of afs, aps, got fisher"),
        (lambda: analyze_run(run, []), "methods"),
        (lambda: analyze_run(run, column="zoom"), "no column of task 'zoom'; there are plain, mirrored"),
        (lambda: analyze_run(run, column=7), "column: 7"),
        (lambda: analyze_run(tmp_path / "nowhere"), "no such folder"),
        (lambda: analyze_run(empty), "no column is frozen yet"),
        (lambda: prune_run(run, column="plain"), "column 0 has no laterals"),
        (lambda: prune_run(run, out=tmp_path), "exists already"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_damaged_store_names_its_file(cartpole):
    run, _ = cartpole
    (run / "columns" / "column_001.safetensors").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"column_001\.safetensors"):
        analyze_run(run)


@pytest.mark.parametrize("normalize", [True, False])
def test_a_run_is_analysed_with_the_actions_that_it_is_evaluated_with(tmp_path, normalize):
    from rllib_pnn.training.evaluation import evaluate_column

    run = write_run(tmp_path / "torque", {"plain": flat(5), "mirrored": flat(5)}, env=TORQUE, env_configs={})
    experiment = json.loads((run / "experiment.json").read_text())
    experiment["config"]["normalize_actions"] = normalize
    (run / "experiment.json").write_text(json.dumps(experiment))
    network = ProgressiveNetwork((3,), 2, [{"dense": 4}, {"dense": 4}])
    store = ColumnStore(run / "columns")
    for index, task in enumerate(("plain", "mirrored")):
        network.add_column()
        with torch.no_grad():
            for name, parameter in network.columns[index].named_parameters():
                if name.startswith(("policy", "laterals.policy")):
                    parameter.zero_()
            network.columns[index].policy.bias.copy_(torch.tensor([0.5, -4.0]))  # mean, log standard deviation
        network.freeze()
        store.save_column(network, index, task=task, env=TORQUE, env_config={})

    def mean_action(act):
        TorqueEnv.sent.clear()
        act()
        return np.mean(TorqueEnv.sent)

    options = {"num_episodes": 4, "num_states": 16}
    expected = mean_action(
        lambda: evaluate_column(network, TORQUE, {}, column=1, num_episodes=4, normalize_actions=normalize)
    )
    assert expected == pytest.approx(1.0 if normalize else 0.5, abs=0.05)
    for act in (
        lambda: analyze_run(run, ["afs"], **options),
        lambda: analyze_run(run, ["aps"], floor=0, **options),
        lambda: prune_run(run, **options),
    ):
        assert mean_action(act) == pytest.approx(expected, abs=0.05)


# -- prune


def test_prune_makes_a_new_store_and_plays_before_and_after(cartpole):
    run, network = cartpole
    files = {path: path.read_bytes() for path in (run / "columns").iterdir()}
    found = prune_run(run, max_kl=0.01, num_episodes=4, num_states=64)
    assert {path: path.read_bytes() for path in (run / "columns").iterdir()} == files
    store = ColumnStore(found["store"])
    pruned = store.load()
    assert [entry.task for entry in store.entries] == ["plain", "mirrored"]
    assert pruned.fingerprints()[0] == network.fingerprints()[0] != pruned.fingerprints()[1]
    assert store.entries[1].extra["pruned_from"] == network.fingerprints()[1]
    assert 0 < found["lateral_parameters_after"] < found["lateral_parameters_before"]
    assert found["kl"] <= 0.01
    assert json.loads((run / "pruned" / "column_001" / "prune.json").read_text()) == found
    with pytest.raises(ValueError, match="exists already"):
        prune_run(run)


def test_pruning_nothing_changes_no_return(cartpole, tmp_path):
    run, _ = cartpole
    found = prune_run(run, max_kl=0.0, num_episodes=3, num_states=32, out=tmp_path / "same")
    assert found["return_before"] == found["return_after"]
    assert found["return_loss"] == 0


def test_the_experiments_file_says_how_many_seeds_are_scored(tmp_path):
    for seed, level in enumerate((-11, -1)):
        run = write_run(tmp_path / "t" / f"s{seed}", {"zoom": flat(level)}, architecture="scratch", seed=seed)
        experiment = json.loads((run / "experiment.json").read_text())
        experiment["trial"] = {"role": "target", "searched": {"lr": 0.001 * (seed + 1)}, "top": 1}
        (run / "experiment.json").write_text(json.dumps(experiment))
    write_run(tmp_path / "p", {"zoom": flat(9)}, source_tasks=["pong"])
    out = tmp_path / "t" / "report.html"
    rows = {row["method"]: row for row in write_report([tmp_path / "t", tmp_path / "p"], out)["tables"][0]["rows"]}
    assert rows["Progressive, 2 columns"]["mean"] == pytest.approx(200.0)  # one run says nothing: all seeds
    experiment = json.loads((tmp_path / "p" / "experiment.json").read_text())
    (tmp_path / "p" / "experiment.json").write_text(json.dumps({**experiment, "trial": {"role": "target", "top": 1}}))
    rows = {row["method"]: row for row in write_report([tmp_path / "t", tmp_path / "p"], out)["tables"][0]["rows"]}
    assert rows["Progressive, 2 columns"]["mean"] == pytest.approx(150.0)  # of the best scratch run alone
    text = Page(out.read_text()).text
    assert "best 1 seeds" in text and "lr 0.002" in text and "drawn" in text
    assert " s0 " in text and f"{tmp_path / 't'}" not in text  # names from the page's folder on
