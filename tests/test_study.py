"""The study's report follows from the committed trials alone; a ladder takes the better of several rates."""

import json
import random
import re
import shutil
import statistics
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from kanlm.cli import cli
from kanlm.config import UserError
from kanlm.model import KanLMConfig, KanLMForCausalLM
from kanlm.model.basis import INITIAL_FUNCTIONS
from kanlm.model.ffn import ARMS

ROOT = Path(__file__).parents[1]
STUDY = ROOT / "docs/results/study"


@pytest.fixture(autouse=True)
def as_shipped():
    """What the study registers is gone after a test."""
    registers = [(register, dict(register)) for register in (ARMS, INITIAL_FUNCTIONS)]
    yield
    for register, before in registers:
        register.clear()
        register.update(before)
    for name in [name for name in sys.modules if name.startswith("kanlm.study")]:
        del sys.modules[name]


@pytest.fixture
def ladders():
    import kanlm.study.ladders

    return kanlm.study.ladders


DIVERGED = -1.0


def rungs(ladders, monkeypatch, valid_of):
    """The trials that a ladder takes of phases whose validation losses are `valid_of`, by seed."""
    trials = {
        name: [{"arm": "gelu", "seed": seed, "rate": name} for seed in losses]
        for name, losses in valid_of.items()
    }
    monkeypatch.setattr(ladders, "trials_of", lambda phase: trials[phase["name"]])
    monkeypatch.setattr(ladders, "key_of", lambda trial: f"{trial['rate']} {trial['seed']}")
    # Test losses in the opposite order: a choice that looked at them would be seen.
    rows = {
        f"{name} {seed}": {"arm": "gelu", "seed": seed, "rate": name}
        | (
            {"state": "diverged"}
            if loss == DIVERGED
            else {"state": "finished", "valid": loss, "test": 9 - loss}
        )
        for name, losses in valid_of.items()
        for seed, loss in losses.items()
        if loss is not None
    }
    found = ladders.best_trials([{"name": name} for name in valid_of], "mlp", rows)
    assert not ladders.best_trials([{"name": name} for name in valid_of], "kan", rows)
    return {seed: row["rate"] for seed, row in found.items()}


def test_a_ladder_takes_the_rate_that_validation_text_prefers(ladders, monkeypatch):
    losses = {"full": {0: 3.0, 1: 3.2}, "half": {0: 3.1, 1: 3.0}}
    assert rungs(ladders, monkeypatch, losses) == {0: "half", 1: "half"}


def test_a_rate_with_fewer_seeds_waits(ladders, monkeypatch):
    losses = {"full": {0: 3.0, 1: 3.2}, "half": {0: 2.5, 1: None}}
    assert rungs(ladders, monkeypatch, losses) == {0: "full", 1: "full"}


def test_a_rate_at_which_a_seed_diverged_is_the_worst(ladders, monkeypatch):
    losses = {"full": {0: 2.0, 1: DIVERGED}, "half": {0: 3.1, 1: 3.0}}
    assert rungs(ladders, monkeypatch, losses) == {0: "half", 1: "half"}


