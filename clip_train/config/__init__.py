"""What a run is: the recipe's schema and how it is read from TOML."""

from clip_train.config.load import dump_recipe, find_recipe, load_recipe, parse_recipe
from clip_train.config.schema import Recipe

__all__ = ["Recipe", "dump_recipe", "find_recipe", "load_recipe", "parse_recipe"]
