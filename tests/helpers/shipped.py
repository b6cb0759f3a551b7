"""The shipped model, and a page that it reads: for tests in which a trained model answers."""
from commands import ROOT

CHECKPOINT = ROOT / "reader" / "stage3"
PAGE = ROOT / "reader" / "printed" / "office-1-letter.png"
PROMPT = "who signed it?"
ANSWER = "Carla Nunez"
ASK = ["--image", PAGE, "--prompt", PROMPT]
