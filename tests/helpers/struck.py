"""train.py itself, whose rank 1 strikes itself with a signal, once: started by test_survival.py.

    torchrun --nproc_per_node 2 tests/helpers/struck.py KILL|STOP STEP FILE [train.py's flags]

It comes within that step, before the gradients. FILE is made just before and holds the process's
id; where it is already there, nothing happens: a restarted rank is left alone.
"""
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train

strike = signal.Signals["SIG" + sys.argv.pop(1)]
last = int(sys.argv.pop(1))
file = Path(sys.argv.pop(1))
accumulate = train.accumulate_gradients
step = -1


def accumulate_or_fall(*inputs):
    global step
    step += 1
    if os.environ["RANK"] == "1" and step == last and not file.exists():
        file.write_text(str(os.getpid()))
        os.kill(os.getpid(), strike)
    return accumulate(*inputs)


train.accumulate_gradients = accumulate_or_fall
train.main()
