"""Hundreds of invalid config files, data files and models, loaded like ``sdpo train`` does.

Each either trains a step, or is refused in bounded time with one line that names the field, the row or the location in
the file, and leaves no files. All mutations have fixed seeds.
"""

from __future__ import annotations

import copy
import datetime
import gzip
import io
import json
import math
import os
import random
import shutil
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from sdpo import SDPOError, SDPOTrainer, load_config
from sdpo.config.root import iterate_settings
from sdpo.observability.progress import NullCallback
from sdpo.rewards.toy.hidden_rule import build_tokenizer

NUM_CONFIG_FILES = 500
NUM_DATA_FILES = 300
SECONDS = 20  # a run takes a tenth of a second

TASK = """
def build_task(salt=0, kind="a"):
    return Task()

class Task:
    def compute_score(self, row, response):
        return {"score": float(len(response) % 2), "feedback": "Wrong."}
"""
BASE: dict[str, Any] = {
    "seed": 3,
    "output_dir": "run",
    "max_steps": 1,
    "eval_steps": 0,
    "save_steps": 0,
    "max_staleness": 0,
    "model": {"path": "model", "dtype": "float32", "trust_remote_code": False},
    "data": {
        "task": "task.py",
        "task_args": {"salt": 1, "kind": "b"},
        "train_files": ["train.parquet"],
        "val_files": ["test.parquet"],
        "train_batch_size": 2,
        "max_prompt_length": 64,
        "filter_overlong_prompts": False,
        "max_pixels": 1000,
        "shuffle": True,
    },
    "reward": {"timeout_s": 5.0, "max_failure_fraction": 0.5},
    "rollout": {
        "device": "cpu",
        "n": 2,
        "temperature": 1.0,
        "top_p": 1.0,
        "max_response_length": 4,
        "max_num_seqs": 8,
        "num_threads": None,
    },
    "actor": {
        "device": "cpu",
        "mini_batch_size": 2,
        "max_tokens_per_micro_batch": 500,
        "loss_agg_mode": "token-mean",
        "num_threads": 1,
    },
    "rollout_correction": {"rollout_is": "token", "rollout_is_threshold": 2.0},
    "optim": {"lr": 1e-3, "weight_decay": 0.01, "betas": [0.9, 0.99], "warmup_steps": 0, "max_grad_norm": 1.0},
    "self_distillation": {
        "alpha": 0.5,
        "distillation_topk": 5,
        "divergence_clip": None,
        "is_clip": 2.0,
        "policy_loss_weight": 0.1,
        "teacher_regularization": "ema",
        "ema_update_rate": 0.05,
        "teacher_sync_steps": 5,
        "demonstration_source": "ground_truth",
        "success_reward_threshold": 1.0,
        "include_environment_feedback": True,
        "max_reprompt_len": 100,
        "reprompt_template": "{prompt}{solution}{feedback} Again.",
    },
    "eval": {
        "val_before_train": False,
        "max_prompts": 2,
        "n": 0,
        "temperature": 1.0,
        "top_p": 1.0,
        "evaluate_teacher": True,
    },
    "tracking": {"report_to": [], "project": "p", "name": None, "log_completions_steps": 10, "num_completions": 2},
}
FIELDS = {key: str(setting.type) for key, setting in iterate_settings()}
KEYS = list(FIELDS)
NUMBERS = ("int", "float", "int | None", "float | None")


# ---- one attempt ----------------------------------------------------------------------------------------------------


class Timeout(BaseException):
    pass


class StepTrained(Exception):
    """Ends a run after one step, which shows that the file is valid."""


class StopAfterOneStep(NullCallback):
    def on_metrics(self, step: int, values: Mapping[str, float]) -> None:
        if step >= 1:
            raise StepTrained


@contextmanager
def limit_time(seconds: float) -> Iterator[None]:
    def raise_timeout(number: int, frame: FrameType | None) -> None:
        raise Timeout

    before = signal.signal(signal.SIGALRM, raise_timeout)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass
