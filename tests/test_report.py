"""Reports and charts of runs."""

import json
import math
import re
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from scipy.stats import bootstrap, trim_mean

import ppo_lightning.tools.report as report
from ppo_lightning.__main__ import main as console
from ppo_lightning.runs.history import Records, summarize_records
from ppo_lightning.tools.charts import CHARTS, COLORS, Curve, draw, draw_learning_curve, to_svg
from ppo_lightning.tools.comparison import comparison, curves_of, grouped, interval
from ppo_lightning.tools.page import number
from ppo_lightning.tools.report import draw_report, main, run_folders, run_page
from ppo_lightning.tools.saved_runs import SavedRun, read_run

pytestmark = pytest.mark.paints

CONFIG = {"env": "CartPole-v1", "gamma": 0.99, "clip_range": 0.2}


def leave(
    folder: str, *, seed: int = 1, rows: int = 20, slope: float = 1.0, status: str = "finished", **config
) -> Path:
    """The folder of a run whose return rises by ``slope`` per 100 steps."""
    records, run = Records(), Path(folder)
    records.begun_at, records.seconds = 0, {"elapsed": 10.0, "collect": 4.0, "update": 3.0, "evaluate": 2.0}
    for iteration in range(1, rows + 1):
        values = {"rollout/ep_rew_mean": slope * iteration, "train/approx_kl": 0.02, "train/clip_fraction": 0.2}
        more = {
            "train/explained_variance": 0.5,
            "train/value_loss": 3.0 / iteration,
            "time/iterations": float(iteration),
        }
        records.train.add(100 * iteration, {**values, **more, "time/fps": 1000.0, "time/time_elapsed": iteration / 2})
        if iteration % 5 == 0:
            records.evaluations.add(100 * iteration, {"eval/mean_reward": slope * iteration, "eval/std_reward": 1.0})
    summary = summarize_records(
        records,
        env_steps=100 * rows,
        iterations=rows,
        episodes=[(1.0, float(length), math.nan) for length in range(10, 110)],
        latest_checkpoint=str(run / "checkpoints/last.ckpt"),
        best_checkpoint=None,
    )
    run.mkdir(parents=True)
    about = {"status": status, "seed": seed, "num_processes": 1, "hyperparameters": {**CONFIG, **config}}
    (run / "summary.json").write_text(json.dumps({**about, **summary}))
    return run


def log(run: Path, rows: int, *, slope: float = 1.0, clock: float = 0.5, since: int = 0) -> None:
    """``metrics.csv`` as a run of so many iterations has it, or one that went on after some."""
    names = "step,time/iterations,time/time_elapsed,time/collect,time/update,rollout/ep_rew_mean,eval/mean_reward"
    lines = [f"{100 * i},{i},{clock * (i - since)},0.25,0.125,{slope * i}," for i in range(since + 1, rows + 1)]
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.csv").write_text("\n".join([names, *lines, f"{100 * rows},,,,,,{slope * rows}"]) + "\n")


