import io
import logging
import subprocess
import sys

import pytest
from rich.console import Console

from sdpo.report.console import ConsoleCallback, print_result_table
from sdpo.report.run_dir import read_run


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 0.0

    monkeypatch.setattr("sdpo.report.console.time.monotonic", lambda: Clock.now)
    return Clock


def run_and_read(max_steps, rows, clock, file=None, **console):
    file = file or io.StringIO()
    with ConsoleCallback(max_steps, Console(file=file, width=80, **console)) as callback:
        for step, values in rows:
            clock.now = 10.0 * step
            callback.on_metrics(step, values)
    return file.getvalue()


def training(step):
    return {"critic/score/mean": step / 100, "self_distillation/divergence": 2.5, "response_length/mean": 12.34}


def test_output_without_a_terminal(clock):
    rows = [(0, {"val-core/t/acc/mean@1": 0.0, "val-teacher/t/acc/mean@1": 0.9})]
    rows += [(step, training(step)) for step in range(1, 41)]
    rows[25][1]["val-core/t/acc/mean@1"] = 0.5
    lines = run_and_read(40, rows, clock).splitlines()
    assert lines[:3] == [
        "step  0/40  val 0.000  teacher 0.900",
        "step  4/40  score 0.040  divergence 2.500  length 12.3  6:00 left",
        "step  8/40  score 0.080  divergence 2.500  length 12.3  5:20 left",
    ]
    assert "step 25/40  score 0.250  divergence 2.500  length 12.3  val 0.500  2:30 left" in lines
    assert lines[-1] == "step 40/40  score 0.400  divergence 2.500  length 12.3"
    assert len(lines) == 12  # the first evaluation, ten tenths, the second evaluation


def test_no_control_codes_and_no_bar_in_a_file_even_if_colours_are_forced(clock):
    rows = [(step, training(step)) for step in range(1, 11)]
    text = run_and_read(10, rows, clock, _environ={"FORCE_COLOR": "1"})
    assert "\x1b" not in text
    assert len(text.splitlines()) == 10


def test_time_left_of_a_resumed_run_counts_only_new_steps(clock):
    rows = [(90, training(90)), (91, training(91)), (100, training(100))]
    first, second = run_and_read(1000, rows, clock).splitlines()
    assert first.endswith("length 12.3")
    assert second.endswith("2:30:00 left")  # 900 steps of 10 s each


def test_several_data_sources_are_listed(clock):
    (line,) = run_and_read(9, [(0, {"val-core/b/acc/mean@1": 0.25, "val-core/a/acc/mean@1": 1.0})], clock).splitlines()
    assert line == "step 0/9  val a 1.000  val b 0.250"


def test_preparation_is_reported_in_tenths():
    file = io.StringIO()
    with ConsoleCallback(5, Console(file=file)) as callback:
        for done in range(0, 101):
            callback.on_progress("pretraining", done, 100)
        callback.on_progress("pretraining", 0, 100)
    expected = [f"pretraining  {done}/100" for done in range(0, 101, 10)]
    assert file.getvalue().splitlines() == [*expected, "pretraining  0/100"]


def test_messages_are_printed_verbatim():
    file = io.StringIO()
    text = "saved [bold]x[/bold] to " + "long/" * 40
    with ConsoleCallback(5, Console(file=file, width=40)):
        logging.getLogger("sdpo.trainer").info(text)
    assert file.getvalue() == text + "\n"


def test_log_records_are_printed_while_the_callback_is_entered():
    file, logger = io.StringIO(), logging.getLogger("sdpo.trainer.anything")
    logger.info("before")
    with ConsoleCallback(5, Console(file=file)):
        logger.debug("a detail")
        logger.info("resuming from step %d", 2)
        logger.warning("[bold]a warning[/bold]")
        logging.getLogger("transformers").warning("not ours")
    logger.info("after")
    assert file.getvalue() == "resuming from step 2\n[bold]a warning[/bold]\n"
    assert not logging.getLogger("sdpo").handlers and logging.getLogger("sdpo").level == logging.NOTSET


def test_libraries_print_only_warnings():
    code = "import logging; log = logging.getLogger('sdpo.x'); log.info('detail'); log.warning('warning')"
    done = subprocess.run([sys.executable, "-c", f"import sdpo; {code}"], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "warning\n")


def test_terminal_shows_bars_metrics_and_evaluations(clock):
    file = Terminal()
    console = Console(file=file, width=80, _environ={"TERM": "xterm"})
    with ConsoleCallback(4, console) as callback:
        callback.on_progress("pretraining", 50, 200)
        callback._bars._progress.refresh()
        callback.on_progress("pretraining", 200, 200)
        callback.on_metrics(0, {"val-core/t/acc/mean@1": 0.125, "val-teacher/t/acc/mean@1": 0.9})
        clock.now = 30.0
        callback.on_metrics(1, training(1))
        logging.getLogger("sdpo.trainer").info("a word")
    text = file.getvalue()
    assert "pretraining" in text and "50/200" in text
    assert "step 0/4  val 0.125  teacher 0.900" in text
    assert "a word" in text
    last_frame = text.rsplit("step", 1)[1]
    assert "1/4" in last_frame and "1:30 left" in last_frame
    assert "score 0.010  divergence 2.500  length 12.3  val 0.125  teacher 0.900" in last_frame


def test_bars_are_removed_after_an_error():
    file = Terminal()
    with (
        pytest.raises(KeyboardInterrupt),
        ConsoleCallback(4, Console(file=file, width=80, _environ={"TERM": "xterm"})) as callback,
    ):
        callback.on_metrics(1, training(1))
        raise KeyboardInterrupt
    hidden, shown = "\x1b[?25l", "\x1b[?25h"
    assert file.getvalue().rindex(shown) > file.getvalue().rindex(hidden)


def test_result_table(write_run):
    sdpo = read_run(
        write_run(
            "sdpo",
            {
                0: {"val-core/t/acc/mean@1": 0.0, "timing_s/testing": 30.0},
                9: {
                    "val-core/t/acc/mean@1": 0.98,
                    "val-teacher/t/acc/mean@1": 0.99,
                    "timing_s/step": 90.0,
                    "response_length/mean": 9,
                },
            },
        )
    )
    grpo = read_run(write_run("grpo[x]", {0: {"val-core/t/acc/mean@1": 0.0}, 9: {"val-core/t/acc/mean@1": 0.01}}))
    file = io.StringIO()
    print_result_table([sdpo, grpo], Console(file=file, width=80))
    lines = [line.split() for line in file.getvalue().splitlines()]
    assert lines[1] == ["validation", "accuracy"]
    assert lines[2] == ["run", "steps", "before", "final", "best", "teacher", "length", "s/step", "minutes"]
    assert lines[4] == ["sdpo", "9", "0.000", "0.980", "0.980", "0.990", "9.0", "90.00", "2.0"]
    assert lines[5] == ["grpo[x]", "9", "0.000", "0.010", "0.010", "-", "-", "-", "-"]


def test_result_table_has_a_row_per_data_source(write_run, capsys):
    run = read_run(write_run("run", {0: {"val-core/a/acc/mean@1": 0.1, "val-core/b/acc/mean@1": 0.2}}))
    print_result_table([run])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[2][:3] == ["run", "data", "steps"] and lines[2][-1] == "minutes"
    assert [line[:4] for line in lines[4:6]] == [["run", "a", "0", "0.100"], ["run", "b", "0", "0.200"]]
