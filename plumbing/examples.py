"""What every reader of data yields: examples, which know nothing of tokens or models."""
from dataclasses import dataclass

from PIL import Image

# In a turn's parts: the place of the example's next image. In a sequence of tokens (model.py): the
# place of a visual token; no vocabulary has this id.
IMAGE = -1


@dataclass
class Turn:
    """One message of a chat."""
    role: str                       # "user", "assistant" or "system"
    parts: list[str | int]          # in their order: texts, and IMAGE for the example's next image
    is_learnt: bool = True          # of an answer: whether it is supervised, or only read


@dataclass
class Example:
    """Images, the turns that refer to them, and a name."""
    images: list[Image.Image]
    turns: list[Turn]
    key: str


class BadSample(Exception):
    """An example from which nothing can be learnt: its kind (plumbing/streams.py, BAD_KINDS), and
    what is wrong."""
