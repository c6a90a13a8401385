from sdpo.file_lock import lock_file
from sdpo.report.run_dir import read_run
from sdpo.report.summary import HEADINGS, summarize


def test_headline_numbers(write_run):
    rows = {
        0: {"val-core/t/acc/mean@1": 0.0, "val-teacher/t/acc/mean@1": 0.5, "timing_s/testing": 6.0},
        1: {"timing_s/step": 2.0, "response_length/mean": 20.0},
        2: {"timing_s/step": 3.0, "val-core/t/acc/mean@1": 0.9, "timing_s/testing": 6.0},
        3: {
            "timing_s/step": 13.0,
            "response_length/mean": 12.25,
            "val-core/t/acc/mean@1": 0.75,
            "val-teacher/t/acc/mean@1": 0.875,
            "timing_s/testing": 6.0,
            "timing_s/save_checkpoint": 9.0,
        },
    }
    (summary,) = summarize([read_run(write_run("a", rows))])
    assert summary.source == "t"
    assert dict(zip(HEADINGS, summary.cells(), strict=True)) == {
        "steps": "3",
        "before": "0.000",
        "final": "0.750",
        "best": "0.900",
        "teacher": "0.875",
        "length": "12.2",
        "s/step": "3.00",
        "minutes": "0.8",  # 2 + 3 + 13 s of steps, three evaluations of 6 s, a checkpoint of 9 s
    }


def test_row_per_data_source_and_row_for_a_run_without_evaluation(write_run):
    two = read_run(write_run("two", {5: {"val-core/b/acc/mean@1": 0.2, "val-core/a/acc/mean@1": 0.1}}))
    none = read_run(write_run("none", {1: {"critic/score/mean": 1.0}}))
    summaries = summarize([two, none])
    assert [(s.run.name, s.source, s.final) for s in summaries] == [
        ("two", "a", 0.1),
        ("two", "b", 0.2),
        ("none", None, None),
    ]
    assert summaries[0].before is None  # its first validation was after the first step
    assert summaries[2].cells() == ("1", *["-"] * 7)


def test_run_that_was_stopped_says_where_and_the_step_of_its_last_evaluation(write_run):
    rows = {0: {"val-core/t/acc/mean@1": 0.0}, 10: {"val-core/t/acc/mean@1": 1.0}, 11: {"critic/score/mean": 0.5}}
    record = read_run(write_run("a", rows, max_steps=30))
    (summary,) = summarize([record])
    cells = dict(zip(HEADINGS, summary.cells(), strict=True))
    assert (cells["steps"], cells["final"], record.stop) == ("11 of 30", "1.000 (step 10)", "11 of 30")
    (complete,) = summarize([read_run(write_run("b", rows, max_steps=11))])
    assert complete.cells()[:3] == ("11", "0.000", "1.000 (step 10)")
    with lock_file(record.path / ".lock", "a process"):
        assert read_run(record.path).stop is None, "it is running"