@pytest.fixture
def own_study(tmp_path, monkeypatch):
    """A study of two seeds of 98k parameters on a text of its own; the working directory is its parent."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KANLM_DEBUG", "")
    texts = tmp_path / "runs/study/data"
    texts.mkdir(parents=True)
    for split, seed in (("train", 0), ("valid", 1), ("test", 2)):
        words = random.Random(seed).choices(["one", "two", "three", "four"], k=20_000)
        documents = [" ".join(words[i : i + 500]) for i in range(0, len(words), 500)]
        (texts / f"mine.{split}.txt").write_text("\n<|endoftext|>\n".join(documents))
    folder = tmp_path / "study"
    folder.mkdir()
    (folder / "plan.toml").write_text(PLAN)
    return folder


PLAN = """
[[phase]]
name = "first"
role = "final"
corpus = "mine"
size = "0.1m"
vocab_size = 300
tokens = 4096
seeds = [0, 1]
arms = [
    { arm = "gelu", learning_rate = 1e-2 },
    { arm = "kan_act", learning_rate = 1e-2, kan_learning_rate = 1e-3 },
]
"""


def kanlm(*arguments):
    return CliRunner().invoke(cli, arguments, catch_exceptions=False).output


@pytest.mark.slow
def test_a_study_of_ones_own_from_its_plan_to_its_report(own_study):
    for command in ("run", "baselines", "run"):  # the second time there is nothing to do
        jobs = ("--jobs", "2") if command == "run" else ()
        kanlm("study", command, *jobs, "--folder", str(own_study), "first")
    rows = [json.loads(line) for line in (own_study / "trials.jsonl").read_text().splitlines()]
    rows.sort(key=lambda row: (row["seed"], row["arm"]))
    assert [(row["arm"], row["seed"]) for row in rows] == [
        (a, s) for s in (0, 1) for a in ("gelu", "kan_act")
    ]
    assert kanlm("report", str(own_study)).strip() == str(own_study / "report.md")
    judged = json.loads((own_study / "report.json").read_text())["verdict"]["judgements"]
    expected = statistics.fmean(rows[i + 1]["test"] - rows[i]["test"] for i in (0, 2))
    assert [one["arm"] for one in judged] == ["kan_act"]
    assert judged[0]["difference_nats"] == pytest.approx(expected, abs=1e-12)
    text = (own_study / "report.md").read_text()
    assert "Kneser-Ney of order" in text and f"{judged[0]['difference_nats']:+.4f}" in text


@pytest.mark.parametrize(
    ("old", "new", "arguments", "words"),
    [
        ("", "", ["frist"], ["plan.toml", "no phase 'frist'", "did you mean 'first'"]),
        ("tokens = 4096", "", [], ["phase first", "tokens", "required"]),
        ("tokens = 4096", 'tokens = "4k"', [], ["phase first", "tokens", "'4k'"]),
        ("seeds = [0, 1]", "seeds = []", [], ["phase first", "seeds", "at least 1"]),
        (
            "tokens = 4096",
            "tokens = 4096\nlader = 'x'",
            [],
            ["phase first", "lader", "did you mean 'ladder'"],
        ),
        ("learning_rate = 1e-2 }", "hiden_norm = true }", [], ["an arm, gelu", "did you mean 'hidden_norm'"]),
        ('"kan_act"', '"kan_atc"', [], ["kan_atc", "kan_act"]),
        ("kan_learning_rate", "kan_grid_sise", [], ["kan_grid_sise", "kan_grid_size"]),
        ('"0.1m"', '"0.2m"', [], ["phase first", "size", "'0.2m'", "'0.1m'"]),
        ('"mine"', '"other"', [], ["other.train.txt", "no such file", "kanlm study prepare"]),
        ("[[phase]]", "[phase", [], ["plan.toml", "not valid TOML"]),
        ("[[phase]]", "[phase]", [], ["plan.toml", "no [[phase]] tables"]),
        ("learning_rate = 1e-2 }", "learning_rate = [1e-2, 2e-2] }", [], ["two trials of gelu with seed 0"]),
        ("learning_rate = 1e-2 }", "learning_rate = 1e-2, tokens = 500 }", [], ["tokens", "wallclock"]),
        ("learning_rate = 1e-2 }", "learning_rate = [] }", [], ["an arm, gelu", "learning_rate"]),
        (
            "learning_rate = 1e-2 }",
            'learning_rate = 1e-2, hidden_norm = "yes" }',
            [],
            ["hidden_norm", "'yes'"],
        ),
        ('"kan_act",', '"kan_act", start = "nothing",', [], ["start", "no function 'nothing'"]),
        ('"gelu", learning_rate = 1e-2', '"gelu"', [], ["arm gelu", "learning_rate", "required"]),
        ("seeds = [0, 1]", "seeds = [0, 1]\nzero_shot = true", [], ["blimp.jsonl.xz", "zero_shot"]),
        (PLAN, "", [], ["plan.toml", "no [[phase]]"]),
        ("[[phase]]", "jobs = 2\n[[phase]]", [], ["plan.toml", "jobs", "unknown key"]),
        ("seeds = [0, 1]", "seeds = [0, 1, 0]", [], ["phase first", "seeds", "seed 0 twice"]),
        ('"gelu",', '"gelu", kan_num_groups = 4,', [], ["gelu: kan_num_groups", "no learned functions"]),
        ("tokens = 4096", "tokens = 4096\nkan_num_groups = 4", [], ["kan_num_groups", "its arm gelu"]),
        ("learning_rate = 1e-2 }", "learning_rate = -1 }", [], ["train.learning_rate", "-1"]),
    ],
)
def test_a_mistake_in_a_plan_is_told_in_one_line(own_study, old, new, arguments, words):
    plan = own_study / "plan.toml"
    plan.write_text(plan.read_text().replace(old, new))
    with pytest.raises(UserError) as error:
        kanlm("study", "run", "--folder", str(own_study), *arguments)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
    assert not (own_study / "trials.jsonl").exists()


def test_a_line_that_was_cut_off_is_named(own_study):
    (own_study / "trials.jsonl").write_text('{"key": "a"}\n{"key": ')
    with pytest.raises(UserError, match=r"trials.jsonl: line 1: not the JSON of a trial: no 'state'.*delete"):
        kanlm("study", "run", "--folder", str(own_study))
    (own_study / "trials.jsonl").write_text('\n{"key": ')
    with pytest.raises(UserError, match=r"trials.jsonl: line 2: not the JSON of a trial"):
        kanlm("study", "run", "--folder", str(own_study))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("report",), "trials.jsonl: no trial is done; `kanlm study run"),
        (("study", "functions", "--folder"), "phase picture: keep: absent; set it to true"),
    ],
)
def test_what_needs_trials_says_so_before_there_are_any(own_study, arguments, words):
    (own_study / "plan.toml").write_text(PLAN.replace("first", "picture").replace("[0, 1]", "[0]"))
    plan = own_study / "plan.toml"
    plan.write_text(plan.read_text().replace('    { arm = "gelu", learning_rate = 1e-2 },\n', ""))
    with pytest.raises(UserError, match=words):
        kanlm(*arguments, str(own_study))


def picture_of(study, arm):
    """The study's plan becomes one of this arm alone, whose functions are read."""
    plan = PLAN.replace("first", "picture").replace('role = "final"', "keep = true")
    (study / "plan.toml").write_text(re.sub(rf" *\{{ arm = (?!{arm}).*\n", "", plan))


