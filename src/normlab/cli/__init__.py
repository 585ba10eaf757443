"""The command line: one verb a module. Heavy imports wait until a verb needs them."""

import click

from normlab.cli.calibrate import calibrate
from normlab.cli.compare import compare
from normlab.cli.curve import curve
from normlab.cli.data import data
from normlab.cli.doctor import doctor, recalibrate
from normlab.cli.evaluate import evaluate
from normlab.cli.export import export_command, import_command
from normlab.cli.inspect import inspect
from normlab.cli.predict import predict
from normlab.cli.recipes import list_recipes, summary
from normlab.cli.serve import serve
from normlab.cli.train import train
from normlab.core.cores import spare_others
from normlab.core.launcher import world
from normlab.errors import UserError


class Verbs(click.Group):
    """A group that lists its commands in the order of use, each with its whole first sentence."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.commands)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, command.get_short_help_str(300)) for name, command in self.commands.items()]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def _tell_versions(context: click.Context, _: click.Parameter, asked: bool) -> None:
    """Print what is installed, without importing any of it, and leave."""
    if not asked or context.resilient_parsing:
        return
    from importlib.metadata import PackageNotFoundError, version
    from importlib.resources import files

    built = (files("normlab") / "kernels").iterdir()
    variants = {p.name[1:].partition(".")[0] for p in built if p.name.endswith(".so")}
    kernels = f"kernels for {', '.join(sorted(variants))}" if variants else "no kernels"
    try:
        torch = version("torch")
    except PackageNotFoundError:
        torch = "is not installed"
    click.echo(f"normlab {version('normlab')}, {kernels}; PyTorch {torch}")
    context.exit()


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_tell_versions,
    help="Show the versions of normlab and PyTorch, and the kernels there are.",
)
@click.pass_context
def cli(context: click.Context) -> None:
    """Train batch-normalised image classifiers, and know what the normalisation does for them.

    Start with `normlab train`: it gets CIFAR-10, trains the default recipe and scores it.
    """
    spare_others()
    rank, size = world()
    if size > 1 and context.invoked_subcommand != "train":
        if rank:
            context.exit(2)
        raise UserError(
            f"`normlab {context.invoked_subcommand}` is work for one process and was started in "
            f"{size}: leave out torchrun, which is for `normlab train`"
        )


for verb in (
    train,
    evaluate,
    predict,
    compare,
    curve,
    inspect,
    doctor,
    recalibrate,
    calibrate,
    export_command,
    import_command,
    serve,
    list_recipes,
    summary,
    data,
):
    cli.add_command(verb)
