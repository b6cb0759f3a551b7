"""Settings in JSON files, and the errors that bad input raises.

An error is one line that names the file and what to do; the commands exit with status 2.
"""
import argparse
import json
import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

HUGE = 10 ** 12         # no setting is as large
MAX_TILES = 100         # of a page: among more it takes seconds to choose a grid
SEVERAL = {"nargs": "+", "action": "extend"}    # of an argparse flag that may be given twice


class InputError(ValueError):
    """Bad input. The message is one line that says what is wrong and what to do."""


class CheckpointError(InputError):
    """A model folder that cannot be used. The message names the file and the key."""


class ImageError(InputError):
    """An image that cannot be used."""


class Settings:
    """The settings in a JSON file, or in one of its sections.

    Every complaint about a setting is a CheckpointError that names the file and the key.
    """

    def __init__(self, path: Path, values: dict | None = None, section: str = ""):
        self.path, self.section_name = path, section
        self.values = read_json(path) if values is None else values

    def error(self, key: str, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {self.section_name}{key} {reason}")

    def number(self, key: str, default: float | None = None, kind: type = int) -> int | float:
        """A positive number; null is the same as absent, and without a default an error."""
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise self.error(key, "is missing")
        is_number = isinstance(value, (int, kind)) and not isinstance(value, bool)
        if not is_number or not 0 < value < HUGE:
            wanted = "integer" if kind is int else "number"
            if is_number and value > 0:
                raise self.error(key, f"is {HUGE:,} or more")
            raise self.error(key, f"is {value!r}, not a positive {wanted}")
        return kind(value)

    def only(self, key: str, *implemented):
        """The value of a setting, which must be an implemented one; None stands for absent."""
        value = self.values.get(key)
        if value not in implemented:
            names = [json.dumps(name) for name in implemented if name is not None]
            only = f", only {' or '.join(names)} is" if names else ""
            raise self.error(key, f"is {json.dumps(value)}: not implemented{only}")
        return value

    def model_type(self, *implemented: str) -> str:
        """What a config.json says that the model is, which must be an implemented one."""
        if str(self.values.get("model_type")).startswith("siglip2"):
            raise self.error("model_type", "is SigLIP 2's NaFlex, with any number of patches: not "
                             "implemented; SigLIP 2 of a fixed resolution says siglip")
        return self.only("model_type", *implemented)

    def section(self, key: str) -> "Settings":
        """A section, which is empty where it is absent."""
        values = self.values.get(key)
        if not isinstance(values, dict | None):
            raise self.error(key, "is not an object")
        return Settings(self.path, values or {}, f"{self.section_name}{key}.")


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises CheckpointError."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        why = error.strerror or error
        raise CheckpointError(f"{path}: {why}; is {path.parent} a model folder?") from None
    except (ValueError, RecursionError) as error:       # bytes that are no UTF-8, or no JSON
        raise CheckpointError(f"{path}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return values


def saved_config(part: type, settings: Settings, **choices: tuple):
    """A part's configuration, a dataclass, from its section of a config.json of ours.

    choices: settings that are no numbers, and their values. Raises CheckpointError for a setting
    that is unknown or has a wrong value.
    """
    kinds = {f.name: type(f.default) for f in fields(part)}
    for key in settings.values.keys() - kinds.keys():
        raise settings.error(key, "is not a known setting")
    for key, kind in kinds.items():
        value = settings.values.get(key)
        if key in choices:
            settings.only(key, *choices[key])
        elif key == "feature_layer":
            n = settings.number("n_layers")
            if value is not None and (type(value) is not int or value not in range(-n - 1, n + 1)):
                raise settings.error(key, f"is {value!r}, of an encoder with {n} layers")
        elif key == "image_mean" and type(value) in (int, float) and abs(value) < HUGE:
            continue                                            # a mean may be 0
        elif key == "max_tiles" and key not in settings.values:
            continue                                                    # an older folder
        else:
            number = settings.number(key, kind=kind)
            if key == "max_tiles" and number > MAX_TILES:
                raise settings.error(key, f"is {value}, more than {MAX_TILES}")
    return part(**settings.values)


def positive(kind: Callable[[str], float], most: float = math.inf) -> Callable[[str], float]:
    """The argparse type of a number, int or float, that is finite, above 0, and at most `most`."""
    def read(text: str) -> float:
        number = kind(text)
        if not 0 < number < math.inf:
            raise argparse.ArgumentTypeError(f"{text[:20]} is no finite number above 0")
        if number > most:
            raise argparse.ArgumentTypeError(f"{text[:20]} is more than {most:,}")
        return number

    read.__name__ = kind.__name__       # argparse names it where kind refuses the text
    return read


def whole(text: str) -> int:
    """The argparse type of a whole number from 0 on."""
    if not text.isdecimal() or len(text) > 9:
        raise argparse.ArgumentTypeError(f"{text[:20]!r} is no whole number from 0 on")
    return int(text)


def a_path(text: str) -> Path:
    """The argparse type of what is written: an empty one would be the folder one is in."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty: a variable that is not set?")
    return Path(text)


def tile_limit(text: str) -> int:
    """The argparse type of --max-tiles."""
    if not text.isdecimal() or not 1 <= int(text) <= MAX_TILES:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 to {MAX_TILES}")
    return int(text)
