"""`normlab recipes` and `normlab summary`: what can be trained, and the network it trains."""

import click

from normlab.cli.options import SettingType, given_settings
from normlab.cli.output import say
from normlab.recipes import SETTINGS


@click.command()
@click.argument("recipe")
@click.option("--norm", type=SettingType(SETTINGS["norm"]), help="The normaliser.")
def summary(recipe: str, norm: tuple[str] | None) -> None:
    """Print RECIPE's network as a table of layers, output shapes and parameters."""
    from normlab import recipes
    from normlab.models import MODELS, summarize

    chosen = recipes.get(recipe).override(**given_settings({"norm": norm}))
    say(str(summarize(MODELS[chosen.model.name](norm=chosen.norm.name))))


@click.command("recipes")
def list_recipes() -> None:
    """List the recipes."""
    from normlab import recipes

    width = max(map(len, recipes.RECIPES))
    for name, make in recipes.RECIPES.items():
        first_line = (make.__doc__ or "").strip().splitlines()[0]
        default = "  (the default)" if name == recipes.DEFAULT else ""
        say(f"{name:<{width}}  {first_line}{default}")