def test_functions_of_an_arm_without_any_are_not_drawn(own_study):
    picture_of(own_study, '"gelu"')
    with pytest.raises(UserError, match=r"phase picture: arm gelu has no learned activations"):
        kanlm("study", "functions", "--folder", str(own_study))
    (own_study / "plan.toml").write_text(PLAN)
    with pytest.raises(UserError, match=r"no phase `picture`"):
        kanlm("study", "functions", "--folder", str(own_study))


def test_functions_are_read_from_runs_that_are_trained_where_they_are_gone(own_study):
    picture_of(own_study, '"kan_act"')
    kanlm("study", "run", "--folder", str(own_study))
    *_, first = kanlm("study", "functions", "--folder", str(own_study)).splitlines()
    written = json.loads(Path(first).read_text())
    assert len(written["layers"]) == 2 and len(written["layers"][0]["groups"]) == 8
    for run, seed in zip(written["runs"], (0, 1), strict=True):
        assert f"seed={seed}," in run["trial"] and run["corpus"] == "mine"
    groups = [group["learned"] for group in written["layers"][1]["groups"]]
    mean = [statistics.fmean(values) for values in zip(*groups, strict=True)]
    assert mean == pytest.approx(written["runs"][0]["means"][1], abs=2e-4)
    assert written["runs"][0]["means"] != written["runs"][1]["means"]
    shutil.rmtree("runs/study/runs")
    kanlm("study", "functions", "--folder", str(own_study))
    assert json.loads(Path(first).read_text()) == written
    kanlm("report", str(own_study))
    assert "| mine | 0 | 2 |" in (own_study / "report.md").read_text()


def test_what_runs_have_in_common():
    import kanlm.study.shapes as shapes

    x = [i / 10 for i in range(-40, 41)]
    points = torch.tensor(x, dtype=torch.float64)
    gelu, wave = (INITIAL_FUNCTIONS[name](points) for name in ("gelu", "gelu_wave"))
    half = (gelu + wave) / 2
    runs = [("a", wave - 0.1), ("a", wave + 0.1), ("b", half), ("b", half)]
    runs = [{"corpus": corpus, "means": [mean.tolist()]} for corpus, mean in runs]
    of_a, of_b = shapes.in_common(x, runs)
    assert of_a["spread"] == pytest.approx(0.1 * 2**0.5, abs=1e-6) and of_b["spread"] == 0
    assert of_a["of_the_wave"] == 1 and of_b["of_the_wave"] == pytest.approx(0)
    assert of_a["from_first"] == 0
    assert of_b["from_first"] == pytest.approx(float((wave - half).abs().max()), abs=1e-6)
    (alone,) = shapes.in_common(x, runs[2:3])
    assert alone["spread"] is None and alone["runs"] == 1


def test_a_line_is_added_after_one_that_was_cut_off(tmp_path):
    from kanlm.study.runs import add_line

    path = tmp_path / "trials.jsonl"
    for line in ("first", "second"):
        add_line(path, line)
    with path.open("a") as file:
        file.write("cut")
    add_line(path, "third")
    assert path.read_text() == "first\nsecond\ncut\nthird\n"


