"""The report of a run and the comparison of several: what they show, that they are whole, and that nothing breaks."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from report_helpers import CHROMIUM, TABLE, numbers_of, open_in_browser, write_run
from training_helpers import run_in_process, tiny_run

import compare_runs
from trainkit.errors import UserError
from trainkit.report import pictures
from trainkit.report.charts import Series, format_number, line_chart, linear_ticks, log_ticks
from trainkit.report.metrics import LINES, Curve, curve, envelope, read_rows, smoothed, training_seconds
from trainkit.report.summary import format_duration
from trainkit.report.write import write_report
from trainkit.training.outputs import Outputs


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "photos-64")


def page_of(folder):
    return write_report(folder).read_text(encoding="utf-8")


def compare(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["compare_runs.py", *map(str, words)])
    compare_runs.main()


def test_the_report_shows_what_the_run_measured(run):
    (run / "sampling_table.json").write_text(json.dumps(TABLE))
    page = page_of(run)
    for fact in (
        "photos-64", "3,200", "1 min 20 s", "512 MiB", "Held-out loss by noise level", "timesteps 750–1000",
        "KID during training", "KID by sampling steps", "efficientnet-lite0", "learning_rate", "finished",
    ):  # fmt: skip
        assert fact in page, fact
    assert page.count('data-step="') == 3 and page.count(" hidden>") >= 2
    assert "<b>0.125 ± 0.01</b>" in page, "the best row of the table"
    assert re.search(r"<tr class=best><td class=\"short\">5</td><td class=\"short\">dpmsolver", page)
    for points in re.findall(r'points="([^"]*)"', page):
        numbers_of(points)


def test_the_page_is_whole_and_loads_nothing(run):
    page = page_of(run)
    assert not re.search(r"(?:src|href)=[\"'](?!data:|[\w-]+\.(?:md|png|json|jsonl|yaml)[\"'])", page)
    assert "http" not in page.replace('http-equiv="Content-Security-Policy"', "")
    assert "default-src 'none'" in page


def test_names_are_text_and_not_markup(tmp_path):
    evil = "</script><script>alert(1)</script>"
    run = write_run(tmp_path / "x", options={"caption_column": evil}, name=evil, title=evil)
    (run / "sampling_table.json").write_text(json.dumps(TABLE).replace("dpmsolver", evil.replace("/", "\\/")))
    assert "alert(1)</script>" not in page_of(run)


@pytest.mark.parametrize(
    "damage",
    [
        lambda run: (run / "metrics.jsonl").write_text('{"step": 1, "loss"\n[]\n3\n{"step": "x"}\n\xff'),
        lambda run: (run / "report.json").write_text("{"),
        lambda run: (run / "report.json").unlink(),
        lambda run: (run / "sampling_table.json").write_text("[]"),
        lambda run: (run / "scores.json").write_text('{"scores": 3}'),
        lambda run: (run / "samples" / "0000400.png").write_bytes(b"no picture"),
        lambda run: (run / "samples" / "notes.png").write_bytes(b""),
        lambda run: (run / "distillation.json").write_text("nothing"),
        lambda run: (run / "metrics.jsonl").write_text(""),
    ],
)
def test_a_damaged_file_costs_its_part_and_nothing_else(run, damage):
    damage(run)
    page = page_of(run)
    assert page.endswith("</html>\n") or page.endswith("</html>")
    assert "photos-64" in page


def test_a_corrupt_line_is_left_out(run):
    whole = len(read_rows(run))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 401, "loss": 0.0')
    assert len(read_rows(run)) == whole
    assert "Training loss" in page_of(run)


def test_a_run_without_validation_scores_or_samples_has_none_of_these_parts(tmp_path):
    page = page_of(write_run(tmp_path / "bare", validation=False, samples=0))
    assert "Training loss" in page
    for part in ("Held-out loss", "KID", "Schedulers and steps", 'id="samples"', "Training images", "Students"):
        assert part not in page, part


def test_what_was_left_out_of_many_grids_is_said(tmp_path):
    page = page_of(write_run(tmp_path / "many", samples=40))
    assert page.count('data-step="') == pictures.SHOWN_GRIDS
    assert "12 of 40 grids are shown" in page
    steps = [int(step.replace(",", "")) for step in re.findall(r'data-step="([\d,]+)"', page)]
    assert steps == sorted(steps) and steps[-1] == 400


def test_large_grids_stay_within_their_limit(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), dtype=np.uint8)
    uri, width, height = pictures.embedded(Image.fromarray(noise))
    assert len(uri) < 1.5 * pictures.GRID_BYTES and max(width, height) <= pictures.GRID_SIDE
    run = write_run(tmp_path / "large")
    for path in (run / "samples").glob("*.png"):
        Image.fromarray(noise[:900, :900]).save(path)
    assert len(page_of(run)) < 4 * 1.5 * pictures.GRID_BYTES + 100_000


@pytest.mark.slow
def test_a_report_of_a_long_run_takes_less_than_a_second(tmp_path):
    run = write_run(tmp_path / "long", steps=100_000)
    page_of(run)  # imports and templates
    started = time.process_time()
    page = page_of(run)
    assert time.process_time() - started < 1.0
    assert len(page) < 400_000
    assert len(read_rows(run)) < 2.5 * LINES
    assert len(curve(read_rows(run), "validation_loss")) == 1000, "measurements are never thinned"


def test_runs_side_by_side(tmp_path, monkeypatch, capsys):
    one = write_run(tmp_path / "one", options={"learning_rate": 1e-3, "optimizer": "muon"})
    two = write_run(tmp_path / "two", batch=16, options={"learning_rate": 2e-3, "optimizer": "muon"})
    compare(monkeypatch, one, two, "--output_file", tmp_path / "compare.html")
    assert capsys.readouterr().out == f"wrote {tmp_path / 'compare.html'}\n"
    page = (tmp_path / "compare.html").read_text()
    differing = page[page.index("Settings that differ") :]
    assert "<th>learning_rate</th><td>0.001</td><td>0.002</td>" in differing
    assert "<th>optimizer</th>" not in differing
    assert "images seen</text>" in page, "their global batches differ"
    charts = [json.loads(data.replace("&#34;", '"')) for data in re.findall(r'data-chart="([^"]*)"', page)]
    loss = charts[0]["series"]
    assert [each["name"] for each in loss] == ["one", "two"] and loss[1]["x"][-1] == 2 * loss[0]["x"][-1]


def test_one_run_without_a_file_gets_its_report_again(run, monkeypatch):
    page = page_of(run)
    scores = {"scores": {"kid": 0.0625, "kid_se": 0.001}, "num_generated": 100, "num_reference": 500, "sampling": None}
    (run / "scores.json").write_text(json.dumps(scores))
    compare(monkeypatch, run)
    assert "0.0625 ± 0.001" in (run / "report.html").read_text() and "0.0625" not in page


def test_the_state_of_a_run_is_true_whatever_happened_to_it_since(run):
    def shown(**record):
        written = json.loads((run / "report.json").read_text()) | {"updated": "2026-01-02 03:04 UTC"} | record
        (run / "report.json").write_text(json.dumps(written))
        return re.sub(r"<[^>]+>|\s+", " ", page_of(run).partition("<header>")[2].partition("</header>")[0])

    assert re.search("running or stopped +last written 2026-01-02 03:04 UTC", shown(state="training"))
    assert re.search("finished +2026-01-02 03:04 UTC", shown(state="finished"))
    assert re.search("stopped +2026-01-02 03:04 UTC", shown(state="stopped"))


@pytest.mark.slow
def test_compare_runs_needs_no_torch(run, tmp_path):
    """It answers at once: torch and diffusers take seconds to import."""
    program = (
        "import sys; sys.argv[1:] = sys.argv[2:]; sys.path.insert(0, '.'); import compare_runs; compare_runs.main(); "
        "assert not {'torch', 'diffusers', 'datasets', 'matplotlib'} & sys.modules.keys()"
    )
    for words in ([run], [run, run, "--output_file", tmp_path / "both.html"]):
        done = subprocess.run(
            [sys.executable, "-c", program, "compare_runs.py", *words], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


def test_mistakes_of_compare_runs(run, tmp_path, monkeypatch):
    (tmp_path / "mine.html").write_text("<html>mine</html>")
    cases = [
        ([], "no run is given"),
        ([tmp_path], "has no metrics.jsonl"),
        ([run, run], "--output_file is missing"),
        ([run, "--output_file", tmp_path], "is a folder"),
        ([run, "--output_file", tmp_path / "mine.html"], "exists and is not such a page"),
    ]
    for words, message in cases:
        with pytest.raises(UserError, match=message):
            compare(monkeypatch, *words)
    assert (tmp_path / "mine.html").read_text() == "<html>mine</html>"


def test_curves_keep_their_extremes_and_their_mean():
    values = np.sin(np.arange(10_000)) + 2
    values[1234], values[4321] = 50, 0.01
    whole = Curve(np.arange(1, 10_001), values)
    thin = envelope(whole)
    assert len(thin) <= 800 and thin.values.max() == 50 and thin.values.min() == 0.01
    assert (np.diff(thin.steps) > 0).all()
    assert smoothed(whole).last == pytest.approx(values[-200:].mean())
    assert len(smoothed(Curve(np.array([5]), np.array([1.0])))) == 1


def test_training_time_is_that_of_the_images_at_their_speeds():
    rows = [{"step": step, "images": 8 * step, "loss": 1.0} for step in range(1, 21)]
    rows[9]["images_per_s"], rows[19]["images_per_s"] = 40.0, 20.0
    assert training_seconds(rows) == pytest.approx(80 / 40 + 80 / 20)
    assert training_seconds(rows[:5]) is None


def test_ticks_and_numbers():
    assert linear_ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert log_ticks(0.01, 10) == pytest.approx([0.01, 0.1, 1, 10])
    assert log_ticks(0.1, 1) == pytest.approx([0.1, 0.2, 0.5, 1])
    assert len(log_ticks(1e-12, 1e12)) <= 6 and len(log_ticks(0.0171, 0.0173)) >= 2
    assert [format_number(x) for x in (0.0, 123456.0, 12.345, 1e-7)] == ["0", "123,456", "12.35", "1e-07"]
    assert [format_duration(s) for s in (3, 65, 3600, 90061)] == ["3 s", "1 min 5 s", "1 h", "1 d 1 h"]


def test_a_constant_curve_and_values_a_log_axis_cannot_show():
    steps = np.arange(1, 4)
    assert line_chart("x", [Series("a", Curve(steps, np.zeros(3)))], log=True) is None
    for values in (np.zeros(3), np.full(3, 7.0), np.array([1.0, 0.0, 2.0])):
        for log in (False, True):
            chart = line_chart("x", [Series("a", Curve(steps, values))], log=log)
            if chart is not None:
                for points in re.findall(r'points="([^"]*)"', chart.svg):
                    numbers_of(points)


@pytest.fixture(scope="module")
def trained(image_folder, tiny_unet, cache_dir, tmp_path_factory):
    """A run of classes with previews, half of it after a resume; and report.json of its first half."""
    folder = tmp_path_factory.mktemp("trained") / "classes"
    flags = {"preview_steps": 4, "checkpointing_steps": 4}
    with pytest.MonkeyPatch.context() as patch:
        arguments = tiny_run(image_folder, tiny_unet, cache_dir, folder, max_train_steps=4, **flags)
        run_in_process(patch, "train_conditional", arguments)
        first = json.loads((folder / "report.json").read_text())
        arguments = tiny_run(
            image_folder, tiny_unet, cache_dir, folder, max_train_steps=8, resume_from_checkpoint="latest", **flags
        )
        run_in_process(patch, "train_conditional", arguments)
    return folder, first


@pytest.mark.slow
def test_training_writes_the_report_at_each_preview_and_at_the_end(trained):
    folder, first = trained
    record, page = json.loads((folder / "report.json").read_text()), (folder / "report.html").read_text()
    assert record["state"] == "finished" and (record["step"], record["max_train_steps"]) == (8, 8)
    assert record["wall_time_s"] > first["wall_time_s"] > 0, "both parts of a resumed run"
    assert record["preview"]["how"] == ", 3 sampling steps, guidance 2"
    assert record["dataset"]["num_images"] == 37 and record["versions"]["torch"]
    assert page.count('data-step="') == 2 and '<th title="round">round</th>' in page
    assert "37" in page and "data:image/" in page and "Class-conditional" in page
    assert "Training images, drawn at random" in page
    assert "hub_token" not in page and "hub_token" not in (folder / "report.json").read_text()


@pytest.mark.slow
def test_a_report_that_fails_warns_in_one_line_and_training_goes_on(
    image_folder, tiny_unet, cache_dir, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("trainkit.training.run_report.write_report", lambda *given: 1 / 0)
    arguments = tiny_run(image_folder, tiny_unet, cache_dir, tmp_path / "out", max_train_steps=2)
    run_in_process(monkeypatch, "train_unconditional", arguments)
    printed = "".join(capsys.readouterr())
    assert "WARNING: report.html is not written: division by zero" in printed and "Traceback" not in printed
    assert (tmp_path / "out" / "model_index.json").is_file() and not (tmp_path / "out" / "report.html").exists()


@pytest.mark.slow
def test_a_stopped_run_has_a_report(image_folder, tiny_unet, cache_dir, tmp_path, monkeypatch):
    def stop(outputs):
        if outputs.run.step == 2:
            os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(Outputs, "write_due", stop)
    arguments = tiny_run(image_folder, tiny_unet, cache_dir, tmp_path / "out", max_train_steps=20)
    run_in_process(monkeypatch, "train_unconditional", arguments)
    record = json.loads((tmp_path / "out" / "report.json").read_text())
    assert record["state"] == "stopped" and 2 <= record["step"] < 20
    assert "stopped" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_browser_shows_the_page_without_an_error(run, tmp_path):
    (run / "sampling_table.json").write_text(json.dumps(TABLE))
    page = write_report(run)
    dom, reports = open_in_browser(page, tmp_path)
    assert not reports, reports
    assert dom.count('class="tip"') == dom.count("data-chart="), "the script has come to its end"
    for name, width, flags in (("wide", 1200, ()), ("phone", 375, ("--blink-settings=preferredColorScheme=0",))):
        open_in_browser(page, tmp_path, tmp_path / f"{name}.png", width, 2400, flags)
        pixels = np.asarray(Image.open(tmp_path / f"{name}.png").convert("L"))
        assert pixels.shape[1] == width and pixels.std() > 5
        background = pixels[:, -2:].mean()
        assert background < 60 if name == "phone" else background > 200, "dark and light"
