"""Run the lessons as a reader would: each from top to bottom, in a process of its own, with its time.

python tests/walkthrough.py [06_flow 07_dit ...]
"""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbconvert.filters import strip_ansi

ROOT = Path(__file__).resolve().parent.parent
NBS, DATA = ROOT / "nbs", ROOT / "data"
HOUR = 3600.0
LAST_WORDS = 2000


@dataclass(frozen=True)
class Walk:
    "How one notebook went."

    name: str  # file name without its ending
    seconds: float  # wall time, the start of its kernel included
    error: str  # what stopped it; empty if it ran to its end

    def __str__(self) -> str:
        return f"{self.name:<16} {self.seconds:7.1f} s{'  FAILED' if self.error else ''}"


def lesson_names() -> list[str]:
    "Names of all notebooks in reading order, the index last."
    return sorted((path.stem for path in NBS.glob("*.ipynb")), key=lambda name: (name == "index", name))


def environment(
    cache: Path,  # folder for packed corpora
    in_test: bool,  # shrink the steps, as the tests do?
) -> dict[str, str]:  # a notebook process's environment
    "This process's environment, made the same for every machine: nothing from a hub, no cache of earlier runs."
    ours = {name: value for name, value in os.environ.items() if name not in ("IN_TEST", "MPLBACKEND")}
    ours |= {"HF_DATASETS_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    ours["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    # Two notebooks run side by side under test: one thread each keeps them out of each other's way.
    return ours | {"IN_TEST": "1", "OMP_NUM_THREADS": "1"} if in_test else ours


def walk(
    name: str,  # notebook's file name without its ending
    cache: Path,  # folder for packed corpora, shared by the notebooks of one walk
    in_test: bool = False,  # shrink the steps, as the tests do?
    limit: float = HOUR,  # seconds for the whole notebook
) -> Walk:
    "Run one notebook in a copy of nbs/ beside one of data/: what it writes reaches neither the clone nor the next one."
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryFile("w+", errors="replace") as stderr:
        folder = Path(scratch) / "nbs"
        shutil.copytree(NBS, folder, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
        shutil.copytree(DATA, Path(scratch) / "data")
        client = NotebookClient(
            nbformat.read(folder / f"{name}.ipynb", as_version=4),
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
            # A cell may take what its notebook has left.
            timeout_func=lambda cell: max(1.0, began + limit - time.monotonic()),
        )
        error = ""
        try:
            client.execute(env=environment(cache, in_test), stderr=stderr)
        except CellTimeoutError:
            error = f"{name} did not end within {limit:.0f} s"
        except CellExecutionError as failure:
            error = strip_ansi(str(failure))
        except DeadKernelError:
            stderr.seek(0)
            error = f"the process of {name} died; the last it said:\n{stderr.read()[-LAST_WORDS:]}"
    return Walk(name, time.monotonic() - began, error)


def main(
    names: Iterable[str] = (),  # notebooks to run; all if empty
) -> int:  # exit status: 1 if any notebook failed
    "Run notebooks one after another with a reader's settings; print a line for each, and the total."
    walks = []
    with tempfile.TemporaryDirectory() as cache:
        for name in [Path(name).stem for name in names] or lesson_names():
            walks.append(walk(name, Path(cache)))
            print(walks[-1], walks[-1].error, sep="\n" if walks[-1].error else "", flush=True)
    failed = [walk.name for walk in walks if walk.error]
    print(f"{len(walks)} notebooks {sum(walk.seconds for walk in walks):11.1f} s")
    if failed: print("failed:", *failed)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
