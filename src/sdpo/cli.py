"""The command line. Modules are imported when a command runs, so that ``sdpo --help`` is fast."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from sdpo.errors import SDPOError

app = typer.Typer(
    help="Self-Distillation Policy Optimization: train a model with itself, given more context, as the teacher.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(help="Create the data of a task.", no_args_is_help=True)
app.add_typer(data_app, name="data")

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="Config file, e.g. from configs/.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Override settings of the file, e.g. optim.lr=1e-5."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved config and its memory estimate, and exit.")]


@app.command()
def train(
    config_file: ConfigFile,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the latest complete checkpoint.")] = False,
) -> None:
    """Train with the native trainer, which needs torch and transformers only."""
    from sdpo.config.loader import load_config

    config = load_config(config_file, [*(overrides or []), *(["resume_mode=required"] if resume else [])])
    if dry_run:
        from sdpo.report.dry_run import print_dry_run
        from sdpo.trainer.memory_estimate import MemoryEstimator

        print_dry_run(config, MemoryEstimator(config).estimate())
        return

    from sdpo.kernels.cpu.allocator import keep_freed_memory
    from sdpo.report import read_run
    from sdpo.report.console import ConsoleCallback, print_result_table
    from sdpo.trainer.trainer import SDPOTrainer

    keep_freed_memory()
    with ConsoleCallback(config.max_steps) as callback:
        result = SDPOTrainer(config, callback).train()
    if result.metrics:  # empty if the run was stopped before the first step
        print_result_table([read_run(result.output_dir)])
    print(f"run folder: {result.output_dir}")
    if result.stop_reason:
        print(f"stopped by a health check: {result.stop_reason}", file=sys.stderr)
    if result.interrupt_signal:
        print(f"stopped by {result.interrupt_signal}; add --resume to continue", file=sys.stderr)
        raise typer.Exit(128 + signal.Signals[result.interrupt_signal])


@app.command()
def verl(
    config_file: ConfigFile,
    overrides: Overrides = None,
    show_command: Annotated[
        bool, typer.Option("--show-command", help="Print the command that would start the run, and exit.")
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Train with the verl backend (Ray, vLLM, FSDP2); overrides unknown to sdpo are passed to verl's Hydra config."""
    from sdpo.config.loader import load_config
    from sdpo.config.root import iterate_settings
    from sdpo.verl_backend.config.to_verl import to_verl_overrides
    from sdpo.verl_backend.entrypoint.launch import build_command, launch

    known = {key for key, _ in iterate_settings()}
    sdpo_overrides: list[str] = []
    verl_overrides: list[str] = []
    for override in overrides or []:
        key = override.partition("=")[0]
        is_ours = key in known or key.startswith(("data.task_args.", "verl."))
        (sdpo_overrides if is_ours else verl_overrides).append(override)
    config = load_config(config_file, sdpo_overrides)
    command = build_command(to_verl_overrides(config), config.output_dir, verl_overrides)
    for note in command.notes:
        print(note, file=sys.stderr)
    if dry_run:
        from sdpo.report.dry_run import print_dry_run
        from sdpo.verl_backend.config.memory_estimate import MemoryEstimator

        print_dry_run(config, MemoryEstimator(config, command.arguments).estimate())
    if show_command:
        print(command)
    if not (dry_run or show_command):
        launch(config, command)


@data_app.command("hidden-rule")
def data_hidden_rule(
    out: Annotated[Path, typer.Option(help="New folder for model/, train.parquet and test.parquet.")],
    mode: Annotated[str, typer.Option(help="feedback (the rule is not pretrained) or peers (it is).")] = "feedback",
    seed: Annotated[int, typer.Option(help="Random seed of rows and pretraining.")] = 0,
) -> None:
    """Create the hidden-rule task: a tiny pretrained model and strings of digits; takes about a minute."""
    from sdpo.report.console import ConsoleCallback
    from sdpo.rewards.toy.hidden_rule import HiddenRule

    with ConsoleCallback(0) as callback:
        HiddenRule(dir=str(out), mode=mode, seed=seed).prepare(callback)
    print(f"wrote {out}/model, {out}/train.parquet, {out}/test.parquet")


@data_app.command("geo3k")
def data_geo3k(
    out: Annotated[Path, typer.Option(help="Folder for train.parquet and test.parquet.")],
    source: Annotated[str, typer.Option(help="Name on the Hugging Face hub, or a local copy.")] = "hiyouga/geometry3k",
    drawn: Annotated[
        int,
        typer.Option(min=0, help="Draw this many simple problems instead, plus a quarter for validation."),
    ] = 0,
) -> None:
    """Convert Geometry3k, geometry problems with diagrams, to verl's schema; needs sdpo[geo3k]."""
    from sdpo.report.console import ConsoleCallback
    from sdpo.rewards.geo3k.data import prepare
    from sdpo.rewards.toy.synthetic_geometry import write_drawn_geometry

    if drawn:
        write_drawn_geometry(out, drawn, max(1, drawn // 4))
    else:
        with ConsoleCallback(0) as callback:
            prepare(out, source, callback)
    print(f"wrote {out}/train.parquet, {out}/test.parquet")


@data_app.command("figures")
def data_figures(
    out: Annotated[Path, typer.Option(help="New folder for model/, train.parquet and test.parquet.")],
    seed: Annotated[int, typer.Option(help="Random seed of rows and pretraining.")] = 0,
) -> None:
    """Create the figures task: a tiny pretrained vision-language model and figures; takes about two minutes."""
    from sdpo.report.console import ConsoleCallback
    from sdpo.rewards.toy.figures import Figures

    with ConsoleCallback(0) as callback:
        Figures(dir=str(out), seed=seed).prepare(callback)
    print(f"wrote {out}/model, {out}/train.parquet, {out}/test.parquet")


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="OUTPUT_DIR/checkpoints/step_K.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder.")],
    teacher: Annotated[bool, typer.Option("--teacher", help="Export the teacher instead of the student.")] = False,
) -> None:
    """Write a checkpoint's student or teacher as a transformers model, with merged LoRA adapters."""
    from sdpo.trainer.checkpoint.export import export_model

    export_model(checkpoint, out, teacher=teacher)
    print(f"model: {out}")


@app.command()
def report(
    output_dirs: Annotated[
        list[Path], typer.Argument(metavar="OUTPUT_DIR...", help="Output folders of one or more runs.")
    ],
    out: Annotated[Path | None, typer.Option(help="Folder for the report; default: the first of them.")] = None,
) -> None:
    """Draw learning curves (PNG) and write a self-contained page (HTML) of one or several runs."""
    from sdpo.report import read_runs, write_report
    from sdpo.report.console import print_result_table

    paths = write_report(output_dirs, out)
    print_result_table(read_runs(output_dirs))
    print(f"plot: {paths.plot}\npage: {paths.page}")


@app.command()
def doctor() -> None:
    """Show installed versions, devices, and which backends can run."""
    from sdpo.doctor import check_environment, inspect_machine
    from sdpo.report.doctor import print_doctor_report

    report = check_environment(inspect_machine())
    print_doctor_report(report)
    if not report.can_run:
        raise typer.Exit(1)


def main() -> None:
    """Entry point. A user error is printed in one line with exit code 2; other errors keep their traceback."""
    try:
        app()
    except SDPOError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
