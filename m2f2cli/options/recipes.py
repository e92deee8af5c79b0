"""Named settings of ``m2f2 train-detector``: YAML files of flags, below every other source.

An installed package adds a recipe through the entry-point group ``m2f2cli.recipes``: the name of
the entry point is the recipe's, the object it points to the ``pathlib.Path`` of a YAML file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from m2f2cli.errors import ConfigError
from m2f2cli.options.fields import parse_yaml
from m2f2cli.registry import Registry

_FOLDER = Path(__file__).parent.parent / "assets" / "recipes"
PUBLISHED = _FOLDER / "published.yaml"
PUBLISHED_EFFICIENTNET = _FOLDER / "published-efficientnet-b4.yaml"
FINE_TUNE = _FOLDER / "fine-tune.yaml"
GENERALIZE = _FOLDER / "generalize.yaml"
ROBUST = _FOLDER / "robust.yaml"
SMALL_DATA = _FOLDER / "small-data.yaml"

RECIPES = Registry(
    "recipe",
    {
        "fine-tune": f"{__name__}:FINE_TUNE",
        "generalize": f"{__name__}:GENERALIZE",
        "published": f"{__name__}:PUBLISHED",
        "published-efficientnet-b4": f"{__name__}:PUBLISHED_EFFICIENTNET",
        "robust": f"{__name__}:ROBUST",
        "small-data": f"{__name__}:SMALL_DATA",
    },
    group="m2f2cli.recipes",
)


def read_recipe(name: str) -> dict[str, Any]:
    """The settings of a recipe.

    Args:
        name: One of ``RECIPES``.

    Returns:
        Option names with underscores to values.

    Raises:
        ConfigError: There is no such recipe, or its file cannot be read.
    """
    file = RECIPES.get(name)
    try:
        content = parse_yaml(Path(file).read_text(encoding="utf-8"))
        return {str(key).replace("-", "_"): value for key, value in content.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"The recipe '{name}' cannot be read: {error}.") from error
