"""report.html: what is in it, and that it costs a run nothing."""

import json
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from helpers.run_folders import write_facts, write_run, write_samples, write_status
from helpers.runs import assert_same_result

import train_lora
from common.text import public_text, public_value
from training.report import writer
from training.report.curves import MAX_POINTS, thinned
from training.report.page import phase_rows
from training.report.run_files import read_run
from training.report.sample_pictures import MAX_PICTURES, PictureCache, sample_series, shown_steps

HOSTILE = "a </script><script>alert(1)</script> \"quoted\" & 'single' <b>bold</b>"


class Page(HTMLParser):
    """The scripts and the texts of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.scripts: list[str] = []
        self.texts: list[str] = []
        self.images: list[str] = []
        self.tag = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tag = tag
        if tag == "script":
            self.scripts.append("")
        if tag == "img":
            self.images.append(dict(attributes)["src"])
        assert tag != "b"

    def handle_data(self, data):
        if self.tag == "script":
            self.scripts[-1] += data
        else:
            self.texts.append(data)

    def handle_endtag(self, tag):
        self.tag = ""

    @property
    def data(self) -> dict:
        """What the script reads."""
        return json.loads(self.scripts[0])


def test_the_report_of_a_run(options, run_here, tmp_path, images):
    (images / "cat.txt").write_text(HOSTILE)
    more = ["--data.validation_fraction=0.3", "--sample.every=3", "--sample.num_inference_steps=2"]
    more += ["--sample.at_start", "--sample.prompts", HOSTILE, "a dog", "--rank=3"]
    assert run_here([*options, *more]) == 0
    page = Page(tmp_path / "out" / "report.html")
    charts = {chart["id"]: chart for chart in page.data["charts"]}
    assert [*charts] == [
        *("loss", "validation", "rate", "norm", "speed", "wait", "memory", "measures", "noise"),
    ]
    assert charts["loss"]["x"] == [3, 6]
    assert charts["validation"]["x"] == [0, 6]
    assert len(charts["validation"]["series"]) == 10
    assert sum(charts["noise"]["series"][0]["values"]) == pytest.approx(100, abs=0.01)
    (run,) = page.data["samples"]
    assert run["steps"] == [0, 3, 6]
    assert len(run["prompts"]) == 2
    assert len(run["prompts"][0]["pictures"]) == 3
    text = " ".join(page.texts)
    assert text.count(HOSTILE) == 2, "the prompt, and the caption in the data"
    assert len(page.scripts) == 3, "no text has become a script"
    data_pictures = json.loads((tmp_path / "out" / "report.json").read_text())["pictures"]
    assert len(data_pictures) == 4
    assert sum(picture["is_held_out"] for picture in data_pictures) == 1
    assert "3 images for training, 1 held out" in text
    assert "finished" in text
    rows = [row.strip() for row in page.texts]
    assert rows[rows.index("rank") + 1] == "3"


def test_the_report_has_no_paths(options, run_here, tmp_path):
    assert run_here(options) == 0
    content = (tmp_path / "out" / "report.html").read_text()
    assert str(tmp_path) not in content
    assert str(tmp_path.parent) not in content
    assert train_lora.main(["report", str(tmp_path / "out")]) == 0
    assert str(tmp_path) not in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/bob/models/sd.safetensors", ".../sd.safetensors"),
        ("error:/home/bob/x", "error:.../x"),
        ("hdfs:///user/bob/x", ".../x"),
        ("in ['/home/bob smith/a', 'b']", "in ['.../a', 'b']"),
        ("/home/a/m.jsonl failed: [Errno 28] No space", ".../m.jsonl failed: [Errno 28] No space"),
        ("wrote /home/bob/out/lora.safetensors: 3", "wrote .../lora.safetensors: 3"),
        ("~/data/cats", ".../cats"),
        ("C:\\Users\\Bob\\a.png", ".../a.png"),
        ("--data.path=/home/bob/x", "--data.path=.../x"),
        ("file:///home/bob/x", ".../x"),
        ("['/home/bob/a', '/home/bob/c']", "['.../a', '.../c']"),
        ("https://huggingface.co/a/b", "https://huggingface.co/a/b"),
        ("org/model", "org/model"),
        ("data/cats", "data/cats"),
        ("3/4 of it", "3/4 of it"),
    ],
)
def test_paths_are_shortened(text, shown):
    assert public_text(text) == shown


def test_the_path_of_an_option_may_contain_spaces():
    assert public_value("/home/bob smith/my models/sd.safetensors") == ".../sd.safetensors"
    assert public_value("a fox in the snow") == "a fox in the snow"
    assert public_value("../alice/private/run") == ".../run"
    assert public_value("~al/secret/x.png") == ".../x.png"
    paths = ["/data/my dir/secret", "../al/cats"]
    text = "model /data/my dir/secret/sd.safetensors, data ../al/cats"
    assert public_text(text, paths) == "model .../secret/sd.safetensors, data .../cats"


def test_a_report_that_fails_ends_no_run(options, run_here, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no page today")

    plain, failing = tmp_path / "plain", tmp_path / "failing"
    assert run_here([*options, f"--output_dir={plain}"]) == 0
    capsys.readouterr()
    monkeypatch.setattr(writer, "run_page", fail)
    assert run_here([*options, f"--output_dir={failing}"]) == 0
    assert capsys.readouterr().out.count("RuntimeError: no page today") == 1
    assert not (failing / "report.html").exists()
    assert_same_result(plain, failing)


def test_the_report_is_written_while_the_run_trains(options, run_here, tmp_path, monkeypatch):
    """With less than its share of the time: here as often as it can."""
    written = []
    original = writer.run_page

    def page(run, *rest):
        written.append((run.condition, len(run.rows)))
        return original(run, *rest)

    monkeypatch.setattr(writer, "run_page", page)
    monkeypatch.setattr(writer, "MIN_INTERVAL", 0)
    monkeypatch.setattr(writer, "MAX_SHARE", 1e9)
    assert run_here(options) == 0
    assert written[0] == ("running", 0)
    assert written[-1] == ("finished", 2)
    assert len(written) >= 6


def test_the_share_of_time(tmp_path, monkeypatch):
    """A page that takes a second is not written again for a hundred seconds."""
    report = writer.ReportWriter(write_run(tmp_path / "run"), is_main=True)
    now = [100.0]
    monkeypatch.setattr(writer.time, "monotonic", lambda: now[0])

    def slow(*_):
        now[0] += 1
        return "page"

    monkeypatch.setattr(writer, "run_page", slow)
    report.write_if_due()
    assert report.next_at == 101 + 100
    report.write_if_due()
    assert now[0] == 101


def test_thinned_curves_keep_their_peaks():
    values: list[float | None] = [*np.random.default_rng(0).normal(size=100_000).tolist()]
    values[777], values[50_000], values[1234] = None, 1e6, -1e6
    chosen = thinned(values)
    assert len(chosen) <= MAX_POINTS
    assert {0, 50_000, 1234, 99_999} <= {*chosen}
    assert chosen == sorted(set(chosen))
    assert thinned([1.0, None]) == [0, 1]
    assert thinned([None] * 2000) == [0, 1999]


def test_many_pictures_are_left_out_evenly():
    steps = [*range(0, 1000, 10)]
    chosen = shown_steps(steps, num_prompts=4)
    assert len(chosen) * 4 <= MAX_PICTURES
    assert (chosen[0], chosen[-1]) == (0, 990)
    assert shown_steps(steps, num_prompts=1) == steps
    assert shown_steps([], num_prompts=0) == []


def test_pictures_are_made_once(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run")
    write_samples(folder, [10, 20])
    cache = PictureCache()
    first = sample_series(read_run(folder), cache, folder)
    assert len(cache.pictures) == 4
    (folder / "samples" / "lora-step00000020_01.png").write_bytes(b"damaged")
    write_samples(folder, [30])
    again = sample_series(read_run(folder), cache, folder)
    assert again.prompts[0].pictures[:2] == first.prompts[0].pictures
    assert again.prompts[1].pictures[1] is None
    assert again.prompts[0].links[0] == "./samples/lora-step00000010_00.png"


def test_a_hundred_thousand_steps_take_a_moment(tmp_path):
    """Every step is logged."""
    folder = write_run(tmp_path / "run", num_rows=100_000, log_every=1)
    started_at = time.monotonic()
    assert train_lora.main(["report", str(folder)]) == 0
    assert time.monotonic() - started_at < 20
    page = folder / "report.html"
    assert page.stat().st_size < 2e6
    losses = Page(page).data["charts"][0]["series"][0]["values"]
    assert len(losses) <= MAX_POINTS
    assert 7.0 in losses, "the peak stays"


def test_a_run_of_an_earlier_version(tmp_path):
    """Neither status nor events, nor facts; the config has an option that is gone."""
    folder = write_run(tmp_path / "run", gone="yes")
    write_samples(folder, [10])
    assert train_lora.main(["report", str(folder)]) == 0
    text = " ".join(Page(folder / "report.html").texts)
    assert "ended, or never started" in text
    assert "prompt 1" in text


def test_damaged_files_are_left_out(tmp_path):
    folder = write_run(tmp_path / "run")
    for name in ("config.yaml", "report.json", "status.json", "events.jsonl"):
        (folder / name).write_bytes(b"\xff{[")
    assert train_lora.main(["report", str(folder)]) == 0
    assert Page(folder / "report.html").data["charts"]


def test_marks_of_a_run_that_was_killed(tmp_path):
    folder = write_run(tmp_path / "run")
    events = [(0, "started"), (40, "message"), (60, "killed"), (40, "resumed"), (90, "failed")]
    lines = [
        json.dumps({"step": step, "kind": kind, "time": 1e9 + 60 * number, "text": HOSTILE})
        for number, (step, kind) in enumerate(events)
    ]
    (folder / "events.jsonl").write_text("\n".join([*lines, ""]))
    write_status(folder, state="failed", updated_at=1e9)
    assert train_lora.main(["report", str(folder)]) == 0
    page = Page(folder / "report.html")
    assert page.data["charts"][0]["marks"] == [[60, "killed"], [40, "resumed"], [90, "failed"]]
    assert "3 min 0 s" in [text.strip() for text in page.texts], "not from the kill to the start"


def test_runs_are_compared(tmp_path, monkeypatch, capsys):
    first = write_run(tmp_path / "one" / "run", rank=4)
    second = write_run(tmp_path / "two" / "run", num_rows=30, rank=8)
    write_samples(first, [10, 20])
    write_samples(second, [20, 40], num_prompts=3)
    write_facts(first, ["a cat", HOSTILE])
    monkeypatch.chdir(tmp_path)
    assert train_lora.main(["report", str(first), str(second)]) == 0
    assert "wrote comparison.html" in capsys.readouterr().out
    page = Page(tmp_path / "comparison.html")
    loss = page.data["charts"][0]
    assert [series["label"] for series in loss["series"]] == ["1: run", "2: run"]
    assert loss["x"] == [*range(10, 310, 10)]
    assert loss["series"][0]["values"][20:] == [None] * 10
    rows = [text.strip() for text in page.texts]
    assert rows[rows.index("rank") : rows.index("rank") + 3] == ["rank", "4", "8"]
    assert "output_dir" not in rows
    assert len(page.images) == 5
    assert len(page.scripts) == 3


def test_mistakes_with_the_page(tmp_path, capsys):
    folder = write_run(tmp_path / "run")
    (tmp_path / "there.html").write_text("mine")
    for out, reason in (
        ("page.txt", "must end in .html"),
        ("no/page.html", "does not exist"),
        ("there.html", "exists and is not a report"),
    ):
        assert train_lora.main(["report", str(folder), "--out", str(tmp_path / out)]) == 2
        assert reason in capsys.readouterr().err
    assert (tmp_path / "there.html").read_text() == "mine"
    out = str(tmp_path / "there.html")
    assert train_lora.main(["report", str(folder), "--out", out, "--overwrite"]) == 0
    assert train_lora.main(["report", str(folder), "--out", out]) == 0, "it is a report now"
    assert train_lora.main(["report", str(tmp_path)]) == 2
    write_status(folder)
    capsys.readouterr()
    assert train_lora.main(["report", str(tmp_path)]) == 2
    assert "Runs in it: run. Name these folders" in capsys.readouterr().err


ODD_FILES = {
    "config.yaml": [
        "model: null",
        "- a",
        "1: 2",
        "export: {name: ../../x}",
        "date: 2026-99-99",
        "tracking: null",
    ],
    "metrics.jsonl": [
        '{"step": 1, "train/loss": "x"}',
        '{"step": 1, "train/loss": {"a": [1]}}',
        '{"step": 1, "train/loss": 1' + "0" * 400 + "}",
        '{"step": 1' + "0" * 400 + "}",
        '{"step": 1, "train/loss": NaN, "validation/loss": Infinity}',
        "[" * 100_000,
    ],
    "events.jsonl": [
        '{"step": 1}',
        '{"step": 1, "kind": "killed", "time": NaN}',
        '{"step": 1, "kind": "killed", "time": 1e300}',
        '{"step": 1, "kind": "message", "time": 1, "text": "\\ud800"}',
    ],
    "report.json": [
        "[]",
        '{"prompts": [1, {}], "pictures": null, "noise_levels": {}}',
        '{"prompts": null, "planned_bytes": [], "buckets": [1], "small_images": 3}',
    ],
    "status.json": ["{}", '{"pid": -1}', "null", "[1]"],
}


@pytest.mark.parametrize(
    ("name", "content"),
    [(name, content) for name, contents in ODD_FILES.items() for content in contents],
)
def test_odd_files_are_read_as_far_as_they_go(name, content, tmp_path):
    folder = write_run(tmp_path / "run")
    write_samples(folder, [10])
    (folder / name).write_text(content + "\n")
    assert train_lora.main(["report", str(folder)]) == 0
    assert Page(folder / "report.html").data["samples"]
    assert (
        train_lora.main(["report", str(folder), str(folder), "--out", str(tmp_path / "c.html")])
        == 0
    )


def test_samples_of_earlier_prompts_are_left_out(options, run_here, tmp_path):
    more = ["--sample.every=3", "--sample.num_inference_steps=1", "--sample.prompts"]
    assert run_here([*options, *more, "a cat", "--steps=3"]) == 0
    assert run_here([*options, *more, "a dog --am 0.5"]) == 0
    page = Page(tmp_path / "out" / "report.html")
    (prompt,) = page.data["samples"][0]["prompts"]
    assert [picture is None for picture in prompt["pictures"]] == [True, False]
    assert any("strength 0.5" in text for text in page.texts)


def test_links_are_addresses_inside_of_the_folder(tmp_path):
    folder = write_run(tmp_path / "run", export={"name": "lora #1 100%"})
    (folder / "lora #1 100%.safetensors").write_bytes(b"")
    write_samples(folder, [10])
    assert train_lora.main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert 'href="./lora%20%231%20100%25.safetensors"' in page
    assert (
        train_lora.main(
            ["report", str(folder), "--out", str(tmp_path / "run" / "samples" / "x.html")]
        )
        == 0
    )
    assert 'href="../' not in (folder / "samples" / "x.html").read_text()


def test_the_last_error_of_the_report_is_said(options, run_here, monkeypatch, capsys):
    """The page fails only when it is written for the last time."""
    original = writer.run_page

    def page(run, *rest):
        if run.condition == "finished":
            raise RuntimeError("no page at the end")
        return original(run, *rest)

    monkeypatch.setattr(writer, "run_page", page)
    assert run_here(options) == 0
    assert "no page at the end" in capsys.readouterr().out


def test_the_memory_of_phases_is_the_last_that_was_measured(tmp_path):
    folder = write_run(tmp_path / "run")
    write_facts(folder, [], planned_bytes={"train": 3 * 2**30})
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 200, "memory/gpu_peak": 2.5, "memory/gpu_peak_train": 2.5}\n')
        file.write('{"step": 200, "samples/contrast": 1.5}\n')
    assert phase_rows(read_run(folder)) == [("train", 3.0, 2.5)]
