"A training as `torchrun` or one process runs it, for the tests: text, out, cache, then settings as JSON."

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

here = Path(__file__).resolve().parent
sys.path[:0] = [str(here.parent), str(here)]
torch.set_num_threads(1)

import test_training  # noqa: E402

from cola_tutorial.config import ScaleConfig  # noqa: E402
from cola_tutorial.training import Terminated, train  # noqa: E402

if __name__ == "__main__":
    text, out, cache = map(Path, sys.argv[1:4])
    asked = json.loads(sys.argv[4])
    run = test_training.run_config(text)
    stages = {name: replace(getattr(run, name), **asked.get("both", {}), **asked.get(name, {})) for name in ("stage1", "stage2")}
    # Dropout is the one thing that depends on how rows are divided.
    run = replace(run, **stages, changes=run.changes | {"dropout": 0.0} | asked.get("changes", {}), scale=ScaleConfig(**asked.get("scale", {})))
    sample = (lambda model: sys.stdin.read()) if asked.get("wait") else None
    try:
        train(run, out, tuple(asked.get("stages", ("stage1", "stage2"))), sample=sample, progress=False, cache_dir=cache, older=asked.get("older", False))
    except Terminated as error:
        print(error, file=sys.stderr)
        sys.exit(143)
