import base64
import re
from html.parser import HTMLParser

import pytest

from sdpo.report.page import build_page, differing_settings, write_page
from sdpo.report.run_dir import read_run, read_runs

VOID = {"meta", "link", "img", "source", "br"}


class Page(HTMLParser):
    """A page taken apart; fails where an element is not closed in its place."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.addresses, self.text = [], [], [], ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data + "\n"


@pytest.fixture
def runs(write_run):
    common = {"data": {"train_batch_size": 32}, "seed": 1}
    sdpo = write_run(
        "sdpo",
        {0: {"val-core/t/acc/mean@1": 0.0}, 7: {"val-core/t/acc/mean@1": 0.9844, "actor/lr": 1e-5}},
        output_dir="sdpo",
        self_distillation={"policy_loss_weight": 0.0, "demonstration_source": "successful_rollout"},
        **common,
    )
    grpo = write_run(
        "grpo",
        {0: {"val-core/t/acc/mean@1": 0.0}, 7: {"val-core/t/acc/mean@1": 0.0156}},
        output_dir="grpo",
        self_distillation={"policy_loss_weight": 1.0, "demonstration_source": "successful_rollout"},
        optim={"lr": 0.1},
        **common,
    )
    return read_runs([sdpo, grpo])


def test_several_runs_on_one_page(runs, tmp_path):
    path = write_page(runs, tmp_path / "report.html", b"light", b"dark")
    page = Page(path.read_text(encoding="utf-8"))
    for text in (
        "sdpo, grpo",
        "0.984",
        "0.016",
        "actor/lr",
        "1e-05",
        "Learning rate of the step's last optimizer step.",
    ):
        assert text in page.text
    assert page.tags.count("h2") == 3  # the differences and each run


def test_images_are_embedded_and_no_url_is_loaded(runs):
    html = build_page(runs, b"light", b"dark")
    page = Page(html)
    pictures = [base64.b64encode(picture).decode() for picture in (b"dark", b"light")]
    assert page.addresses == ["data:,", *(f"data:image/png;base64,{picture}" for picture in pictures)]
    assert "script" not in page.tags
    assert not re.search(r"https?:|url\(|@import", html)


def test_only_differing_settings_are_listed(runs):
    assert differing_settings(runs) == {"self_distillation.policy_loss_weight": [0.0, 1.0], "optim.lr": [None, 0.1]}
    section = Page(build_page(runs, b"")).text.split("Different settings")[1].split("Metrics of")[0]
    cells = ["setting", "sdpo", "grpo", "self_distillation.policy_loss_weight", "0.0", "1.0", "optim.lr", "null", "0.1"]
    assert section.split() == [*cells, "sdpo", str(runs[0].path)]


def test_equal_settings_and_a_single_run(runs):
    assert "<h2>Different settings</h2><p>None.</p>" in build_page([runs[0], runs[0]], b"")
    assert "Different settings" not in build_page(runs[:1], b"")


def test_all_settings_have_a_help_text(runs):
    text = Page(build_page(runs[:1], b"")).text
    for shown in (
        "data.train_batch_size",
        "32",
        "Prompts per step.",
        "self_distillation.demonstration_source",
        "successful_rollout",
    ):
        assert shown in text


def test_last_rollouts_are_shown_and_escaped(runs):
    folder = runs[0].path / "rollouts"
    folder.mkdir()
    (folder / "step_9.txt").write_text("ninth step")
    (folder / "step_10.txt").write_text('<script>alert("x")</script> & </pre>\x00\x1b[0m')
    html = build_page(runs, b"")
    assert "<script>" not in html
    assert "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt; &amp; &lt;/pre&gt;\ufffd\ufffd[0m</pre>" in html
    page = Page(html)
    assert "Sampled rollouts, step_10.txt" in page.text and "ninth step" not in page.text
    assert page.tags.count("pre") == 1


def test_long_rollouts_are_truncated(runs):
    folder = runs[0].path / "rollouts"
    folder.mkdir()
    (folder / "step_1.txt").write_text("x" * 300_000)
    html = build_page(runs, b"")
    assert len(html) < 200_000
    assert "[... the rest is in step_1.txt]" in html


def test_all_texts_of_a_run_are_escaped(write_run):
    hostile = "<b>\"&'"
    rows = {1: {f"val-core/{hostile}/acc/mean@1": 0.5, f"{hostile}/metric": 1.0}}
    run = read_run(write_run("a", rows, tracking={"name": hostile}, model={hostile: hostile}))
    other = read_run(write_run("b", rows, model={hostile: hostile * 2}))
    html = build_page([run, other], b"")
    assert "<b>" not in html
    assert Page(html).text.count(hostile) >= 8


def test_page_of_a_run_without_settings_and_accuracy(write_run):
    run = read_run(write_run("a", {1: {"actor/lr": 0.5}}))
    text = Page(build_page([run], b"")).text
    assert "actor/lr" in text and "All settings" not in text