class Page(HTMLParser):
    """What a page consists of; every tag that is opened is closed in its turn."""

    VOID = ("meta", "br", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text, self.tags, self.ids, self.links = "", [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        found = dict(attrs)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def page_of(run: Path) -> Page:
    return Page(run_page(read_run(run), run))


def fails(*words: object) -> str:
    with pytest.raises(SystemExit) as caught:
        main(list(map(str, words)))
    return str(caught.value.code)


@pytest.mark.parametrize("runs", [3, 4, 5, 10])
def test_the_middle_of_runs_is_the_mean_without_the_outer_quarters(runs):
    values = np.random.default_rng(runs).normal(size=(runs, 7)) ** 3
    middle, low, high = interval(values)
    np.testing.assert_allclose(middle, trim_mean(values, 0.25))
    assert (values.min(0) <= low + 1e-9).all()
    assert (low <= middle + 1e-9).all()
    assert (middle <= high + 1e-9).all()
    assert (high <= values.max(0) + 1e-9).all()


def test_the_ends_of_an_interval_are_percentiles_of_the_bootstrap():
    values = np.random.default_rng(0).normal(size=(8, 1))
    _, low, high = interval(values)
    found = bootstrap((values,), lambda one, axis: trim_mean(one, 0.25, axis), method="percentile", rng=1)
    assert (low[0], high[0]) == pytest.approx(
        (found.confidence_interval.low[0], found.confidence_interval.high[0]), abs=0.1
    )


def test_one_or_two_runs_have_a_mean_and_no_interval_and_none_has_neither():
    mean, low, high = interval(np.array([[1.0, np.nan, 1.0], [np.nan, np.nan, 3.0]]))
    np.testing.assert_equal([mean, low, high], [[1.0, np.nan, 2.0], [np.nan] * 3, [np.nan] * 3])


def test_the_interval_of_ten_normal_numbers_holds_the_mean_in_nine_of_ten_cases():
    values = np.random.default_rng(0).normal(size=(10, 2_000))
    _, low, high = interval(values)
    assert 0.88 < ((low < 0) & (high > 0)).mean() < 0.96


def test_a_point_of_a_group_takes_the_runs_that_got_there():
    """Lines of slope 1, 3 and 5: their mean has slope 3 up to where the first one ends, then 4, and no interval."""
    lines = [(1.0, 10), (3.0, 20), (5.0, 20)]
    runs = [read_run(leave(f"run_{slope}", seed=int(slope), slope=slope, rows=rows)) for slope, rows in lines]
    (group,) = grouped(runs)
    *faint, curve = curves_of(group, "rollout/ep_rew_mean", 0)
    assert [line.values for line in faint] == [run.column("rollout/ep_rew_mean")[1] for run in runs]
    steps, mean = np.array(curve.steps), np.array(curve.values)
    np.testing.assert_allclose(mean, np.where(steps <= 1000, 3.0, 4.0) * steps / 100)
    np.testing.assert_array_equal(np.isnan(curve.low), steps > 1000)
    np.testing.assert_array_less(curve.low[:10], mean[:10])


def test_runs_that_differ_in_their_seed_alone_are_one_group_and_groups_are_named_by_what_differs():
    runs = [read_run(leave(f"r{i}", seed=i, clip_range=clip)) for i, clip in enumerate([0.2, 0.2, 0.1])]
    groups = grouped(runs)
    assert [(group.label, len(group.runs)) for group in groups] == [("clip_range=0.2", 2), ("clip_range=0.1", 1)]
    assert [(group.label, len(group.runs)) for group in grouped(runs, ["gamma"])] == [("CartPole-v1", 3)]
    assert [group.label for group in grouped(runs, ["run"])] == ["r0", "r1", "r2"]


def test_a_setting_that_is_a_schedule_makes_groups_by_its_name():
    runs = [read_run(leave(f"r{end}", clip_range={"start": 0.2, "end": end})) for end in (0.0, 0.1)]
    labels = [group.label for group in grouped(runs, ["clip_range"])]
    assert labels == ["clip_range.end=0.0", "clip_range.end=0.1"]


def test_config_files_make_groups_though_their_folders_differ():
    runs = []
    for seed in (1, 2):
        run = leave(f"r{seed}")
        (run / "config.yaml").write_text(
            f"seed_everything: {seed}\nmodel: {{env: CartPole-v1}}\ntrainer: {{default_root_dir: {run}, devices: 1}}\n"
        )
        runs.append(read_run(run))
    assert len(grouped(runs)) == 1


def test_a_page_is_well_formed_and_needs_nothing_beside_itself():
    page = page_of(leave("run"))
    assert all(link.startswith("data:image/svg+xml;base64,") for link in page.links)
    assert len(page.links) == 7  # return, KL, clip fraction, explained variance, value loss, speed, lengths
    assert len(set(page.ids)) == len(page.ids)
    for said in ("CartPole-v1 · run", "finished", "2,000", "evaluate 20 % (2.0 s)", "gamma: 0.99", "last.ckpt"):
        assert said in page.text


def test_a_page_has_colours_for_the_dark_and_lines_for_narrow_windows():
    text = run_page(read_run(leave("run")), Path("run"))
    assert set(re.findall(r"var\(--(\w+)\)", text)) <= set(re.findall(r"--(\w+):", text))
    dark = text.partition("prefers-color-scheme:dark")[2].partition("\n*{")[0]
    assert "[class^=c]{filter:invert(1) hue-rotate(180deg)}" in dark
    assert 'class="chart"' in text
    assert 'name="viewport" content="width=device-width' in text


def test_the_same_run_is_the_same_page():
    run = leave("run")
    assert run_page(read_run(run), run) == run_page(read_run(run), run)


def test_a_report_is_drawn_within_three_seconds():
    run = leave("run", rows=2048)
    started = time.process_time()
    draw_report(run)
    assert time.process_time() - started < 3


@pytest.mark.parametrize("chart", CHARTS, ids=lambda chart: chart.title)
def test_a_chart_shows_its_curve_within_its_axes(chart):
    drawn = to_svg(draw(chart, [Curve("one", [0.0, 100.0], [0.02, 0.04]), Curve("two", [0.0], [0.03], color=1)]))
    height = float(re.search(r'viewBox="0 0 [\d.]+ ([\d.]+)"', drawn)[1])
    line = re.search(r'<path d="([^"]*)"[^>]*style="[^"]*stroke: #0969da', drawn)[1]
    ends = [float(y) for _, y in re.findall(r"[ML] ([\d.-]+) ([\d.-]+)", line)]
    assert 0 < ends[1] < ends[0] < height  # upwards is up


def test_a_healthy_range_is_drawn_and_the_thresholds_of_the_run_win():
    run = leave("run")
    (run / "health.json").write_text(
        json.dumps(
            {
                "findings": [
                    {
                        "name": "kl_high",
                        "since_step": 1200,
                        "value": 0.0812345,
                        "healthy": "0.01 to 0.03",
                        "advice": "lower it <now>",
                        "key": "--model.optimizer.lr",
                    }
                ],
                "acts": [{"step": 1300, "key": "--model.optimizer.lr", "factor": 0.5}],
                "thresholds": {"approx_kl": [0.005, 0.025], "approx_kl_alert": 0.04},
            }
        )
    )
    text = page_of(run).text
    for said in ("kl_high", "1,200", "0.0812", "lower it <now>", "--model.optimizer.lr", "factor 0.5"):
        assert said in text
    assert "healthy, 0.005 to 0.025. Dashed: alert above 0.04." in text
    assert "healthy, 0.1 to 0.3. Dashed: alert above 0.5." in text
    assert "alert below 0.3" in text
    watched = CHARTS[1].with_thresholds(read_run(run))
    assert watched.healthy == (0.005, 0.025, 0.04)


def test_without_a_health_log_the_page_says_so():
    assert "There is no health.json." in page_of(leave("run")).text


def test_a_small_video_is_in_the_page_and_a_large_one_is_linked(monkeypatch):
    run = leave("run")
    (run / "videos").mkdir()
    (run / "videos/eval-0.mp4").write_bytes(b"picture")
    assert "data:video/mp4;base64,cGljdHVyZQ==" in page_of(run).links
    monkeypatch.setattr("ppo_lightning.tools.report.EMBED_BYTES", 3)
    assert page_of(run).links.count("videos/eval-0.mp4") == 2


def test_a_killed_run_is_drawn_from_its_table():
    log(Path("run"), 10)
    with Path("run/metrics.csv").open("a") as table:
        table.write("1100,1")  # cut off
    run = read_run(Path("run"))
    assert run.summary["status"] == "running, or killed"
    assert run.column("rollout/ep_rew_mean") == ([100 * i for i in range(1, 11)], list(range(1, 11)))
    assert run.column("eval/mean_reward") == ([1000], [10])
    assert run.summary["elapsed_time_sec"] == 5
    assert run.summary["time_split"] == {"collect": 2.5, "update": 1.25, "evaluate": 0, "other": 1.25}
    assert "running, or killed" in page_of(Path("run")).text


def test_the_table_of_a_run_that_was_killed_twice_has_each_step_once():
    """It went on from step 400, and the rows of the steps that were lost are still there."""
    run = Path("run")
    log(run, 10)
    first = (run / "metrics.csv").read_text()
    log(run, 8, slope=2.0, since=4)
    (run / "metrics.csv").write_text(first + (run / "metrics.csv").read_text().partition("\n")[2])
    found = read_run(run)
    steps, returns = found.column("rollout/ep_rew_mean")
    assert steps == [100, 200, 300, 400, 500, 600, 700, 800]
    assert returns == [1, 2, 3, 4, 10, 12, 14, 16]
    assert found.column("eval/mean_reward") == ([800], [16])
    assert (found.summary["global_step"], found.summary["elapsed_time_sec"]) == (800, 4)


def test_an_evaluation_that_arrives_late_keeps_its_step():
    log(Path("run"), 10)
    table = Path("run/metrics.csv")
    table.write_text(table.read_text().rpartition("1000,")[0] + "400,,,,,,4.5\n")
    run = read_run(Path("run"))
    assert run.column("eval/mean_reward") == ([400], [4.5])
    assert run.summary["global_step"] == 1000


def test_what_a_table_has_before_this_run_counts_for_no_speed():
    log(Path("run"), 20, since=10)  # in a folder of its own, from the checkpoint of another
    assert read_run(Path("run")).summary["training_fps"] == 1000 / 5


def test_infinity_in_a_table_is_neither_drawn_nor_best():
    log(Path("run"), 10)
    table = Path("run/metrics.csv")
    table.write_text(table.read_text().replace("0.125,3.0,", "0.125,inf,"))
    run = read_run(Path("run"))
    assert 300 not in run.column("rollout/ep_rew_mean")[0]
    assert run.summary["best_train_metrics"]["rollout/ep_rew_mean"] == 10


def test_a_long_table_is_read_into_bounded_space():
    log(Path("run"), 5000)
    steps, returns = read_run(Path("run")).column("rollout/ep_rew_mean")
    assert len(steps) <= 2048
    assert returns == [step / 100 for step in steps]
    assert steps[-1] == 500_000


def test_tables_under_other_names_are_read_whatever_else_is_logged():
    """Lightning adds its ``epoch``, PufferLib's word for iterations, to what a user logs."""
    run = leave("run", rows=1, metric_names="pufferlib")
    (run / "metrics.csv").write_text(
        "step,epoch,uptime,environment/episode_return,mine\n100,1,0.5,7,\n100,0,,,3\n200,2,1.0,8,\n200,1,,,3\n"
    )
    found = read_run(run)
    assert found.column("rollout/ep_rew_mean") == ([100, 200], [7, 8])
    assert found.summary["final_iteration"] == 2


def test_the_table_wins_where_it_goes_further_than_the_summary():
    run = leave("run", rows=10)
    log(run, 10)
    assert read_run(run).summary["status"] == "finished"
    log(run, 15)
    found = read_run(run)
    assert (found.summary["global_step"], found.summary["seed"]) == (1500, 1)
    assert found.config["model"]["env"] == "CartPole-v1"


def test_the_learning_curve_is_drawn_from_summary_or_table():
    log(Path("killed"), 10)
    for run in (leave("ended"), Path("killed")):
        assert draw_learning_curve(run) == run / "learning_curve.png"
        assert (run / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert draw_learning_curve("nowhere") is None


def test_a_learning_curve_that_cannot_be_drawn_is_a_warning(monkeypatch):
    def fails(*_):
        raise AttributeError("_ARRAY_API not found")

    monkeypatch.setattr("ppo_lightning.tools.charts.draw", fails)
    run = leave("ended")
    with pytest.warns(UserWarning, match="learning_curve.png was not drawn .AttributeError: _ARRAY_API not found"):
        assert draw_learning_curve(run) is None


def test_killed_runs_of_a_trainer_that_differ_in_their_seed_are_one_group():
    runs = []
    for seed in (1, 2):
        run = Path(f"logs/version_{seed}")
        log(run, 5)
        (run / "hparams.yaml").write_text(f"env: CartPole-v1\ngamma: 0.9\nseed: {seed}\nprocesses: 1\n")
        runs.append(read_run(run))
    assert [run.config["seed_everything"] for run in runs] == [1, 2]
    (group,) = grouped(runs)
    assert group.runs == runs
    finished = leave("logs/version_3", seed=3)
    (Path("logs/version_3/hparams.yaml")).write_text("env: CartPole-v1\ngamma: 0.9\nseed: 3\nprocesses: 1\n")
    runs.append(read_run(finished))
    (group,) = grouped(runs)
    assert group.runs == runs, "one that has ended is in it, too"


def test_the_command_draws_one_page_of_a_folder_of_runs(monkeypatch, capsys):
    for index in (0, 1, 10):
        leave(f"logs/version_{index}", seed=index, clip_range=0.1 if index else 0.2)
    (Path("logs/version_1/report.html")).write_text("")
    monkeypatch.setattr(sys, "argv", ["ppo-lightning", "report", "logs", "--out", "pages/all.html"])
    console()
    assert "report of 3 runs  pages/all.html" in capsys.readouterr().out
    page = Page(Path("pages/all.html").read_text())
    assert page.links.count("../logs/version_1/report.html") == 1
    for said in ("3 runs", "clip_range=0.1 (2 runs)", "clip_range=0.2 (1 run)", "95 % interval"):
        assert said in page.text
    assert [folder.name for folder in run_folders(Path("logs"))] == ["version_0", "version_1", "version_10"]


def test_a_run_that_is_named_twice_counts_once():
    run = leave("logs/version_0")
    leave("logs/version_1", seed=2)
    main([str(run), "logs", "--out", "page.html"])
    assert "CartPole-v1 (2 runs)" in Path("page.html").read_text()


def test_names_are_text_and_links_lead_where_they_say():
    run = leave("logs/x:y #1%41?<b>", env="<script>&", status="stopped by ValueError: <i>\nno")
    (run / "videos").mkdir()
    (run / "videos/a #1.mp4").write_bytes(b"")
    assert draw_report(run) == run / "report.html"
    page = page_of(run)
    assert "videos/a%20%231.mp4" in page.links
    assert not {"script", "b", "i"} & set(page.tags) - {"i"}
    assert "stopped by ValueError: <i>\nno" in page.text
    leave("logs/other")
    main(["logs", "--out", "page.html"])
    page = Page(Path("page.html").read_text())
    (link,) = [link for link in page.links if not link.startswith("data:")]
    assert Path(unquote(link)) == run / "report.html"
    assert ":" not in link
    assert not {"script", "b"} & set(page.tags)
    assert "<script>&" in page.text


def test_returns_of_different_environments_share_no_axes_and_each_group_has_a_name():
    """With more than three differences, the folder tells groups apart."""
    many = [{"env": "A-v0"}, {"env": "B-v0", "gamma": 0.9}, {"env": "B-v0", "gamma": 0.9, "x": 1, "y": 2, "z": 3}]
    runs = [leave(f"{'abc'[index]}/version_0", **config) for index, config in enumerate(many)]
    for run in runs[:2]:
        (run / "config.yaml").write_text(f"trainer: {{devices: {run}}}\nmodel: {json.dumps(many[runs.index(run)])}")
    groups = grouped([read_run(run) for run in runs])
    assert len({group.label for group in groups}) == 3
    assert groups[0].label.startswith("env=A-v0, ")
    page = comparison(groups, Path("."))
    alone, both = (part.partition("</section>")[0] for part in page.split("<section>")[1:3])
    assert alone.startswith("<h2>A-v0</h2>")
    assert both.startswith("<h2>B-v0</h2>")
    assert (alone.count("Return, evaluation</h3>"), both.count("Return, evaluation</h3>")) == (1, 1)
    assert "env=A-v0" not in both


def test_one_evaluation_of_each_run_is_a_point_with_a_band():
    runs = [read_run(leave(f"r{seed}", seed=seed, slope=seed, rows=1)) for seed in (1, 2, 3)]
    curves = curves_of(grouped(runs)[0], "rollout/ep_rew_mean", 0)
    assert (curves[-1].steps, list(curves[-1].values)) == ([100], [2])
    drawn = to_svg(draw(CHARTS[0], curves))
    assert len(re.findall(f"<use [^>]*{COLORS[0]}", drawn)) == 5
    assert re.search(f'fill-opacity: 0.18; stroke: {COLORS[0]}; [^"]*stroke-width: 3', drawn)


@pytest.mark.parametrize(("value", "text"), [(None, "–"), (12345.6, "12,346"), (-37.738, "-37.74"), (2e7, "2e+07")])
def test_numbers_are_legible(value, text):
    assert number(value) == text


def test_the_command_draws_the_page_of_one_run_in_its_folder():
    run = leave("logs/version_0")
    main([str(run)])
    assert (run / "report.html").read_text() == run_page(read_run(run), run)


def test_what_the_command_cannot_use_ends_in_one_sentence(monkeypatch):
    assert "nowhere is not the folder of a run" in fails("nowhere")
    run = leave("run")
    assert "--group gama: no run has such a setting" in fails(run, leave("other"), "--group", "gama")
    assert "cannot be written" in fails(run, "--out", "run/summary.json/page.html")
    (run / "health.json").write_text("{")
    assert "health.json is not valid JSON" in fails(run)
    (run / "health.json").unlink()
    Path("text").mkdir()
    Path("text/metrics.csv").write_text("step,loss\nhello,1\n1,2\n")
    assert "row 1 of text/metrics.csv contains text" in fails("text")
    monkeypatch.setattr(report, "can_draw", lambda: False)
    assert 'pip install "ppo-lightning[plot]"' in fails(run)


def test_a_run_without_anything_is_a_page_nevertheless():
    empty = {"status": "stopped by ValueError: no", "seed": 1, "num_processes": 1, "hyperparameters": {}}
    summary = summarize_records(
        Records(), env_steps=0, iterations=0, episodes=[], latest_checkpoint=None, best_checkpoint=None
    )
    run = SavedRun(Path("run"), {**empty, **summary}, {}, {}, [])
    page = Page(run_page(run, Path("run")))
    assert "stopped by ValueError: no" in page.text
    assert page.links == []
