"""`normlab export` and `normlab import`: take a run elsewhere, bring a model in."""

import json
from pathlib import Path

import click

from normlab.cli.options import WEIGHTS
from normlab.cli.output import say


@click.command("export")
@click.argument("run", required=False)
@click.option(
    "--format", "file_format", default="onnx", show_default=True, help="onnx, keras or web."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    metavar="FILE",
    help="The file to write, with web a folder; README.md, the model card, comes beside it.",
)
@WEIGHTS
@click.option("--data", metavar="DATA", help="Where the run's data are now.")
@click.option("--int8", is_flag=True, help="With onnx: in eight bits; what that costs is told.")
@click.option(
    "--max-loss",
    type=click.FloatRange(0, 100),
    metavar="POINTS",
    help="With --int8: the most accuracy it may lose on the test images; by default 0.5.",
)
@click.option(
    "--runtime",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="With web: the tarball of ONNX Runtime Web; by default npm gets it, 33 MB, once.",
)
@click.option(
    "--browser",
    type=click.Path(path_type=Path),
    metavar="PROGRAM",
    help="With web: the browser to check in; by default Chromium or Chrome.",
)
@click.option("--json", "as_json", is_flag=True, help="End with one line of JSON.")
def export_command(
    run: str | None,
    file_format: str,
    out: Path,
    weights: str,
    data: str | None,
    int8: bool,
    max_loss: float | None,
    runtime: Path | None,
    browser: Path | None,
    as_json: bool,
) -> None:
    """Write RUN (by default the latest) as a file that other programs run, or as a page.

    The file takes pixels and gives probabilities. Its answers are compared with the run's on the
    whole test set first, a page's on 1,000 test images; if they differ nothing is written, and the
    exit code is 1. In eight bits they differ; then the loss of accuracy is what is judged.
    """
    from normlab.interchange import export_run
    from normlab.runs import open_run

    exported = export_run(
        open_run(run),
        out,
        file_format=file_format,
        weights=weights,
        data=data,
        int8=int8,
        max_loss=None if max_loss is None else max_loss / 100,
        runtime=runtime,
        browser=browser,
    )
    certificate = exported.certificate
    say(f"Checked by {certificate.checked_with}: {certificate}.")
    for sentence in exported.unfolded:
        say(f"Note: {sentence}.")
    size, count = sum(exported.files.values()) / 1e6, len(exported.files)
    say(f"Model: {exported.path} ({size:.1f} MB in {count} files)")
    say(f"Card: {exported.card}")
    if as_json:
        click.echo(json.dumps({"model": str(exported.path), "certificate": certificate.as_dict()}))


@click.command("import")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="The run's folder, new or empty.")
@click.option(
    "--data",
    metavar="DATA",
    help="What it was trained on: cifar10 (the default), or anything that train takes.",
)
@click.option(
    "--image-size", type=click.IntRange(8, 512), help="Pixels a side of pictures; 32 by default."
)
@click.option("--skip-bad", is_flag=True, help="Leave out pictures that cannot be used.")
@click.option("--json", "as_json", is_flag=True, help="End with one line of JSON.")
def import_command(
    model: Path,
    out: Path | None,
    data: str | None,
    image_size: int | None,
    skip_bad: bool,
    as_json: bool,
) -> None:
    """Make a run of MODEL, a .keras or .h5 file with the notebook's network.

    Weights and statistics are taken over and scored once on the test images.
    """
    from normlab.interchange.importing import import_model

    run = import_model(model, out, data=data, image_size=image_size, skip_bad=skip_bad)
    result = run.finished()
    low, high = result["test_accuracy_interval"]
    say(
        f"Test accuracy: {result['test_accuracy']:.4f} "
        f"(95 % interval over test pictures {low:.4f} to {high:.4f})"
    )
    say(f"Run: {run.path}")
    if as_json:
        click.echo(json.dumps(result))
