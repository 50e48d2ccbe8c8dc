"""The report from artifacts alone: verdicts, claims, tables, HTML, Markdown, JSON."""

import html.parser
import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import synthetic

from kanlm import runs
from kanlm.compare.artifacts import load, load_curve, write_bundle
from kanlm.compare.judgement import learned_nothing
from kanlm.compare.plots import report_pictures
from kanlm.compare.report import report, report_content, summary
from kanlm.config import UserError

SEEDS = (0, 1, 2, 3, 4)
ARMS = [{"name": arm, "ffn_type": arm} for arm in ("kan", "swiglu")]


def losses(rng_seed: int = 3, spread: float = 0.003, seeds=SEEDS, **means: float) -> dict:
    """Losses whose seeds move all arms alike, as paired data orders do."""
    rng = np.random.default_rng(rng_seed)
    shared = rng.normal(0, 0.03, len(seeds))
    return {
        (arm, seed): mean + shared[number] + rng.normal(0, spread)
        for arm, mean in means.items()
        for number, seed in enumerate(seeds)
    }


def content(tmp_path, values, **settings) -> dict:
    settings.setdefault("seeds", sorted({seed for _, seed in values}))
    synthetic.write(tmp_path, values, **settings)
    return json.loads(json.dumps(report_content(load(tmp_path))))


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A folder with its report, which these tests only read: drawing takes seconds."""
    folder = tmp_path_factory.mktemp("reported")
    synthetic.write(folder, losses(kan=4.1, kan_glu=3.8, swiglu=3.9), seeds=list(SEEDS))
    report(folder)
    return folder


def drawn(folder, found: dict) -> dict:
    return report_pictures(load(folder), found)


def outcomes(report_json: dict) -> dict[str, str]:
    return {row["arm"]: row["outcome"] for row in report_json["verdict"]["judgements"]}


def test_a_clear_winner_and_a_clear_loser(tmp_path):
    found = content(tmp_path, losses(kan=4.1, kan_glu=3.8, swiglu=3.9))
    assert outcomes(found) == {"kan_glu": "better", "kan": "worse"}
    sentence = found["verdict"]["sentence"]
    assert sentence.startswith(
        "With equally many parameters, the KAN kan_glu predicted unseen text better than the MLP swiglu"
    )
    judged = {row["arm"]: row for row in found["verdict"]["judgements"]}
    assert judged["kan_glu"]["interval_nats"][1] < 0 < judged["kan"]["interval_nats"][0]
    assert {row["confidence"] for row in judged.values()} == {0.975, 0.95}, "as Holm tests them"


def test_differences_within_the_margin_are_a_tie(tmp_path):
    found = content(tmp_path, losses(kan=4.1, kan_glu=3.9, swiglu=3.9))
    assert outcomes(found)["kan_glu"] == "tie"
    assert "equally well" in found["verdict"]["sentence"]


def test_noise_as_large_as_the_difference_is_undecided(tmp_path):
    found = content(tmp_path, losses(spread=0.08, kan=3.93, kan_glu=3.9, swiglu=3.92))
    assert set(outcomes(found).values()) == {"undecided"}
    assert "no larger than chance" in found["verdict"]["sentence"]


def test_one_seed_decides_nothing(tmp_path):
    found = content(tmp_path, losses(seeds=(0,), kan=4.4, kan_glu=3.5, swiglu=3.9))
    assert set(outcomes(found).values()) == {"undecided"}
    assert "single run" in found["verdict"]["sentence"] and "ahead" in found["verdict"]["sentence"]
    assert any(note.startswith("1 seed only") for note in found["notes"])


def test_the_best_mlp_is_the_baseline(tmp_path):
    arms = [{"name": arm, "ffn_type": arm} for arm in ("kan", "swiglu", "gelu")]
    found = content(tmp_path, losses(kan=3.9, swiglu=4.0, gelu=3.8), arms=arms)
    assert [row["baseline"] for row in found["verdict"]["judgements"]] == ["gelu"]
    assert outcomes(found) == {"kan": "worse"}


def test_a_model_that_every_baseline_beats_has_learned_nothing(tmp_path):
    values = losses(kan=7.4, kan_glu=3.8, swiglu=3.9)
    found = content(tmp_path, values, baselines=(2.31, 1.93))
    assert outcomes(found) == {"kan_glu": "better", "kan": "learned nothing"}
    rows = {row["arm"]: row for row in found["tables"][0]["rows"]}
    assert rows["kan"]["learned_nothing"] and not rows["swiglu"]["learned_nothing"]
    assert any("kan has learned nothing" in sentence for sentence in found["tables"][0]["sentences"])
    judged = next(row for row in found["verdict"]["judgements"] if row["arm"] == "kan")
    assert judged["interval_nats"][0] > 0, "what the seeds say is kept"


def test_a_model_that_only_the_best_orders_of_counting_beat_is_judged(tmp_path):
    row = {"name": "8-gram", "what": "", "bits_per_byte": 1.2}
    assert learned_nothing(2.0, [row])
    assert not learned_nothing(2.0, [{**row, "orders": {"3": 2.9, "8": 1.2}}])
    assert learned_nothing(3.0, [{**row, "orders": {"3": 2.9, "8": 1.2}}])
    assert not learned_nothing(3.0, [])


def test_beating_one_baseline_is_said_to_be_beating_one(tmp_path):
    found = content(tmp_path, losses(kan=4.1, kan_glu=3.8, swiglu=3.9), baselines=(2.31, 1.2))
    assert "Not better than xz -9 on this text: kan, kan_glu, swiglu." in found["notes"]
    assert found["verdict"]["sentence"].endswith(
        "Without any neural network xz -9 (1.2000) predicts this text better than both."
    )
    assert outcomes(found)["kan_glu"] == "better"


def test_diverged_and_crashed_runs_are_results(tmp_path):
    values = losses(kan=3.95, kan_glu=3.8, swiglu=3.9) | {("kan", 1): "diverged", ("kan", 2): "crashed"}
    found = content(tmp_path, values)
    states = {run["name"]: run["state"] for run in found["runs"] if run["arm"] == "kan"}
    assert sorted(states.values()) == ["crashed", "diverged", "finished", "finished", "finished"]
    judged = next(row for row in found["verdict"]["judgements"] if row["arm"] == "kan")
    assert judged["seeds"] == 3
    report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert 'seed 1: <span class="bad">diverged' in page and "exit status -9: killed" in page
    assert any("diverged: " in note and "not finite" in note for note in found["notes"])


def test_an_arm_that_never_finished_gives_no_verdict(tmp_path):
    values = {("kan", 0): "diverged", ("kan_glu", 0): "diverged", ("swiglu", 0): 3.9}
    found = content(tmp_path, values)
    assert found["verdict"]["sentence"] == (
        "No verdict: kan finished no seed with swiglu; kan diverged in seed 0."
    )
    values = {("kan", 0): 3.9, ("kan_glu", 0): 3.9, ("swiglu", 0): "crashed"}
    found = content(tmp_path / "second", values)
    assert found["verdict"]["sentence"] == "No verdict: no MLP arm finished."


def test_every_run_carries_its_evaluation_and_the_sums_agree(tmp_path):
    found = content(tmp_path, losses(kan=4.1, kan_glu=3.8, swiglu=3.9))
    assert len(found["runs"]) == 15
    for run in found["runs"]:
        judged = run["eval"]
        assert judged["perplexity"] == pytest.approx(math.exp(judged["loss"]), rel=1e-6)
        assert judged["loss"] == pytest.approx(judged["nll_nats"] / judged["tokens"])
        assert judged["model"].endswith("/hf")
    row = found["tables"][0]["rows"][0]
    seeds = [run["eval"] for run in found["runs"] if run["arm"] == row["arm"]]
    assert row["bits_per_byte"] == pytest.approx(np.mean([s["bits_per_byte"] for s in seeds]))
    assert row["perplexity"] == pytest.approx(math.exp(np.mean([s["loss"] for s in seeds])))
    assert [seed["bits_per_byte"] for seed in row["seeds"]] == [s["bits_per_byte"] for s in seeds]


def test_step_time_claim_is_the_median_of_paired_ratios(tmp_path):
    step_ms = {"kan": 2600.0, "kan_glu": 180.0, "swiglu": 236.0}
    found = content(tmp_path, losses(kan=4.1, kan_glu=3.8, swiglu=3.9), step_ms=step_ms)
    rows = {row["arm"]: row for row in found["claims"] if row["claim"] == "step_time"}
    assert rows["kan"]["ratio"] == pytest.approx(11, rel=0.05) and rows["kan"]["verdict"] == "holds"
    assert rows["kan_glu"]["ratio"] < 0.8 and rows["kan_glu"]["verdict"] == "does not hold"
    speed = json.loads((tmp_path / "speed.json").read_text())["arms"]
    times = {row["arm"]: np.array(row["step_seconds"]) for row in speed}
    assert rows["kan"]["ratio"] == pytest.approx(np.median(times["kan"] / times["swiglu"]))


def test_time_to_equal_loss_uses_the_loss_that_both_reached(tmp_path):
    even = {"kan": 200.0, "kan_glu": 200.0, "swiglu": 200.0}
    found = content(tmp_path, losses(kan=4.5, kan_glu=3.4, swiglu=3.9), step_ms=even)
    ratio = {row["arm"]: row["ratio"] for row in found["claims"] if row["claim"] == "time_to_loss"}
    assert ratio["kan_glu"] < 0.9 and ratio["kan"] > 1.1


def test_loss_against_time_is_drawn_by_the_step_times_where_there_are_some(tmp_path):
    found = content(tmp_path, losses(kan=4.5, kan_glu=3.4, swiglu=3.9))
    by_steps = drawn(tmp_path, found)["loss-seconds"]
    (tmp_path / "speed.json").unlink()
    by_clocks = drawn(tmp_path, found)["loss-seconds"]
    assert "by step times measured in turns" in by_steps["caption"]
    assert "by the runs' clocks" in by_clocks["caption"]
    assert by_steps["svg"] != by_clocks["svg"]


def test_runs_own_clocks_give_no_verdict_on_time(tmp_path):
    """A neighbour that was busy during one arm's training would decide it."""
    content(tmp_path, losses(kan=4.5, kan_glu=3.4, swiglu=3.9))
    (tmp_path / "speed.json").unlink()
    rows = [row for row in report_content(load(tmp_path))["claims"] if row["claim"] == "time_to_loss"]
    assert rows and all(row["ratio"] is None and row["verdict"] == "not measured" for row in rows)
    assert all("speed.rounds=9" in row["measured"] for row in rows)