class Attempts:
    """Outcomes of the mutated files; ``defects`` has the files that neither trained nor had a correct refusal."""

    outcomes: Counter[str] = field(default_factory=Counter)
    messages: list[str] = field(default_factory=list)
    defects: list[str] = field(default_factory=list)

    def record(
        self, kind: str, text: str, error: BaseException | None, new_files: set[str], names: Sequence[str]
    ) -> None:
        complaints = []
        if error is None or isinstance(error, StepTrained):
            self.outcomes[f"{kind}: trained"] += 1
        elif isinstance(error, SDPOError):
            self.outcomes[f"{kind}: refused"] += 1
            message = str(error)
            self.messages.append(f"{kind}: {message}")
            if "\n" in message or not message.isprintable() or len(message) > 1000:
                complaints.append(f"the message is not one readable line: {message!r:.300}")
            if not any(name in message for name in names):
                complaints.append(f"the message names none of {', '.join(names)}: {message}")
            if new_files:
                complaints.append(f"new files: {', '.join(sorted(new_files))} after {message}")
        else:
            frames = traceback.extract_tb(error.__traceback__)
            where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames[::-1][:6])
            complaints.append(f"{type(error).__name__}: {error!s:.300} at {where}")
        self.defects += [f"{kind}: {complaint}\n  {text}" for complaint in complaints]


def list_files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def attempt(config_file: Path, overrides: Sequence[str] = ()) -> tuple[BaseException | None, set[str]]:
    """Load and train as ``sdpo train`` does; return the error and the new files."""
    before = list_files(Path())
    try:
        with limit_time(SECONDS):
            SDPOTrainer(load_config(config_file, overrides), StopAfterOneStep()).train()
        error: BaseException | None = None
    except (Exception, Timeout, SystemExit) as caught:
        error = caught
    torch.set_num_threads(1)
    new_files = list_files(Path()) - before
    for name in new_files:
        path = Path(name)
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return error, new_files


