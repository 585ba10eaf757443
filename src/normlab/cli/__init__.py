"""The command line: one verb a module. Heavy imports wait until a verb needs them."""

import click

from normlab.cli.compare import compare
from normlab.cli.data import data
from normlab.cli.doctor import doctor, recalibrate
from normlab.cli.evaluate import evaluate
from normlab.cli.export import export_command, import_command
from normlab.cli.inspect import inspect
from normlab.cli.predict import predict
from normlab.cli.recipes import list_recipes, summary
from normlab.cli.serve import serve
from normlab.cli.train import train


class Verbs(click.Group):
    """A group that lists its commands in the order of use, each with its whole first sentence."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.commands)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, command.get_short_help_str(300)) for name, command in self.commands.items()]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="normlab")
def cli() -> None:
    """Train batch-normalised image classifiers, and know what the normalisation does for them.

    Start with `normlab train`: it gets CIFAR-10, trains the default recipe and scores it.
    """


for verb in (
    train,
    evaluate,
    predict,
    compare,
    inspect,
    doctor,
    recalibrate,
    export_command,
    import_command,
    serve,
    list_recipes,
    summary,
    data,
):
    cli.add_command(verb)