def test_parameters_for_equal_loss_needs_several_sizes(tmp_path):
    values = losses(kan=4.1, kan_glu=3.8, swiglu=3.9)
    rows = [row for row in content(tmp_path, values)["claims"] if row["claim"] == "parameters"]
    assert [row["ratio"] for row in rows] == [None, None]
    assert all(row["verdict"] == "not measured" and "kanlm compare" in row["measured"] for row in rows)

    sizes = {"small": 0.8, "middle": 0.4, "large": 0.2}
    found = content(tmp_path / "sizes", losses(spread=1e-4, kan=4.0, kan_glu=3.9, swiglu=3.9), sizes=sizes)
    ratio = {row["arm"]: row["ratio"] for row in found["claims"] if row["claim"] == "parameters"}
    # Losses fall as 0.8, 0.4, 0.2 over factors of 4: an exponent of 1/2. The KAN's lie 0.1 nats above.
    assert ratio["kan_glu"] == pytest.approx(1, abs=0.02) and ratio["kan"] > 1.2
    for row in (row for row in found["claims"] if row["claim"] == "parameters"):
        low, high = row["interval"]
        assert low <= row["ratio"] <= high and row["verdict"] == "does not hold"
        assert len(row["by_size"]) == 3 and "claimed 1/100" in row["measured"]
    assert "scaling" in drawn(tmp_path / "sizes", found)