@pytest.fixture(scope="session")
def work_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a tiny model, data and a task."""
    folder = tmp_path_factory.mktemp("bad_input")
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=128,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=0,
        )
    )
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "task.py").write_text(TASK)
    for name in ("train", "test"):
        pq.write_table(pa.Table.from_pylist([make_row(i) for i in range(4)]), folder / f"{name}.parquet")
    return folder


@pytest.fixture(autouse=True)
def _change_to_work_dir(work_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work_dir)


def make_row(i: int) -> dict[str, Any]:
    return {
        "data_source": "digits",
        "prompt": [{"role": "user", "content": str(i * 31)}],
        "reward_model": {"style": "rule", "ground_truth": str(i)},
        "extra_info": {"index": i},
    }


# ---- config files ---------------------------------------------------------------------------------------------------


@dataclass
class MutatedFile:
    """Kind of the mutation, content of the file, and names; a refusal must contain one of the names."""

    kind: str
    content: bytes
    names: list[str]
    overrides: list[str] = field(default_factory=list)


VALUES: list[Any] = [
    None, "", " ", "x", "no/such/file", "\0", "a\0b", "é\u202e\U0001f600", "\ud800", "a" * 5000, "a\nb", "a: b", "- a",
    -1, 0, 1, 2, 7, 10**7, 10**9, 10**12, 10**18, 2**63, 10**30, 10**400, -(10**18), -0.0, 0.5, 1.5, 1e-300, 1e300,
    -1e300,
    math.nan, math.inf, -math.inf, True, False, [], [1], ["x"], [None], [[]], ["x", ["y"]], {}, {"a": 1}, {1: 2},
    {"nested": {"deep": [1]}}, "${nothing.here}", "${", "${output_dir}", "${..x}", "${oc.env:NOT_SET_ANYWHERE}",
    "${oc.env:PATH}",
    "${oc.decode:[}", "${no_resolver:1}", "${data}", "???", datetime.date(2020, 1, 1), datetime.datetime(2020, 1, 1),
    b"bytes",
    "/dev/null", "/dev/zero", "/", ".", "..", "model", "run.yaml", "train.parquet", "task.py", "~", "~nobody_at_all/x",
    "/proc/self/mem", "/proc/nothing", "1", "1.0", "true", "null", "1e5", "1_000", "0x10", "[1]", "nan", "auto",
    "cuda:99",
    "none", "float32", "json", "sys", "hidden_rule",
]  # fmt: skip


INSERTED = [
    b"\0", b"\xff\xfe", b"\t", b":", b": ", b"{", b"[", b"'", b'"', b"\n", b"#", b"&a ", b"*a ", b"!!", b"${",
    b"!x ", b"- ",
    b"? ", b"| ", b"> ", b"%", b"@", b"`", b"\xc3", b"\x1b[31m", b"!!python/object:os.system ",
]  # fmt: skip
ODD_KEYS = ["data", "optim", "x", "optim.x", "optim.lr.x", "optim..lr", ".", "", "data.train_files[0]", "é", "\0"]
OVERRIDE_VALUES = [
    "", "x", "=", "nan", "-1", "1e999", "[", "{", "[a", "{a:", "'", "${", "${x}", "null", "[1,2]", "{a: 1}", "\0",
    "\n", "a: b",
    "9" * 500, "&a", "*a", "!!python/none", "?", "- x", "\t",
]  # fmt: skip


def mutate_config_file(rng: random.Random) -> MutatedFile:
    return rng.choices([change_value, change_keys, change_text, replace_text, add_overrides], [50, 14, 20, 8, 8])[0](
        rng
    )


def dump(settings: Any) -> bytes:
    return yaml.dump(settings, allow_unicode=True, sort_keys=False).encode("utf-8", "surrogatepass")


def list_paths(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, ...]]:
    paths: list[tuple[str, ...]] = []
    for key, value in settings.items():
        paths.append((key,))
        if isinstance(value, dict):
            paths += [(key, *rest) for rest in list_paths(value)]
    return paths


def change_value(rng: random.Random) -> MutatedFile:
    """Change one to three settings, in the file or not, to another value."""
    settings = copy.deepcopy(BASE)
    names = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        path = rng.choice([*list_paths(BASE), *(tuple(key.split(".")) for key in KEYS)])
        value = copy.deepcopy(rng.choice(VALUES))
        if FIELDS.get(".".join(path)) in NUMBERS and rng.random() < 0.7:
            # A number, so that the range is checked, not only the type.
            value = rng.choice([v for v in VALUES if type(v) in (int, float)])
        elif FIELDS.get(".".join(path)) == "str" and rng.random() < 0.7:
            value = rng.choice([v for v in VALUES if isinstance(v, str)])
        if path[0] == "max_staleness" and value == 1:  # valid, but starts a separate process
            value = 2
        node: Any = settings
        for key in path[:-1]:
            if not isinstance(node.get(key), dict):
                node[key] = {}
            node = node[key]
        node[path[-1]] = value
        names.append(".".join(path))
    return MutatedFile("value", dump(settings), names)


def change_keys(rng: random.Random) -> MutatedFile:
    """Delete, rename, duplicate, move or wrap a key."""
    settings = copy.deepcopy(BASE)
    path = rng.choice(list_paths(BASE))
    node: Any = settings
    for key in path[:-1]:
        node = node[key]
    mutation = rng.choice(["delete", "rename", "twice", "move", "wrap", "odd"])
    value = node.pop(path[-1])
    if mutation == "rename":
        letters = list(path[-1])
        rng.shuffle(letters)
        node["".join(letters)] = value
        return MutatedFile("keys", dump(settings), ["".join(letters), ".".join(path)])
    if mutation == "twice":
        return MutatedFile("keys", dump(BASE) + dump({path[0]: BASE[path[0]]}), [path[0]])
    if mutation == "move":
        other = rng.choice([name for name, section in BASE.items() if isinstance(section, dict)])
        (settings.get(other) or settings)[path[-1]] = value
        return MutatedFile("keys", dump(settings), [path[-1], ".".join(path)])
    if mutation == "wrap":
        node[path[-1]] = {path[-1]: value}
        return MutatedFile("keys", dump(settings), [".".join(path)])
    if mutation == "odd":
        key = rng.choice([None, 1, 1.5, True, "", " ", "a.b", "é", "\0", "a" * 3000, path[-1].upper()])
        node[key] = value
        return MutatedFile("keys", dump(settings), ["unknown key", ".".join(path[:-1]) or "run.yaml"])
    return MutatedFile("keys", dump(settings), [".".join(path)])


def change_text(rng: random.Random) -> MutatedFile:
    """Delete, insert or duplicate characters and lines, or truncate the file."""
    text = bytearray(dump(BASE))
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(text) + 1)
        mutation = rng.choice(["delete", "insert", "cut", "line", "indent", "tab", "copy"])
        if mutation == "delete":
            del text[at : at + rng.randint(1, 5)]
        elif mutation == "insert":
            text[at:at] = rng.choice(INSERTED)
        elif mutation == "cut":
            del text[at:]
        else:
            lines = text.splitlines(keepends=True) or [bytearray()]
            line = rng.randrange(len(lines))
            if mutation == "line":
                del lines[line]
            elif mutation == "indent":
                lines[line] = bytearray(b" " * rng.randint(1, 5)) + lines[line].lstrip()
            elif mutation == "tab":
                lines[line] = bytearray(b"\t") + lines[line]
            else:
                lines.insert(rng.randrange(len(lines) + 1), lines[line])
            text = bytearray(b"".join(lines))
    return MutatedFile("text", bytes(text), ["run.yaml", *KEYS])


def replace_text(rng: random.Random) -> MutatedFile:
    """Replace the file by one that is no config file."""
    valid = dump(BASE)
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)
    )
    deep = "".join(f"{' ' * i}a:\n" for i in range(800))
    contents: list[bytes] = [
        b"", b" ", b"\n\n", b"# nothing\n", b"null", b"---\n...\n", b"x", b"1", b"[]", b"- output_dir: run\n", b"{}",
        b"\0" * 100,
        rng.randbytes(500), b"PAR1" + rng.randbytes(200), b"\xef\xbb\xbf" + valid, valid.decode().encode("utf-16"),
        valid.decode().encode("utf-16-be"), valid.replace(b"\n", b"\r\n"), valid + b"\n---\n" + valid,
        valid + b"\n...\n",
        b"x" * 200_000, b"[" * 3000, b"{a: " * 3000, deep.encode(), bomb.encode(), valid + bomb.encode(),
        b"verl:\n" + b"".join(b" " + b" " * i + b"a:\n" for i in range(300)) + valid,
        b"<<: &a {seed: 1}\n" + valid, b"a: &a {b: *a}\n", b"seed: !!python/object/apply:os.getcwd []\n" + valid,
        b"seed: !!int x\n" + valid, b"seed: !!binary aGVsbG8=\n" + valid, b"seed: !!set {a, b}\n" + valid,
        b"seed: !unknown 3\n" + valid,
        b"seed: 0o17\n" + valid.replace(b"seed: 3\n", b""), b"seed: 1:30:00\n" + valid.replace(b"seed: 3\n", b""),
        valid.replace(b"token-mean", "tok\xe9n-mean".encode("latin-1")), valid.replace(b"output_dir: run",
        b"output_dir: &r run\nx: *r"),
        valid.replace(b": 1.0", b": *nothing"), b"%YAML 9.9\n---\n" + valid, b"? [a, b]\n: 1\n" + valid,
    ]  # fmt: skip
    return MutatedFile("complete file", rng.choice(contents), ["run.yaml", *KEYS])


def add_overrides(rng: random.Random) -> MutatedFile:
    """Add invalid overrides to a valid file."""
    overrides = []
    names = ["override", "command line"]
    for _ in range(rng.randint(1, 2)):
        key, value = rng.choice([*KEYS, *ODD_KEYS]), rng.choice(OVERRIDE_VALUES)
        overrides.append(rng.choice([f"{key}={value}", f"{key}={value}", f"{key} = {value}", f"{key}:{value}", key]))
        names.append(key if key in KEYS else "override")
    return MutatedFile("override", dump(BASE), names, overrides)


@pytest.mark.slow
def test_config_files() -> None:
    rng = random.Random("config files")
    attempts = Attempts()
    config_file = Path("run.yaml")
    for _ in range(NUM_CONFIG_FILES):
        mutated = mutate_config_file(rng)
        config_file.write_bytes(mutated.content)
        error, new_files = attempt(config_file, mutated.overrides)
        difference = describe(mutated)
        attempts.record(mutated.kind, difference, error, new_files, mutated.names)
    config_file.unlink()
    finish(attempts, NUM_CONFIG_FILES)


# ---- data files -----------------------------------------------------------------------------------------------------

CELLS: list[Any] = [
    None, "", " ", "x", "\0", "\n", "é\u202e", 0, -1, 10**18, 0.5, math.nan, True, b"", b"\xff\xfe", [], [None],
    ["x"], [[]], [1],
    [[["x"]]], [{}], {}, {"a": None}, {"a": {"b": [1]}}, datetime.date(2020, 1, 1), datetime.timedelta(1),
    "x" * 100_000,
    "<|im_end|>" * 3, "<image>", "{prompt}{solution}", "{{ 1/0 }}", "{% for %}",
]  # fmt: skip
PARTS: list[Any] = [
    [], [{"type": "text", "text": "12"}], [{"type": "text"}], [{"text": "12"}], [{"type": "image"}],
    [{"type": "video"}],
    [{"type": None}], [{"type": "text", "text": None}], ["12"], [None], [["12"]], [{"type": 3}], [{}],
    [{"type": "image", "image": b"x"}],
]  # fmt: skip
ROLES: list[Any] = [
    None,
    "",
    "alien",
    "tool",
    "assistant",
    "system",
    "function",
    "USER",
    "user ",
    3,
    True,
    [],
    {"a": 1},
]


def mutate_row(rng: random.Random, row: dict[str, Any]) -> list[str]:
    """Change a row in place; return the names that a refusal may contain instead of the row."""
    mutation = rng.choice(["cell", "cell", "drop", "message", "message", "messages", "truth", "images"])
    if mutation == "cell":
        column = rng.choice([*row, "ability", "images"])
        row[column] = copy.deepcopy(rng.choice(CELLS))
        return [column]
    if mutation == "drop":
        column = rng.choice(list(row))
        del row[column]
        return [column]
    if mutation == "truth":
        row["reward_model"] = rng.choice([{}, {"style": "rule"}, {"ground_truth": copy.deepcopy(rng.choice(CELLS))}])
    elif mutation == "images":
        row["images"] = rng.choice(
            [[], [b"x"], [{"bytes": b"", "path": None}], [{"bytes": None, "path": "no.png"}], [3], ["no"]]
        )
    elif mutation == "message":
        message = row["prompt"][0]
        key = rng.choice(["role", "content", "content"])
        value = rng.choice(ROLES if key == "role" else CELLS + PARTS)
        message[key] = copy.deepcopy(value)
        if isinstance(value, bytes):  # the complete column has this type
            return ["row 0"]
        if rng.random() < 0.2:
            del message[rng.choice(list(message))]
        if rng.random() < 0.5:  # adds a user message
            row["prompt"].append({"role": "user", "content": "1"})
    else:
        user = row["prompt"][0]
        row["prompt"] = rng.choice(
            [[], [{}], [user] * 500, [user, user], [user, {"role": "assistant", "content": "2"}]]
            + [[{"role": role, "content": "2"}, user] for role in ("assistant", "system")]
            + [[user, {"role": "system", "content": "2"}], [None, user]]
        )
    return []


def mutate_data_file(rng: random.Random) -> MutatedFile:
    rows = [make_row(i) for i in range(4)]
    mutation = rng.choices(["row", "file"], [75, 25])[0]
    if mutation == "row":
        index = rng.randrange(4)
        names = mutate_row(rng, rows[index])
        # Without the other rows, if the column would have several types.
        for candidates, number in ((rows, index), ([rows[index]], 0)):
            try:
                content = write_parquet(pa.Table.from_pylist(candidates))
            except (pa.ArrowException, TypeError, OverflowError):
                continue
            return MutatedFile("row", content, [f"row {number}", *names])
        return mutate_data_file(rng)  # no Parquet file can contain this value
    table = pa.Table.from_pylist(rows)
    content = write_parquet(table)
    kind = rng.choice(["cut", "flip", "flip", "odd", "odd", "table"])
    if kind == "cut":
        content = content[: rng.randrange(len(content))]
    elif kind == "flip":
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 8)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        content = bytes(damaged)
    elif kind == "odd":
        buffer = io.BytesIO()
        with pa.ipc.new_file(buffer, table.schema) as writer:
            writer.write_table(table)
        content = rng.choice(
            [
                b"",
                b"PAR1",
                b"PAR1PAR1",
                b"\x00" * 1000,
                rng.randbytes(1000),
                b'{"data_source": "x"}\n',
                b"a,b\n1,2\n",
                buffer.getvalue(),
                gzip.compress(content),
                content + b"x",
                content[4:],
                b"PAR1" + content,
            ]
        )
    else:
        columns = dict(zip(table.column_names, table.columns, strict=True))
        content = write_parquet(
            rng.choice(
                [
                    table.slice(0, 0),
                    pa.table({}),
                    pa.table([*table.columns, table.column(1)], names=[*table.column_names, "prompt"]),
                    table.rename_columns([name.upper() for name in table.column_names]),
                    table.append_column("é\n", pa.array([1] * 4)),
                    pa.table({**columns, "data_source": columns["data_source"].dictionary_encode()}),
                    pa.table({**columns, "data_source": pa.array(["x"] * 4, pa.large_string())}),
                    pa.table(
                        {
                            **columns,
                            "prompt": pa.array([[("role", "user"), ("content", "1")]] * 4, pa.map_("str", "str")),
                        }
                    ),
                    pa.table({**columns, "prompt": pa.nulls(4)}),
                ]
            )
        )
    return MutatedFile(f"file, {kind}", content, ["bad.parquet"])


def write_parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


@pytest.mark.slow
def test_data_files() -> None:
    rng = random.Random("data files")
    attempts = Attempts()
    for _ in range(NUM_DATA_FILES):
        mutated = mutate_data_file(rng)
        Path("bad.parquet").write_bytes(mutated.content)
        setting = rng.choice(["train_files", "val_files"])
        settings = {**BASE, "data": {**BASE["data"], setting: ["bad.parquet"], "train_batch_size": 4}}
        settings["actor"] = {**BASE["actor"], "mini_batch_size": None}
        Path("run.yaml").write_bytes(dump(settings))
        error, new_files = attempt(Path("run.yaml"))
        try:
            content = repr(pq.read_table("bad.parquet").to_pylist())
        except Exception:
            content = repr(mutated.content)
        attempts.record(mutated.kind, content[:600], error, new_files, mutated.names)
    finish(attempts, NUM_DATA_FILES)


# ---- models ---------------------------------------------------------------------------------------------------------


def edit_json(file: str, **changes: Any) -> Callable[[Path], None]:
    """Change top-level keys of a file; None removes a key."""

    def edit(folder: Path) -> None:
        content = {**json.loads((folder / file).read_text()), **changes}
        (folder / file).write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return edit


def write(file: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes(content) and None


def truncate(file: str, fraction: float) -> Callable[[Path], None]:
    def write_part(folder: Path) -> None:
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: int(len(content) * fraction)])

    return write_part


def change_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return rewrite


def remove(*files: str) -> Callable[[Path], None]:
    def unlink(folder: Path) -> None:
        for file in files:
            (folder / file).unlink()

    return unlink


NORM = "model.norm.weight"
DAMAGED_MODELS: dict[str, Callable[[Path], None]] = {
    "no config": remove("config.json"),
    "no weights": remove("model.safetensors"),
    "no tokenizer": remove("tokenizer.json", "tokenizer_config.json"),
    "no file": lambda folder: [file.unlink() for file in folder.iterdir()] and None,
    **{f"config is {text!r}": write("config.json", text) for text in (b"", b"{", b"[]", b"3", b"\xff\0", b"{}")},
    "unknown architecture": edit_json("config.json", model_type="no_such_model"),
    "another architecture": edit_json("config.json", model_type="gpt2", architectures=["GPT2LMHeadModel"]),
    "an encoder": edit_json("config.json", model_type="t5", architectures=["T5ForConditionalGeneration"]),
    "no model_type": edit_json("config.json", model_type=None),
    "hidden_size null": edit_json("config.json", hidden_size=None),
    "hidden_size is a text": edit_json("config.json", hidden_size="big"),
    "other hidden_size": edit_json("config.json", hidden_size=32),
    "hidden_size 0": edit_json("config.json", hidden_size=0),
    "hidden_size negative": edit_json("config.json", hidden_size=-16),
    "no attention head": edit_json("config.json", num_attention_heads=0),
    "hidden_size is no multiple of the heads": edit_json("config.json", num_attention_heads=3),
    "more layers": edit_json("config.json", num_hidden_layers=2),
    "unknown activation": edit_json("config.json", hidden_act="no_such"),
    "vocabulary smaller than the weights": edit_json("config.json", vocab_size=100),
    "vocabulary larger than the weights": edit_json("config.json", vocab_size=1000),
    "window of 1": edit_json("config.json", max_position_embeddings=1),
    **{f"weights truncated to {part}": truncate("model.safetensors", part) for part in (0, 0.001, 0.1, 0.5, 0.99)},
    "weights are text": write("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"),
    "missing weight": change_weights(lambda weights: weights.pop(NORM)),
    "weight with another name": change_weights(lambda weights: weights.update(other=weights.pop(NORM))),
    "weight with another shape": change_weights(lambda weights: weights.update({NORM: torch.ones(3)})),
    "no weight": change_weights(dict.clear),
    "embeddings with fewer tokens": change_weights(
        lambda weights: weights.update(
            {name: weights[name][:50].clone() for name in ("model.embed_tokens.weight", "lm_head.weight")}
        )
    ),
    **{f"tokenizer truncated to {part}": truncate("tokenizer.json", part) for part in (0, 0.1, 0.9)},
    "tokenizer is a list": write("tokenizer.json", b"[]"),
    "tokenizer is empty": write("tokenizer.json", b"{}"),
    "unknown tokenizer class": edit_json("tokenizer_config.json", tokenizer_class="NoSuchTokenizer"),
    "tokenizer's config is a list": write("tokenizer_config.json", b"[]"),
    "tokenizer without eos_token": edit_json("tokenizer_config.json", eos_token=None),
    "no chat template": lambda folder: (
        edit_json("tokenizer_config.json", chat_template=None)(folder),
        (folder / "chat_template.jinja").unlink(missing_ok=True),
    )[1],
    "chat template that does not parse": write("chat_template.jinja", b"{% for %}"),
    "chat template that raises": write("chat_template.jinja", b"{{ raise_exception('roles must alternate') }}"),
    "chat template that divides": write("chat_template.jinja", b"{{ 1 / 0 }}"),
    "empty chat template": write("chat_template.jinja", b" "),
    "malformed generation config": write("generation_config.json", b"{"),
    "eos_token_id is a text": edit_json("generation_config.json", eos_token_id="x"),
}  # fmt: skip


@pytest.mark.slow
def test_models() -> None:
    attempts = Attempts()
    settings = {**BASE, "model": {"path": "broken"}}
    for name, damage in DAMAGED_MODELS.items():
        shutil.copytree("model", "broken")
        damage(Path("broken"))
        Path("run.yaml").write_bytes(dump(settings))
        error, new_files = attempt(Path("run.yaml"))
        attempts.record(
            "model", name, error, new_files, ["model.path: ", "data.train_files: train.parquet: row 0", "window of 1"]
        )
        if error is None or isinstance(error, StepTrained):
            attempts.messages.append(f"model: trained: {name}")
        shutil.rmtree("broken")
    finish(attempts, len(DAMAGED_MODELS))
    assert attempts.outcomes["model: refused"] >= len(DAMAGED_MODELS) - 5


def describe(mutated: MutatedFile) -> str:
    before = dump(BASE).decode().splitlines()
    after = mutated.content.decode("utf-8", "backslashreplace").splitlines()
    changed = [line for line in after if line not in before] + [f"(no) {line}" for line in before if line not in after]
    return " | ".join([*mutated.overrides, *changed])[:400]


def finish(attempts: Attempts, number: int) -> None:
    for outcome, count in sorted(attempts.outcomes.items()):
        print(f"{count:4d} {outcome}")
    if os.environ.get("SHOW"):
        Path(os.environ["SHOW"]).write_text("\n".join(sorted(attempts.messages)))
    assert not attempts.defects, f"{len(attempts.defects)} defects:\n" + "\n".join(attempts.defects)
    assert attempts.outcomes.total() == number