def test_a_trial_of_a_search_is_trained_again_to_be_judged():
    from kanlm.study.plan import key_of
    from kanlm.study.runs import is_done

    trial = {"arm": "gelu", "seed": 0, "role": "final"}
    row = {"key": key_of(trial), "state": "finished"}
    assert not is_done(trial, {}) and not is_done(trial, {row["key"]: row})
    assert is_done({**trial, "role": None}, {row["key"]: row})
    assert is_done(trial, {row["key"]: {**row, "test": 3.0}})
    assert is_done(trial, {row["key"]: {**row, "state": "diverged"}})


def test_what_a_trial_says_no_to_is_not_in_its_name():
    from kanlm.study.plan import label_of, rates_of

    trial = {"arm": "kan_act", "learning_rate": 0.01, "kan_learning_rate": 0.001}
    for extra in ({}, {"frozen": False, "shared": False}):
        assert label_of(trial | extra) == "kan_act" and rates_of(trial | extra) == "0.01 / 0.001"
    said = trial | {"frozen": True, "shared": True}
    assert label_of(said) == "kan_act, frozen, one function for all layers" and rates_of(said) == "0.01 / 0"


def test_a_report_stands_where_an_arm_diverged_in_every_seed(own_study):
    from kanlm.study.plan import StudyFolder, key_of

    lines = []
    for trial in StudyFolder(own_study).trials_of():
        row = {"key": key_of(trial), **trial, "state": "diverged"}
        if trial["arm"] == "gelu":
            row |= {"state": "finished", "valid": 3.0, "test": 3.1, "test_bits_per_byte": 1.5}
            row |= {"test_segments": [1.0] * 64, "non_embedding_parameters": 98_624, "test_averaged": 3.1}
        lines.append(json.dumps(row))
    (own_study / "trials.jsonl").write_text("\n".join(lines))
    kanlm("report", str(own_study))
    (judged,) = json.loads((own_study / "report.json").read_text())["verdict"]["judgements"]
    assert judged["outcome"] == "worse" and judged["diverged"] == [0, 1]
    plan = own_study / "plan.toml"
    plan.write_text(plan.read_text().replace('role = "final"', ""))
    kanlm("report", str(own_study))
    assert "| kan_act | 0.01 / 0.001 |" in (own_study / "report.md").read_text()