def test_a_flat_ladder_is_too_short_to_say(tmp_path):
    sizes = {"small": 0.0, "middle": 0.0, "large": 0.0}
    found = content(tmp_path, losses(spread=0.02, kan=3.9, kan_glu=3.9, swiglu=3.9), sizes=sizes)
    rows = [row for row in found["claims"] if row["claim"] == "parameters"]
    assert {row["verdict"] for row in rows} == {"too short to say"}


def test_a_size_that_learned_nothing_is_left_out_of_the_ladder(tmp_path):
    sizes = {"nothing": 4.0, "small": 0.8, "middle": 0.4, "large": 0.2}
    found = content(tmp_path, losses(spread=1e-4, kan=4.0, kan_glu=3.9, swiglu=3.9), sizes=sizes)
    assert all(len(row["by_size"]) == 3 for row in found["claims"] if row["claim"] == "parameters")


def test_the_text_of_a_difference_has_its_own_sampling_error(tmp_path):
    """Parts of the text in which one arm gains and another loses; seeds agree."""
    synthetic.write(tmp_path, losses(kan=3.9, swiglu=3.9), seeds=list(SEEDS), arms=ARMS)
    gains = np.random.default_rng(1).normal(0, 5, 50)
    for path in tmp_path.glob("arms/*/eval/heldout.json"):
        report_json = json.loads(path.read_text())
        gain = gains if "-kan-" in str(path) else 0 * gains
        report_json["parts"] = [[1000, 3900 + more] for more in gain]
        path.write_text(json.dumps(report_json))
    found = report_content(load(tmp_path))
    (judged,) = found["verdict"]["judgements"]
    assert judged["text_error_nats"] == pytest.approx(gains.std(ddof=1) / 1000 / 50**0.5)
    assert found["tables"][0]["rows"][1]["text_error_nats"] == pytest.approx(0)


