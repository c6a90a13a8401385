"""Prompts, their maximum length, and the order in which steps use them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdpo.config.root import SDPOConfig
from sdpo.errors import SDPOError
from sdpo.observability.progress import NullCallback
from sdpo.prompting.tokenization import encode_prompt
from sdpo.rewards.toy.hidden_rule import build_tokenizer
from sdpo.trainer.data.prompts import RandomSampler, load_prompts

MakeRun = Callable[..., SDPOConfig]

# --- the order


@given(num_rows=st.integers(1, 40), batch_size=st.integers(1, 60), seed=st.integers(0, 5), shuffle=st.booleans())
def test_every_epoch_is_a_permutation(num_rows: int, batch_size: int, seed: int, shuffle: bool) -> None:
    order = RandomSampler(num_rows, batch_size, shuffle=shuffle, seed=seed)
    num_steps = -(-3 * num_rows // batch_size)
    rows = [i for step in range(1, num_steps + 1) for i in order.batch(step)]
    assert all(len(order.batch(step)) == batch_size for step in range(1, num_steps + 1))
    epochs = [rows[start : start + num_rows] for start in range(0, 3 * num_rows, num_rows)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(num_rows))
        assert shuffle or epoch == list(range(num_rows))
    assert order.epoch(num_steps) == pytest.approx(num_steps * batch_size / num_rows)


def test_batches_can_be_requested_in_any_order() -> None:
    forward, backward = (RandomSampler(50, 7, shuffle=True, seed=3) for _ in range(2))
    steps = range(1, 30)
    assert [forward.batch(k) for k in steps] == [backward.batch(k) for k in reversed(steps)][::-1]


def test_order_depends_on_seed_and_epoch() -> None:
    first, same, other = (RandomSampler(50, 50, shuffle=True, seed=s) for s in (0, 0, 1))
    assert first.batch(1) == same.batch(1)
    assert first.batch(1) != other.batch(1)
    assert first.batch(1) != first.batch(2)
    assert first.batch(1) != list(range(50))


def test_first_row_of_an_epoch_is_uniform() -> None:
    order = RandomSampler(5, 5, shuffle=True, seed=0)
    first_rows = Counter(order.batch(step)[0] for step in range(1, 1001))
    # The expected count is 200; 60 is 4.7 standard deviations.
    assert all(abs(first_rows[row] - 200) < 60 for row in range(5))


# --- the prompts


@pytest.fixture
def write(tmp_path: Path) -> Callable[[list[str]], str]:
    def write(texts: list[str]) -> str:
        rows = [
            {"data_source": "x", "prompt": [{"role": "user", "content": t}], "reward_model": {"ground_truth": "1"}}
            for t in texts
        ]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
        return str(tmp_path / "rows.parquet")

    return write


def load(config: SDPOConfig, file: str, window: int | None = None) -> list[Any]:
    length = config.rollout.max_response_length
    return load_prompts(
        [file],
        "data.train_files",
        config.data,
        build_tokenizer(),
        NullCallback(),
        window=window,
        max_response_length=length,
    )


def test_prompts_end_with_the_generation_prompt(make_run: MakeRun, write: Any) -> None:
    prompts = load(make_run(), write(["123", "45"]))
    tokenizer = build_tokenizer()
    assert [p.token_ids for p in prompts] == [encode_prompt(tokenizer, p.row.prompt) for p in prompts]
    assert tokenizer.decode(prompts[1].token_ids).endswith("45<|im_end|>\n<|im_start|>assistant\n")


# A prompt of k digits is k + 8 tokens: <|im_start|> user \n ... <|im_end|> \n <|im_start|> assistant \n
OVERHEAD = 8


def test_prompt_length_in_tokens(make_run: MakeRun, write: Any) -> None:
    assert [len(p.token_ids) - OVERHEAD for p in load(make_run(), write(["1", "12345"]))] == [1, 5]


@pytest.mark.parametrize(
    ("window", "reason"),
    [
        (None, "data.max_prompt_length"),
        (1000, "data.max_prompt_length"),
        (OVERHEAD + 4 + 8, "the model's window of 20 minus rollout.max_response_length=8"),
    ],
)
def test_overlong_prompt_is_refused_or_skipped(
    make_run: MakeRun, write: Any, caplog: pytest.LogCaptureFixture, window: int | None, reason: str
) -> None:
    limit = OVERHEAD + 4
    settings = {"data__max_prompt_length": limit if reason == "data.max_prompt_length" else limit + 2}
    file = write(["1234", "12345", "1", "123456", "12"])
    with pytest.raises(SDPOError) as caught:
        load(make_run(**settings), file, window)
    assert str(caught.value) == (
        f"data.train_files: {file}: row 3 has {OVERHEAD + 6} prompt tokens, more than {limit} ({reason}); set "
        "data.filter_overlong_prompts=true to skip such rows"
    )
    kept = load(make_run(**settings, data__filter_overlong_prompts=True), file, window)
    assert [p.row.prompt[0]["content"] for p in kept] == ["1234", "1", "12"]
    assert caplog.messages == ["data.train_files: skipped 2 of 5 rows with overlong prompts"]


def test_data_without_a_short_enough_prompt_is_refused(make_run: MakeRun, write: Any) -> None:
    config = make_run(data__max_prompt_length=3, data__filter_overlong_prompts=True)
    with pytest.raises(
        SDPOError, match=rf"no row is left: .*rows\.parquet: row 0 has {OVERHEAD + 1} prompt tokens, more than 3"
    ):
        load(config, write(["1"]))


def test_window_without_room_for_a_prompt_is_refused(make_run: MakeRun, write: Any) -> None:
    with pytest.raises(SDPOError, match=r"rollout\.max_response_length=8: leaves no room .* window of 8 tokens"):
        load(make_run(), write(["1"]), window=8)
