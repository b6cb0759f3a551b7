"""The shipped model, and a page that it reads: for tests in which a trained model answers."""
from commands import ROOT

CHECKPOINT = ROOT / "reader" / "stage3"
PAGE = ROOT / "reader" / "printed" / "browser-1-receipt.png"
PROMPT = "what is the total?"
ANSWER = "18.25"
ASK = ["--image", PAGE, "--prompt", PROMPT]