def test_a_ladder_with_a_size_that_diverged_has_no_law(own_study):
    """What would be left of it favours the arm that diverged."""
    from kanlm.study.plan import StudyFolder, key_of

    plan = own_study / "plan.toml"
    phase = PLAN.replace('role = "final"', 'role = "final"\nladder = "mine"')
    sizes = ("0.1m", "0.3m", "0.6m", "1.2m")
    plan.write_text("".join(phase.replace('"0.1m"', f'"{one}"').replace("first", one) for one in sizes))
    rows = []
    for i, trial in enumerate(StudyFolder(own_study).trials_of()):
        loss = 3.0 - 0.1 * (i // 4)
        row = {"key": key_of(trial), **trial, "state": "finished", "valid": loss, "test": loss}
        row |= {"test_bits_per_byte": 1.5, "test_segments": [1.0] * 64, "test_averaged": loss}
        rows.append(row | {"non_embedding_parameters": 100_000 * 2 ** (i // 4)})
    for lost, law in ((None, True), ("kan_act", False)):
        for row in rows:
            if row["arm"] == lost and row["size"] == "1.2m" and row["seed"] == 0:
                row["state"] = "diverged"
                del row["test"], row["valid"], row["test_averaged"]
        (own_study / "trials.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        kanlm("report", str(own_study))
        found = json.loads((own_study / "report.json").read_text())["ladders"]
        assert bool(found) is law
    said = (own_study / "report.md").read_text()
    assert "left out, diverged: kan_act seed 0" in said and "Too short to say" in said


def test_losses_by_rate_compare_equal_seeds_and_name_what_diverged(own_study):
    from kanlm.study.plan import StudyFolder, key_of

    plan = own_study / "plan.toml"
    plan.write_text(PLAN.replace('role = "final"', 'role = "final"\nladder = "mine"'))
    (trial,) = (one for one in StudyFolder(own_study).trials_of() if one["arm"] == "gelu" and not one["seed"])
    # The second seed of 0.02 is missing: the first row has seed 0 at three rates, the second both at two.
    valid_of = {
        (0.01, 0): 3.0,
        (0.01, 1): 3.4,
        (0.02, 0): 2.9,
        (0.04, 0): 3.2,
        (0.04, 1): 3.1,
        (0.08, 0): None,
    }
    rows = []
    for (rate, seed), valid in valid_of.items():
        row = {**trial, "learning_rate": rate, "seed": seed}
        row = {"key": key_of(row), **row, "state": "diverged" if valid is None else "finished"}
        if valid is not None:
            row |= {"valid": valid, "test": valid, "test_bits_per_byte": 1.5, "test_segments": [1.0] * 64}
            row |= {"non_embedding_parameters": 98_624, "test_averaged": valid}
        rows.append(row)
    (own_study / "trials.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    kanlm("report", str(own_study))
    said = (own_study / "report.md").read_text()
    start = said.index("### mine: validation loss")
    assert said[start : said.index("\n\n## ", start)].splitlines()[4:] == [
        "| 0.1m | gelu |  | 0 | 3.0000 | **2.9000** | 3.2000 | diverged |",
        "| 0.1m | gelu |  | 0 to 1 | 3.2000 |  | **3.1500** |  |",
    ]
    found = json.loads((own_study / "report.json").read_text())["rates"]
    assert found[1]["seeds"] == [0, 1] and found[1]["losses"] == pytest.approx({"0.01": 3.2, "0.04": 3.15})


@pytest.mark.slow
def test_the_committed_report_is_what_the_committed_trials_give(tmp_path):
    for name in ("trials.jsonl", "baselines.json", "functions.json"):
        shutil.copy(STUDY / name, tmp_path / name)
    done = CliRunner().invoke(cli, ["report", str(tmp_path)], catch_exceptions=False)
    assert done.output.strip() == str(tmp_path / "report.md")
    made, committed = ({path.name for path in folder.iterdir()} for folder in (tmp_path, STUDY))
    assert made == committed
    for name in committed:
        words, numbers = split((tmp_path / name).read_text())
        committed_words, committed_numbers = split((STUDY / name).read_text())
        assert words == committed_words, name
        # A fit differs by the order of a processor's sums; pages show four digits behind the point.
        assert numbers == pytest.approx(committed_numbers, rel=1e-6, abs=2e-6), name


def split(text):
    """What stands between a text's numbers, and these."""
    number = r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?"
    return re.split(number, text), [float(found) for found in re.findall(number, text)]


@pytest.fixture
def ideas():
    import kanlm.study.ideas

    return kanlm.study.ideas


@pytest.mark.parametrize(
    ("idea", "twin"), [("study_bivariate", "kan_product"), ("study_token_gated", "kan_act")]
)
def test_an_idea_starts_as_its_twin(ideas, idea, twin):
    """With the zero at its start; away from there the second term shows."""
    settings = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings |= {"intermediate_size": 32, "kan_num_groups": 4, "hidden_norm": True}
    models = {}
    for name in (idea, twin):
        torch.manual_seed(0)
        models[name] = KanLMForCausalLM(KanLMConfig(ffn_type=name, **settings)).eval()
    models[twin].load_state_dict(
        {k: v for k, v in models[idea].state_dict().items() if k in models[twin].state_dict()}
    )
    ids = torch.arange(24)[None]
    torch.testing.assert_close(models[idea](ids).logits, models[twin](ids).logits, rtol=0, atol=1e-5)
    mlp = models[idea].model.layers[0].mlp
    second = mlp.phi_2 if idea == "study_bivariate" else mlp.psi
    with torch.no_grad():
        second.coefficients.add_(1.0)
    assert not torch.allclose(models[idea](ids).logits, models[twin](ids).logits, rtol=0, atol=1e-3)


def test_smoothing_goes_down_the_curvature(ideas):
    torch.manual_seed(0)
    c = torch.nn.Parameter(torch.randn(3, 9, dtype=torch.float64))
    other = torch.nn.Parameter(torch.randn(3, dtype=torch.float64))
    groups = [{"params": [c], "name": "kan", "lr": 0.5}, {"params": [other], "name": "vectors", "lr": 0.5}]
    (0.5 * c.diff(n=2, dim=-1).square().sum()).backward()
    expected, unchanged = c.detach() - 0.5 * 2.0 * c.grad, other.detach().clone()
    ideas.smoothed(torch.optim.SGD(groups), 2.0)
    torch.testing.assert_close(c.detach(), expected)
    torch.testing.assert_close(other.detach(), unchanged, rtol=0, atol=0)