def test_matchings_are_separate_tables(tmp_path):
    found = content(tmp_path, losses(kan=4.1, kan_glu=3.8, swiglu=3.9), matching=["parameters", "flops"])
    assert [table["matching"] for table in found["tables"]] == ["parameters", "flops"]
    assert [len(table["rows"]) for table in found["tables"]] == [3, 3]


class Page(html.parser.HTMLParser):
    VOID = {"meta", "br", "img", "link", "hr"}

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        self.links += [value for key, value in attributes if key in ("src", "href", "xlink:href")]

    def handle_startendtag(self, tag, attributes):
        self.links += [value for key, value in attributes if key in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_html_is_self_contained_well_formed_and_escaped(reported):
    text = (reported / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert not page.open
    assert not [link for link in page.links if not link.startswith("#")]
    assert not re.search(r"@import|url\((?!#)", text)
    assert "&lt;b&gt;self&lt;/b&gt;" in text and "<b>self</b>" not in text
    assert text.count("<svg") == 6
    identifiers = re.findall(r'<clipPath id="([^"]+)"', text)
    assert len(identifiers) == len(set(identifiers)) > 5


def test_markdown_names_pictures_that_exist_and_keeps_its_tables(reported):
    text = (reported / "report.md").read_text()
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(pictures) == 6
    for picture in pictures:
        ElementTree.fromstring((reported / picture).read_text())
    for table in re.findall(r"(?:^\|.*\|\n)+", text, flags=re.M):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table


def test_the_report_is_a_function_of_the_artifacts(reported):
    names = ("report.html", "report.md", "report.json")
    before = [(reported / name).read_bytes() for name in names]
    report(reported)
    assert [(reported / name).read_bytes() for name in names] == before


def test_the_report_loads_no_model(tmp_path):
    synthetic.write(tmp_path, losses(seeds=(0,), kan=4.1, kan_glu=3.8, swiglu=3.9), seeds=[0])
    code = (
        "import sys; from kanlm.compare.report import report; report(sys.argv[1]); "
        "assert not {'torch', 'kanlm.train.loop', 'kanlm.export', 'kanlm.sizing'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=500)


def test_summary_is_a_table_and_the_verdict(tmp_path):
    values = losses(kan=4.1, kan_glu=3.8, swiglu=3.9) | {("kan", seed): "diverged" for seed in SEEDS}
    found = content(tmp_path, values)
    lines = summary(found).splitlines()
    assert lines[-1] == found["verdict"]["sentence"]
    assert re.search(r"^  kan +1,\d{3},\d{3} .* failed", "\n".join(lines), flags=re.M)
    assert [line.split()[0] for line in lines[2:5]] == ["kan", "kan_glu", "swiglu"]


def test_a_folder_without_a_comparison_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match="holds no comparison"):
        report(tmp_path)


def test_a_torn_last_line_of_metrics_is_left_out(tmp_path):
    text = '{"step": 1, "tokens": 10, "seconds": 0.5, "loss": 3.0}\n{"step": 2, "tok'
    assert load_curve(text).loss == [3.0]


def test_a_loss_without_its_place_is_a_damaged_file(tmp_path):
    content(tmp_path, losses(kan=4.1, kan_glu=3.8, swiglu=3.9))
    path = next(tmp_path.rglob("metrics.jsonl"))
    path.write_text('{"step": 1, "tokens": 10, "secnods": 0.5, "loss": 3.0}\n')
    with pytest.raises(UserError, match=f"{re.escape(str(path))}: damaged: a line lacks 'seconds'"):
        report(tmp_path)


def test_a_bundle_gives_the_same_files(tmp_path):
    values = losses(kan=4.1, kan_glu=3.8, swiglu=3.9) | {("kan", 1): "diverged", ("kan", 2): "crashed"}
    content(tmp_path / "study", values)
    report(tmp_path / "study")
    assert write_bundle(tmp_path / "study", tmp_path / "committed") == tmp_path / "committed/bundle.json"
    report(tmp_path / "committed")
    written = sorted(path.relative_to(tmp_path / "committed") for path in tmp_path.glob("committed/**/*.*"))
    assert len(written) > 8
    for name in written:
        if name.name != "bundle.json":
            assert (tmp_path / "committed" / name).read_bytes() == (tmp_path / "study" / name).read_bytes()


def test_a_folder_of_an_older_version_is_told_so(tmp_path):
    content(tmp_path, losses(kan=4.1, swiglu=3.9), arms=ARMS)
    plan = json.loads((tmp_path / "plan.json").read_text())
    del plan["trials"][0]["run"]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(UserError, match="not of this version of kanlm"):
        load(tmp_path)


def test_a_plan_without_what_the_configuration_names_is_damaged(tmp_path):
    content(tmp_path, losses(kan=4.1, swiglu=3.9), arms=ARMS)
    path = tmp_path / "plan.json"
    written = path.read_text()
    for rows, key in (("trials", "kind"), ("arms", "arm")):
        plan = json.loads(written)
        plan[rows][0][key + "x"] = plan[rows][0].pop(key)
        path.write_text(json.dumps(plan))
        with pytest.raises(UserError, match=f"{re.escape(str(path))}: damaged, "):
            load(tmp_path)


def test_a_report_from_an_installed_package_names_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "runs.py"))  # no checkout around it
    values = losses(kan=4.1, swiglu=3.9)
    synthetic.write(tmp_path / "study", values, seeds=list(SEEDS))
    comparison = tmp_path / "study" / "compare.json"
    record = json.loads(comparison.read_text())
    record["provenance"]["git"] = runs.git_state()
    comparison.write_text(json.dumps(record))
    report(tmp_path / "study")
    assert "kanlm 0.1.0\n" in (tmp_path / "study" / "report.md").read_text()
    assert "<dd>0.1.0</dd>" in (tmp_path / "study" / "report.html").read_text()
