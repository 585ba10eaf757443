"""Options that come from the settings of a recipe, and what several commands share."""

from collections.abc import Callable, Mapping
from typing import Any

import click

from normlab.errors import UserError
from normlab.recipes import SETTINGS
from normlab.recipes.settings import Setting

DATA = click.option(
    "--data",
    metavar="DATA",
    help="cifar10 (the default), sample (a few hundred images, no network), a folder of pictures, "
    "a .npz, a .parquet, or an archive or folder that holds CIFAR-10.",
)
SKIP_BAD = click.option("--skip-bad", is_flag=True, help="Leave out pictures that cannot be used.")
GROUP_BY = click.option(
    "--group-by",
    metavar="PATTERN",
    help="A regular expression of files' names: what it finds alike stays on one side of a split.",
)
JSON = click.option("--json", "as_json", is_flag=True, help="End with one line of JSON.")
WEIGHTS = click.option(
    "--weights",
    default="kept",
    show_default=True,
    help="Of a run: kept (by its result), last, best or recalibrated.",
)
RATE = click.FloatRange(1, 100, max_open=True)  # per cent
VIEWS = click.option(
    "--views",
    type=click.Choice(["single", "flip", "shift", "unsure"]),
    default="single",
    show_default=True,
    help="Versions of each picture to answer from: single, flip (2), shift (6), or unsure: "
    "6 for the pictures with the least sure answers, about a quarter.",
)
ABSTAIN_AT = click.option(
    "--abstain-at",
    type=RATE,
    metavar="PERCENT",
    help="Answer only where so many answers are right, as the held-out pictures show.",
)
SETS = click.option(
    "--sets",
    type=RATE,
    metavar="PERCENT",
    help="Give sets of classes; so many of them hold the true one.",
)
PER_CLASS = click.option(
    "--per-class", is_flag=True, help="With --sets: for the pictures of each class, too."
)


class ImageSize(click.ParamType[Any]):
    """Pixels a side, 8 to 512, or `auto`, which is None: as the pictures allow."""

    name = "pixels"

    def convert(
        self, value: Any, parameter: click.Parameter | None, context: click.Context | None
    ) -> Any:
        if value == "auto":
            return None
        if not str(value).isdigit() or not 8 <= int(value) <= 512:
            self.fail(f"{value!r}: give 8 to 512 pixels, or auto", parameter, context)
        return int(value)


IMAGE_SIZE = click.option(
    "--image-size",
    type=ImageSize(),
    metavar="PIXELS|auto",
    help="Pixels a side of pictures; auto, the default, is what most of them allow: 32 or 64, and "
    "with --minutes 96 or 128, too.",
)
SECTION = "Settings of the recipe, instead of its own"


class SettingType(click.ParamType[Any]):
    """The value of a setting, read and checked by its declaration."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.name = {int: "integer", float: "float", str: "name"}[setting.kind]

    def convert(
        self, value: Any, parameter: click.Parameter | None, context: click.Context | None
    ) -> Any:
        try:
            return (self.setting.parse(value),) if isinstance(value, str) else value
        except UserError as e:
            self.fail(str(e), parameter, context)


class SettingOption(click.Option):
    """An option that replaces a setting of the recipe."""


class RecipeCommand(click.Command):
    """A command whose help lists the recipe's settings in a section of their own."""

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        parameters = self.get_params(context)
        for title, wanted in (("Options", False), (SECTION, True)):
            rows = [
                record
                for parameter in parameters
                if isinstance(parameter, click.Option)
                if isinstance(parameter, SettingOption) is wanted
                if (record := parameter.get_help_record(context)) is not None
            ]
            with formatter.section(title):
                formatter.write_dl(rows)


def recipe_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add an option for every setting that a recipe may have; `given_settings` reads them."""
    for setting in reversed(SETTINGS.values()):
        function = _option(setting)(function)
    return function


def given_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings among a command's options that were given, by their flat names."""
    found = {name: options.get(name) for name in SETTINGS}
    return {
        name: value[0] if isinstance(value, tuple) else value
        for name, value in found.items()
        if value is not None
    }


def refuse(context: click.Context, why: str, names: set[str]) -> None:
    """Refuse those of the command's parameters that were given."""
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        given = source == click.core.ParameterSource.COMMANDLINE
        if name in names and given and context.params.get(name) is not None:
            shown = "RECIPE" if isinstance(parameter, click.Argument) else parameter.opts[0]
            raise click.UsageError(f"{shown}: {why}: leave it out")


def _option(setting: Setting) -> Callable[..., Any]:
    name = setting.name.replace("_", "-")
    text = setting.help
    if setting.names:
        text = f"{text.rstrip('.')}: {', '.join(setting.names)}."
    if setting.kind is bool:
        return click.option(f"--{name}/--no-{name}", default=None, help=text, cls=SettingOption)
    return click.option(f"--{name}", type=SettingType(setting), help=text, cls=SettingOption)
