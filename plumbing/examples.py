"""What every reader of data yields: examples, which know nothing of tokens or models."""
from dataclasses import dataclass

from PIL import Image

# In a turn's parts: the place of the example's next image. In a sequence of tokens (model.py): the place of a visual
# token; no vocabulary has this id.
IMAGE = -1


@dataclass
class Turn:
    """One message: its parts in order, each a string or IMAGE, the place of the sample's next image."""
    role: str
    parts: list


@dataclass
class Example:
    """What every reader of a data set yields: images, turns that refer to them, and a name."""
    images: list[Image.Image]
    turns: list[Turn]
    key: str


class BadSample(Exception):
    """An example that nothing can be learnt from: its kind (plumbing/streams.py, BAD_KINDS), and what is wrong."""
