"""The command line. Heavy imports wait until a command runs, so that ``sdpo --help`` is instant."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from sdpo.errors import SDPOError

app = typer.Typer(
    help="Self-Distillation Policy Optimization: train a model against its own, better informed self.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(help="Make a task's data.", no_args_is_help=True)
app.add_typer(data_app, name="data")

RunFile = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="Run file; shipped ones are in configs/.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings that override the file's, e.g. optim.lr=1e-5."),
]


@app.command()
def train(
    run_file: RunFile,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved run and what it would cost.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from output_dir's newest whole checkpoint.")] = False,
) -> None:
    """Train on the embedded engine: torch and transformers, nothing else."""
    from sdpo.config.loader import load_config

    run = load_config(run_file, [*(overrides or []), *(["resume_mode=required"] if resume else [])])
    if dry_run:
        from sdpo.report.dry_run import print_dry_run
        from sdpo.trainer.memory_estimate import estimate_memory

        print_dry_run(run, estimate_memory(run))
        return

    from sdpo.kernels.cpu.allocator import keep_freed_memory
    from sdpo.report import read_run
    from sdpo.report.console import ConsoleObserver, print_result_table
    from sdpo.trainer.trainer import SDPOTrainer

    keep_freed_memory()
    with ConsoleObserver(run.max_steps) as observer:
        result = SDPOTrainer(run, observer).train()
    if result.metrics:  # none if it was stopped before the first
        print_result_table([read_run(result.output_dir)])
    print(f"run folder: {result.output_dir}")
    if result.stop_reason:
        print(f"stopped by a health check: {result.stop_reason}", file=sys.stderr)
    if result.interrupt_signal:
        print(f"stopped by {result.interrupt_signal}; add --resume to go on", file=sys.stderr)
        raise typer.Exit(128 + signal.Signals[result.interrupt_signal])


@app.command()
def verl(
    run_file: RunFile,
    overrides: Overrides = None,
    show: Annotated[bool, typer.Option("--print", help="Print the command that starts this run, and stop.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved run and what it would cost.")] = False,
) -> None:
    """Train on verl: Ray, vLLM, FSDP2. The same run file; settings that only verl has are passed on to Hydra."""
    from sdpo.config.loader import load_config
    from sdpo.config.root import iterate_settings
    from sdpo.verl_backend.entrypoint.launch import build_command, launch

    known = {key for key, _ in iterate_settings()}
    ours: list[str] = []
    theirs: list[str] = []
    for override in overrides or []:
        key = override.partition("=")[0]
        (ours if key in known or key.startswith(("data.task_args.", "verl.")) else theirs).append(override)
    run = load_config(run_file, ours)
    command = build_command(run, theirs)
    for note in command.notes:
        print(note, file=sys.stderr)
    if dry_run:
        from sdpo.report.dry_run import print_dry_run
        from sdpo.verl_backend.config.memory_estimate import estimate_memory

        print_dry_run(run, estimate_memory(run, command.arguments))
    if show:
        print(command)
    if not (dry_run or show):
        launch(run, command)


@data_app.command("hidden-rule")
def data_hidden_rule(
    out: Annotated[Path, typer.Option(help="Folder to make: model/, train.parquet, test.parquet.")],
    mode: Annotated[str, typer.Option(help="feedback (rule never seen) or peers (rule seen).")] = "feedback",
    seed: Annotated[int, typer.Option(help="Seed of rows and pretraining.")] = 0,
) -> None:
    """A tiny pretrained model and the digit strings that it is to learn a hidden rule on; about a minute."""
    from sdpo.report.console import ConsoleObserver
    from sdpo.rewards.toy.hidden_rule import HiddenRule

    with ConsoleObserver(0) as observer:
        HiddenRule(dir=str(out), mode=mode, seed=seed).prepare(observer)
    print(f"made {out}/model, {out}/train.parquet, {out}/test.parquet")


@data_app.command("geo3k")
def data_geo3k(
    out: Annotated[Path, typer.Option(help="Folder for train.parquet and test.parquet.")],
    source: Annotated[
        str, typer.Option(help="Name on the Hugging Face hub, or a folder with a copy.")
    ] = "hiyouga/geometry3k",
    drawn: Annotated[
        int, typer.Option(min=0, help="Draw so many simple problems (and a quarter for testing) instead; offline.")
    ] = 0,
) -> None:
    """Geometry3k, geometry problems with a diagram, in verl's schema; needs sdpo[geo3k]."""
    from sdpo.report.console import ConsoleObserver
    from sdpo.rewards.geo3k.data import prepare
    from sdpo.rewards.toy.synthetic_geometry import write_drawn_geometry

    if drawn:
        write_drawn_geometry(out, drawn, max(1, drawn // 4))
    else:
        with ConsoleObserver(0) as observer:
            prepare(out, source, observer)
    print(f"made {out}/train.parquet, {out}/test.parquet")


@data_app.command("figures")
def data_figures(
    out: Annotated[Path, typer.Option(help="Folder to make: model/, train.parquet, test.parquet.")],
    seed: Annotated[int, typer.Option(help="Seed of rows and pretraining.")] = 0,
) -> None:
    """A tiny pretrained vision-language model and the figures that it is to learn to read; about two minutes."""
    from sdpo.report.console import ConsoleObserver
    from sdpo.rewards.toy.figures import Figures

    with ConsoleObserver(0) as observer:
        Figures(dir=str(out), seed=seed).prepare(observer)
    print(f"made {out}/model, {out}/train.parquet, {out}/test.parquet")


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="RUN_DIR/checkpoints/step_K.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make.")],
    teacher: Annotated[bool, typer.Option("--teacher", help="The teacher, and not the student.")] = False,
) -> None:
    """Write a checkpoint's student or teacher as a plain model, LoRA adapters merged into it."""
    from sdpo.trainer.checkpoint.export import export_model

    export_model(checkpoint, out, teacher=teacher)
    print(f"model: {out}")


@app.command()
def report(
    output_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="Folders of one or more runs.")],
    out: Annotated[Path | None, typer.Option(help="Where to write; the first run's folder if not given.")] = None,
) -> None:
    """Draw learning curves (PNG) and one self-contained page (HTML), several runs overlaid."""
    from sdpo.report import read_runs, write_report
    from sdpo.report.console import print_result_table

    paths = write_report(output_dirs, out)
    print_result_table(read_runs(output_dirs))
    print(f"plot: {paths.plot}\npage: {paths.page}")


@app.command()
def doctor() -> None:
    """Say what is installed, which engines can run here, and what the others lack."""
    from sdpo.doctor import examine, inspect_machine
    from sdpo.report.doctor import print_doctor_report

    report = examine(inspect_machine())
    print_doctor_report(report)
    if not report.can_run:
        raise typer.Exit(1)


def main() -> None:
    """Entry point: a person's mistake is one line and exit code 2; a programming error keeps its traceback."""
    try:
        app()
    except SDPOError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
