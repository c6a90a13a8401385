"""Geometry3k's reward function: its rules, its agreement with verl's, and unreadable answers."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest

from sdpo.errors import SDPOError
from sdpo.rewards.base import RewardOutput, Row, load_task
from sdpo.rewards.geo3k.reward import Geo3k, extract_boxed
from sdpo.rewards.scoring import score_once

pytest.importorskip("math_verify")

ROOT = Path(__file__).parents[3]
SCORES = json.loads((ROOT / "tests" / "golden" / "geo3k_scores.json").read_text(encoding="utf-8"))
THOUGHT = "<think>t</think> "
NO_THINK = "the response does not begin with <think>"


def compute_score(response: str, truth: str | None = "5", **settings: float) -> RewardOutput:
    return Geo3k(**settings).compute_score(Row("hiyouga/geometry3k", [], {"ground_truth": truth}), response)


def grade_answer(answer: str, truth: str, **settings: float) -> float:
    return compute_score(rf"{THOUGHT}\boxed{{{answer}}}", truth, **settings).score


# --- agreement with verl ---------------------------------------------------------------------------------------------


def test_golden_scores() -> None:
    wrong = [
        (case["response"], case["ground_truth"], case["score"], score)
        for case in SCORES
        if (score := compute_score(case["response"], case["ground_truth"]).score) != case["score"]
    ]
    assert wrong == []


def test_golden_scores_of_verl() -> None:
    pytest.importorskip("mathruler")
    verl = importlib.util.find_spec("verl")
    if verl is None or not verl.submodule_search_locations:
        pytest.skip("verl is not installed")
    # The file alone: the packages above it import Ray.
    file = Path(verl.submodule_search_locations[0]) / "utils" / "reward_score" / "geo3k.py"
    spec = importlib.util.spec_from_file_location("verl_geo3k", file)
    assert spec is not None and spec.loader is not None
    scorer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(scorer)
    assert [c for c in SCORES if scorer.compute_score(c["response"], c["ground_truth"]) != c["verl"]] == []


def test_differences_from_verl_are_documented_with_reasons() -> None:
    differing = [case for case in SCORES if case["score"] != case["verl"]]
    assert differing == [case for case in SCORES if case.get("reason")]
    rows = "".join(
        f"| `{case['response'].removeprefix(THOUGHT)}` | `{case['ground_truth']}` | {case['score']} | {case['verl']} "
        f"| {case['reason']} |\n"
        for case in differing
    )
    page = (ROOT / "docs" / "geo3k.md").read_text(encoding="utf-8")
    assert rows in page, f"the table of docs/geo3k.md should be\n{rows}"
    assert f"Of {len(SCORES)} pairs {len(SCORES) - len(differing)} get the same score" in page


# --- the rules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "truth", "is_right"),
    [
        # of an exact truth: rounded, with two digits after the point, or one that is worth a thousandth
        ("29.73", r"2 \sqrt { 221 }", True),
        ("29.7321", r"2 \sqrt { 221 }", True),
        ("29.74", r"2 \sqrt { 221 }", False),  # 29.7321 is not rounded to that
        ("29.7", r"2 \sqrt { 221 }", False),  # off by 1.08 thousandths
        ("70.7", r"50 \sqrt { 2 }", True),  # 70.7107: by 0.15
        ("30", r"2 \sqrt { 221 }", False),  # no digits after the point: exact
        ("0.67", r"\frac { 2 } { 3 }", True),
        ("0.66", r"\frac { 2 } { 3 }", False),
        ("0.05", r"\frac { 1 } { 19 }", False),  # right to its digits, but off by 5 %
        ("0.00", r"\frac { 1 } { 300 }", False),
        # ground truth with decimals: values that round to it, within 1 %
        ("8.66", "8.7", True),
        ("8.64", "8.7", False),
        ("8.75", "8.7", True),  # a half may have been rounded either way
        ("8.76", "8.7", False),
        ("0.54", "0.5", False),  # rounds to it, but off by 8 %
        ("33", "32.9", False),
        ("32.9", "32.93", False),  # fewer digits than required
        (r"\frac{26}{3}", "8.7", True),
        # integer ground truth: only this number
        ("10.00", "10", True),
        ("10.001", "10", False),
        ("9.9999", "10", False),
        (r"\sqrt{100}", "10", True),
        ("-10", "10", False),
        ("1000001", "1000000", False),
        # fractions
        ("7 1/2", "7.5", True),
        (r"-7\frac{1}{2}", "-7.5", True),
        ("71/2", "7.5", False),
        ("1/0", "1", False),
        ("0/5", "0", True),
    ],
)
def test_numbers(answer: str, truth: str, is_right: bool) -> None:
    assert grade_answer(answer, truth) == (1.0 if is_right else 0.1)


def test_tolerance_zero_requires_the_exact_number() -> None:
    assert grade_answer("29.73", r"2 \sqrt { 221 }", tolerance=0) == 0.1
    assert grade_answer("8.66", "8.7", tolerance=0) == 0.1
    assert grade_answer("0.50", r"\frac{1}{2}", tolerance=0) == 1.0
    assert grade_answer("0.54", "0.5", tolerance=0.1) == 1.0


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("30^\\circ", "30"),
        ("30^{\\circ}", "30"),
        ("30 ^ { \\circ }", "30^\\circ"),
        ("30°", "30"),
        ("30 \\text{ degrees}", "30"),
        ("5 cm", "5"),
        ("5cm", "5"),
        ("5\\text{ cm}", "5 cm"),
        ("25\\,\\mathrm{cm}^{2}", "25"),
        ("25\\text{ square units}", "25"),
        ("25\\text{ sq. ft}", "25"),
        ("12\\pi\\text{ m}", "12 \\pi"),
        ("50\\%", "50"),
        ("1,234,567", "1234567"),
        ("1{,}234.5", "1234.5"),
        ("1\\,234", "1234"),
        ("x=1,234", "1234"),
        ("y = 5 cm", "5"),
        ("\\overline{AB} = 2\\sqrt3", "2 \\sqrt { 3 }"),
        ("\\sqrt{75} \\approx 8.66", "8.7"),
        ("\\tfrac{1}{2}", "0.5"),
        ("\\left( 3, 4 \\right)", "(3, 4)"),
        ("{5}", "5"),
        ("$5$", "5"),
        ("\\(5\\)", "5"),
        ("5.", "5"),
        ("10\\sin 30^\\circ", "5"),
        ("10 \\cos(60^{\\circ})", "5"),
        ("√(9)", "3"),
        ("3√2", "\\sqrt { 18 }"),
        ("( b )", "B"),
        ("C:", "C"),
        ("3 + 2x", "2 x + 3"),
        ("x=5", "x = 5"),
        ("5", "x = 5"),
    ],
)
def test_equivalent_notations(answer: str, truth: str) -> None:
    assert grade_answer(answer, truth) == 1.0


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("5 \\text{ or } 6", "5"),
        ("5, 6", "5"),
        ("x = 6, y = 5", "5"),
        ("x \\ge 5", "5"),
        ("x <= 5", "5"),
        ("1,23", "123"),
        ("4,5", "4.5"),
        ("cm", "5"),
        ("5x", "5"),
        ("10\\sin 30", "5"),  # of 30 radians
        ("A", "B"),
        ("A", "5"),
        ("AB", "A"),
        ("5^2", "5"),
        ("yes", "no"),
    ],
)
def test_wrong_answers(answer: str, truth: str) -> None:
    assert grade_answer(answer, truth) == 0.1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{1} \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1 \boxed{2} 3}", "2"),
        (r"\boxed{1} \boxed{2", "1"),
        (r"\boxed{ }", ""),
        (r"\boxed{\{1\}}", r"\{1\}"),
        (r"\boxed{1\}}", r"1\}"),
        (r"} } \boxed{1} {", "1"),
        (r"{ \boxed{1} \boxed{2}", "2"),
        ("\\boxed{\n1\n}", "1"),
        (r"\\boxed{1}", None),  # a line break, and a word in braces
        (r"\boxed 1", None),
        (r"\boxed", None),
        (r"\boxed{", None),
        (r"\fbox{1}", None),
        ("", None),
    ],
)
def test_last_box_is_the_answer(text: str, expected: str | None) -> None:
    assert extract_boxed(text) == expected


# --- scores and feedback ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "score", "feedback"),
    [
        (r"<think>t</think> \boxed{5}", 1.0, None),
        (r"<think>\boxed{5}</think> \boxed{5.0} cm", 1.0, None),
        (r"\boxed{5}", 0.9, f"The final answer is correct, but {NO_THINK}."),
        (r"<think>t \boxed{5}", 0.9, "The final answer is correct, but <think> is not closed by </think>."),
        (
            r"<think>\boxed{5}</think> 5",
            0.9,
            r"The final answer is correct, but no \boxed{...} stands after </think>.",
        ),
        (r"<think>t</think> \boxed{6}", 0.1, "The final answer 6 is not correct."),
        (r"\boxed{6}", 0.0, f"The final answer 6 is not correct. Also, {NO_THINK}."),
        ("<think>t</think> \\boxed{ 6\n +\t1 }", 0.1, "The final answer 6 + 1 is not correct."),
        (r"<think>t</think> \boxed{}", 0.1, r"The final \boxed{} is empty."),
        ("", 0.0, rf"The response has no final answer in \boxed{{...}}. Also, {NO_THINK}."),
        (
            r"<think>t</think> \boxed{\frac{7}}",
            0.1,
            r"The final answer \frac{7} could not be read as a number or an expression.",
        ),
        (
            r"<think>t</think> \boxed{" + "8" * 200 + "}",
            0.1,
            f"The final answer {'8' * 77}... could not be read as a number or an expression.",
        ),
        (
            "<think>t</think> \\boxed{6\0\ud800}",
            0.1,
            "The final answer 6�� could not be read as a number or an expression.",
        ),
    ],
)
def test_scores_and_feedback(response: str, score: float, feedback: str | None) -> None:
    assert compute_score(response) == RewardOutput(score, feedback)


def test_response_without_the_format() -> None:
    assert compute_score(r"\boxed{5}", format_weight=0) == RewardOutput(1.0)
    assert compute_score(r"\boxed{6}", format_weight=0) == RewardOutput(0.0, "The final answer 6 is not correct.")


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.3, 0.7, 0.9, 0.35, 1.0])
def test_correct_answer_in_the_format_scores_exactly_one(weight: float) -> None:
    assert compute_score(rf"{THOUGHT}\boxed{{5}}", format_weight=weight).score == 1.0
    assert compute_score(rf"{THOUGHT}\boxed{{6}}", format_weight=weight).score == weight


def test_feedback_does_not_reveal_the_answer() -> None:
    for case in SCORES:
        truth = case["ground_truth"]
        feedback = compute_score(case["response"], truth).feedback or ""
        assert truth not in feedback or truth in case["response"], case


def test_format_equals_that_of_verl() -> None:
    pattern = re.compile(r"<think>.*</think>.*\\boxed\{.*\}.*", re.DOTALL)
    pieces = ["<think>", "</think>", "\\boxed{", "\\boxed{5}", "}", "{", "\n", "5", " ", "think>", "<"]
    rng = random.Random(0)
    seen = set()
    for _ in range(3000):
        response = rng.choice(["<think>", ""]) + "".join(rng.choices(pieces, k=rng.randrange(8)))
        matches = pattern.fullmatch(response) is not None
        # The answer x is right nowhere, so that the score is that of the format.
        assert compute_score(response, "x", format_weight=1).score == float(matches), response
        seen.add(matches)
    assert seen == {True, False}


@pytest.mark.parametrize("truth", [None, "", "  \n"])
def test_row_without_a_ground_truth_is_refused(truth: str | None) -> None:
    row = Row("hiyouga/geometry3k", [], {"ground_truth": truth}, extra_info={"index": 7})
    with pytest.raises(
        SDPOError, match=r"^data: row 7 of hiyouga/geometry3k has no reward_model.ground_truth; add it$"
    ):
        Geo3k().compute_score(row, r"\boxed{5}")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format_weight": 1.5}, "data.task_args.format_weight=1.5: must be a number from 0 to 1"),
        ({"format_weight": "a"}, "data.task_args.format_weight='a': must be a number from 0 to 1"),
        ({"format_weight": True}, "data.task_args.format_weight=True: must be a number from 0 to 1"),
        ({"format_weight": float("nan")}, "data.task_args.format_weight=nan: must be a number from 0 to 1"),
        ({"tolerance": -1}, "data.task_args.tolerance=-1: must be a number from 0 to 0.1"),
        ({"timeout": 0}, "data.task_args.timeout=0: must be a number from 0.001 to 600"),
        ({"timeout": None}, "data.task_args.timeout=None: must be a number from 0.001 to 600"),
        (
            {"colour": 1},
            "data.task_args: geo3k: Geo3k.__init__() got an unexpected keyword argument 'colour'; it accepts "
            "format_weight, tolerance, timeout",
        ),
    ],
)
def test_arguments_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SDPOError) as caught:
        load_task("geo3k", settings)
    assert str(caught.value) == message


def test_missing_math_verify_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdpo.rewards.geo3k.reward.find_spec", lambda name: None)
    with pytest.raises(SDPOError, match=r"pip install 'sdpo\[geo3k\]'"):
        load_task("geo3k", {})


# --- malformed answers and long responses ----------------------------------------------------------------------------

MANY = 10_000


@pytest.mark.parametrize(
    "answer",
    [
        "9^{9^{9^{9}}}",
        "9^9^9^9",
        "9 ^ { 9 ^ 9 }",
        "x^{x^{x^{x}}}",
        "10^{999999999}",
        "2^99999",
        "100000000!",
        "5!!!!!!",
        "(((((5)!)!)!)!)!",
        r"\frac{" * MANY + "}" * MANY,
        "{" * MANY + "5" + "}" * MANY,
        r"\sqrt{" * MANY + "2" + "}" * MANY,
        "(" * 30 + "5" + ")" * 30,
        "9" * 100_000,
        "9" * 61,
        "0." + "3" * 100,
        "(9^{999})^{999}",
        r"\frac{",
        r"\frac{1}{",
        r"\frac{1}{2",
        r"\frac{}{}",
        r"\sqrt",
        r"\sqrt{}",
        r"\frac",
        "((5",
        "5))",
        "[5",
        "5 +",
        "+",
        "-",
        "..",
        "1.2.3",
        "1e400",
        "--5 --",
        "=",
        "x =",
        "= 6",
        "^",
        "_",
        "&",
        "#",
        "%",
        "$",
        "$$",
        "\\",
        "\\\\",
        r"\unknown{3}",
        r"\text{",
        r"\text{\text{\text{six}}}",
        r"\begin{matrix} 1 & 2",
        r"\left( 6",
        r"\right)",
        "\0",
        "6\0",
        "\ud800",
        "\N{FULLWIDTH DIGIT SIX}",
        "六",
        "😀",
        "\u202e6",
        "\u200b",
        "nan",
        "inf",
        r"\infty",
        r"\frac{6}{0}",
        r"\sqrt{-1}",
        r"\log 0",
        "None",
        "__import__('os')",
        "6\n\n6",
        "a" * 500,
        "+-" * 200 + "6",
    ],
    ids=lambda answer: ascii(answer[:20]),
)
def test_malformed_answer_is_wrong_with_feedback(answer: str) -> None:
    start = time.monotonic()
    outcome = compute_score(rf"{THOUGHT}\boxed{{{answer}}}", timeout=2)
    # Besides the limit of two seconds a new worker may have to start, on a machine that has other things to do.
    assert time.monotonic() - start < 30
    assert outcome.score in (0.0, 0.1)
    assert outcome.feedback is not None and len(outcome.feedback) < 200
    assert all(character.isprintable() for character in outcome.feedback)


@pytest.mark.parametrize(
    "response",
    [
        " " * 1_000_000,
        "{" * 1_000_000,
        "}" * 1_000_000,
        "\\" * 1_000_001,
        r"\boxed{" * 140_000,
        r"\boxed{6}" * 100_000,
        r"\boxed{" * 50_000 + "6" + "}" * 50_000,
        r"<think></think>\boxed{" * 50_000,
        "<think>" + r"</think>\boxed{" * 60_000,
        r"\boxed{" + "7" * 1_000_000 + "}",
        r"\boxed{" + "a b " * 250_000 + "}",
        r"\boxed{" + "x^" * 500_000 + "}",
        "\0" * 1_000_000,
        "é😀" * 500_000,
    ],
    ids=lambda response: ascii(response[:20]),
)
def test_response_of_a_megabyte(response: str) -> None:
    start = time.monotonic()
    outcome = compute_score(response)
    assert time.monotonic() - start < 10
    assert outcome.score == 0.0
    assert outcome.feedback is not None and len(outcome.feedback) < 300


@pytest.mark.parametrize("answer", ["(x+y+z)^{200}", r"\frac{1}{" * 18 + "2" + "}" * 18])
def test_timeout_counts_as_unreadable(answer: str) -> None:
    outcome = compute_score(rf"{THOUGHT}\boxed{{{answer}}}", timeout=0.3)
    assert outcome.score == 0.1
    assert outcome.feedback is not None and outcome.feedback.endswith("could not be read as a number or an expression.")
    assert grade_answer(r"2\sqrt{2}", r"\sqrt { 8 }", timeout=60) == 1.0


def test_plain_numbers_are_fast() -> None:
    task = Geo3k()
    rows = [Row("d", [], {"ground_truth": str(i)}) for i in range(1000)]
    start = time.monotonic()
    scores = [task.compute_score(row, rf"{THOUGHT}\boxed{{{i // 2 * 2}}}").score for i, row in enumerate(rows)]
    assert time.monotonic() - start < 2  # 0.3 s on two slow cores that are busy
    assert scores == [1.0, 0.1] * 500


def test_task_loads_by_name() -> None:
    row = Row("hiyouga/geometry3k", [], {"ground_truth": "5"})
    assert score_once(load_task("geo3k", {"format_weight": 0.2}), row, r"\boxed{5}", None).score == 0.8
