r"""Reward function of Geometry3k; ``docs/geo3k.md`` compares its scores with verl's.

The answer is the content of the last ``\boxed{...}``. Numbers are compared here, which takes microseconds; all other
answers are compared by math-verify in a separate process (``sympy_worker.py``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from fractions import Fraction
from importlib.util import find_spec

from sdpo.errors import DataError
from sdpo.rewards.base import RewardOutput, Row
from sdpo.rewards.geo3k.sympy_worker import compare
from sdpo.rewards.worker_process import WorkerTimeout

MAX_LENGTH = 500  # characters of an answer; the longest ground truth has a few dozen
MAX_DEPTH = 20  # nested brackets
MAX_QUOTED = 80  # characters of the answer in the feedback
SAME = Fraction(1, 10**12)  # relative error of exact numbers, one of which was computed in floating point
ONE_DECIMAL = Fraction(1, 1000)  # relative error up to which one decimal place suffices


@dataclass(frozen=True)
class Geo3k:
    r"""The task.

    The score is ``(1 - format_weight) * accuracy + format_weight * format``, as in verl for this data set. By default:
    1 for a correct answer in the required format, 0.9 for a correct answer without it, 0.1 for the format alone, else
    0. The format is ``<think>`` at the very start, then ``</think>``, then ``\boxed{...}``.

    With the default ``self_distillation.success_reward_threshold`` of 1, a correct answer in the wrong format is not
    used as a demonstration; with ``format_weight=0`` or a threshold of 0.9 it is.

    Args:
        format_weight: weight of the format in the score, in [0, 1]; 0 removes the format from score and feedback.
        tolerance: maximum relative error of an answer that equals the truth up to rounding, in [0, 0.1]; 0 requires
            the exact number.
        timeout: seconds to compare an answer, in (0, 600]; an answer that takes longer is wrong.

    Raises:
        DataError: an argument is out of range, or math-verify is not installed.
    """

    format_weight: float = 0.1
    tolerance: float = 0.01
    timeout: float = 3.0

    def __post_init__(self) -> None:
        for name, least, most in (("format_weight", 0, 1), ("tolerance", 0, 0.1), ("timeout", 0.001, 600)):
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not least <= value <= most:
                raise DataError(f"data.task_args.{name}={value!r:.80}: must be a number from {least} to {most}")
        if find_spec("math_verify") is None:  # not only at the first answer that needs it
            raise DataError("data.task=geo3k: math-verify is not installed; pip install 'sdpo[geo3k]'")

    def compute_score(self, row: Row, response: str) -> RewardOutput:
        """Score a response in [0, 1], with feedback that does not reveal the ground truth.

        Thread-safe. Takes at most about ``timeout``, in addition to waiting for comparisons of other threads.

        Raises:
            DataError: the row has no ground truth.
        """
        truth = (row.ground_truth or "").strip()
        if not truth:
            index = row.extra_info.get("index", "?")
            raise DataError(f"data: row {index} of {row.data_source} has no reward_model.ground_truth; add it")
        is_right, feedback = self._judge_answer(response, truth)
        missing = _find_format_error(response) if self.format_weight > 0 else None
        if is_right and missing:
            feedback = f"The final answer is correct, but {missing}."
        elif feedback and missing:
            feedback += f" Also, {missing}."
        return RewardOutput((1.0 - self.format_weight) * is_right + self.format_weight * (missing is None), feedback)

    def _judge_answer(self, response: str, truth: str) -> tuple[bool, str | None]:
        answer = extract_boxed(response)
        if answer is None:
            return False, r"The response has no final answer in \boxed{...}."
        if not answer:
            return False, r"The final \boxed{} is empty."
        verdict = _judge(answer, truth, Fraction(self.tolerance), self.timeout)
        if verdict is _Verdict.RIGHT:
            return True, None
        if verdict is _Verdict.WRONG:
            return False, f"The final answer {_quote(answer)} is not correct."
        return False, f"The final answer {_quote(answer)} could not be read as a number or an expression."


build_task = Geo3k


def extract_boxed(text: str) -> str | None:
    r"""The stripped content of the last ``\boxed{...}`` with balanced braces; None without one.

    Takes time linear in the length of the text. Escaped braces do not count.
    """
    opened: list[int | None] = []  # per open brace: where its box begins, None for other braces
    found: tuple[int, int] | None = None
    for token in re.finditer(r"\\boxed\{|\\.|[{}]", text, re.DOTALL):
        if token.group() == "{":
            opened.append(None)
        elif token.group() == r"\boxed{":
            opened.append(token.end())
        elif token.group() == "}" and opened:
            start = opened.pop()
            if start is not None and (found is None or start > found[0]):
                found = start, token.start()
    return None if found is None else text[slice(*found)].strip()


def _find_format_error(response: str) -> str | None:
    r"""Why a response does not match verl's ``<think>.*</think>.*\\boxed\{.*\}.*``; None if it matches.

    The regular expression itself takes days for a long response that nearly matches.
    """
    if not response.startswith("<think>"):
        return "the response does not begin with <think>"
    closed = response.find("</think>")
    if closed < 0:
        return "<think> is not closed by </think>"
    boxed = response.find(r"\boxed{", closed)
    if boxed < 0 or response.find("}", boxed) < 0:
        return r"no \boxed{...} stands after </think>"
    return None


def _quote(answer: str) -> str:
    answer = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(answer[:1000].split()))
    return answer if len(answer) <= MAX_QUOTED else answer[: MAX_QUOTED - 3] + "..."


# --- comparison ------------------------------------------------------------------------------------------------------


class _Verdict(Enum):
    RIGHT = auto()
    WRONG = auto()
    UNREADABLE = auto()


def _judge(answer: str, truth: str, tolerance: Fraction, timeout: float) -> _Verdict:
    if _is_too_large(answer):
        return _Verdict.UNREADABLE
    answer, truth = _normalize(answer), _normalize(truth)
    if not _RELATION.search(truth):
        answer = _take_right_side(answer)
    if _key(answer) == _key(truth):
        return _Verdict.RIGHT
    if (choice := _CHOICE.fullmatch(truth)) and (chosen := _CHOICE.fullmatch(answer)):
        return _Verdict.RIGHT if _key(chosen["letter"]) == _key(choice["letter"]) else _Verdict.WRONG
    given, expected = _read_number(answer), _read_number(truth)
    is_equal = False
    if given is None or expected is None:
        try:
            comparison = compare(answer, truth, timeout)
        except WorkerTimeout:
            return _Verdict.UNREADABLE
        if given is None and not comparison.is_readable:
            return _Verdict.UNREADABLE
        is_equal = comparison.is_equal
        if given is None and comparison.value is not None:
            given = _Number(Fraction(comparison.value))
        if expected is None and comparison.truth is not None:
            expected = _Number(Fraction(comparison.truth))
    if given is not None and expected is not None:
        is_equal = _agree(given, expected, tolerance)
    return _Verdict.RIGHT if is_equal else _Verdict.WRONG


@dataclass(frozen=True)
class _Number:
    value: Fraction
    decimals: int | None = None  # decimal places of a decimal number; None for an exact number


def _agree(answer: _Number, truth: _Number, tolerance: Fraction) -> bool:
    """Whether two numbers are equal, or equal when rounded to the decimal places of the less precise number.

    29.73 equals a truth of 2√221, and 8.66 a truth of 8.7, which is itself rounded. 30 equals neither: a number without
    decimal places is exact. One decimal place suffices for an exact truth only if the number is large (ONE_DECIMAL).
    """
    error, scale = abs(answer.value - truth.value), abs(truth.value)
    if error <= max(SAME, SAME * scale):
        return True
    digits = truth.decimals if truth.decimals is not None else answer.decimals
    if digits is None or error > Fraction(1, 2 * 10**digits) or error > tolerance * scale:
        return False
    return truth.decimals is not None or digits >= 2 or error <= ONE_DECIMAL * scale


_DECIMAL = re.compile(r"(?P<sign>[+-]?) *(?P<digits>[0-9]+(?:\.(?P<decimals>[0-9]*))?|\.(?P<bare>[0-9]+))")
_FRACTION = re.compile(
    r"(?P<sign>[+-]?) *(?:(?P<whole>[0-9]+)(?: *(?=\\)| +))?"
    r"(?:\\frac *\{ *(?P<top>[0-9]+) *\} *\{ *(?P<bottom>[0-9]+) *\}|(?P<a>[0-9]+) */ *(?P<b>[0-9]+))"
)


def _read_number(text: str) -> _Number | None:
    r"""Parse an integer, a decimal, a fraction (``1/2``, ``\frac{1}{2}``) or a mixed number (``7 1/2``); else None."""
    if decimal := _DECIMAL.fullmatch(text):
        value = Fraction(decimal["digits"])
        written = decimal["decimals"] or decimal["bare"]
        return _Number(-value if decimal["sign"] == "-" else value, len(written) if written else None)
    if fraction := _FRACTION.fullmatch(text):
        bottom = int(fraction["bottom"] or fraction["b"])
        if bottom == 0:
            return None
        value = int(fraction["whole"] or 0) + Fraction(int(fraction["top"] or fraction["a"]), bottom)
        return _Number(-value if fraction["sign"] == "-" else value)
    return None


# --- normalization of answers ---------------------------------------------------------------------------------------

_DEGREE = r"(?:\^ *(?:\{ *)?\\(?:circ|degree)(?![a-z])(?: *\})?|\\degree(?![a-z])|°)"
_UNIT = (
    r"(?:(?:milli|centi|kilo)?met(?:er|re)s?|inch(?:es)?|foot|feet|yards?|miles?|units?|degrees?|deg"
    r"|mm|cm|km|in|ft|yd|mi|(?<= )m)"
)
_UNITS = re.compile(rf"(?:(?<=[0-9)}}°])| ) *(?:(?:square|sq\.?|cubic|cu\.?) *)?{_UNIT}\.?(?: *\^ *\{{? *[23] *\}}?)?$")
_CHOICE = re.compile(r"\(? *(?P<letter>[A-Za-z]) *\)?[.:]?")
_RELATION = re.compile(r"(?<![<>!])=|\\approx|\\simeq|≈")
_THOUSANDS = re.compile(r"([+-]?[0-9]{1,3})((?:(?:,|\{,\}| )[0-9]{3})+)(\.[0-9]+)?")
_COMMANDS = (  # in this order
    (re.compile(r"\\[dtc]frac(?![a-z])"), r"\\frac"),
    (re.compile(r"\\(?:left|right|displaystyle)(?![a-z])|\$|\\[()!]"), ""),
    (re.compile(r"\\(?:text|textrm|textbf|textit|mathrm|mathbf|mathsf|mbox|operatorname) *\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\\[,;: ]|\\q?quad(?![a-z])|~|\s+"), " "),
    (re.compile(r"\\?%"), ""),
    (re.compile("\N{MINUS SIGN}"), "-"),
    (re.compile("[\N{MULTIPLICATION SIGN}·]"), r" \\cdot "),
    (re.compile("π"), r"\\pi "),
    (re.compile(r"√ *\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"√ *([0-9.]+|[a-z])"), r"\\sqrt{\1}"),
    (re.compile(rf"([0-9.]+) *{_DEGREE}"), r"\1°"),
)
_TRIGONOMETRY = re.compile(r"\\?(?:sin|cos|tan)")
_TOWER = re.compile(
    r"\^ *\{[^{}^]*\^|\^ *\^|\^ *\{? *-? *[0-9]{4}|[0-9]{4} *!|! *!|\)+ *!|\} *!|[0-9]{61}"
)  # does not occur in real answers, and may take very long to evaluate


def _is_too_large(text: str) -> bool:
    """Whether a text may take long to parse or to evaluate; a cheap check in addition to the timeout."""
    if len(text) > MAX_LENGTH or _TOWER.search(text):
        return True
    return max(_depths(text), default=0) > MAX_DEPTH


def _depths(text: str) -> Iterator[int]:
    depth = 0
    for character in text:
        depth += (character in "{([") - (character in "})]")
        yield depth


def _normalize(text: str) -> str:
    """Remove everything that does not change the value: spaces, fonts, units, degree and percent signs, separators."""
    for pattern, replacement in _COMMANDS:
        text = pattern.sub(replacement, text)
    # The answer for an angle is the number of degrees; inside a sine, degrees are converted to radians.
    text = re.sub(r"([0-9.]+)°", r"(\1\\pi/180)" if _TRIGONOMETRY.search(text) else r"\1", text)
    text = re.sub(_DEGREE, "", text)
    text = _strip(text)
    if (unit := _UNITS.search(text)) and unit.start() > 0:
        text = _strip(text[: unit.start()])
    if thousands := _THOUSANDS.fullmatch(text):
        text = thousands[1] + re.sub("[^0-9]", "", thousands[2]) + (thousands[3] or "")
    return text


def _strip(text: str) -> str:
    text = re.sub(r"(?<! )\.$", "", " ".join(text.split()))
    while text.startswith("{") and text.endswith("}") and "}" not in text[1:-1]:
        text = text[1:-1].strip()
    return text


def _take_right_side(text: str) -> str:
    """Return 5 for ``x = 5`` and 2.83 for ``2\\sqrt{2} \\approx 2.83``; several equations are returned unchanged."""
    *left, right = _RELATION.split(text)
    if not left or re.search(r"[,;](?![0-9]{3})| and | or ", text):
        return text
    right = right.strip()
    return _normalize(right) if right else text


def _key(text: str) -> str:
    return re.sub(r"\s", "", text).casefold()
