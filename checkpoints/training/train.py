"""Trains a checkpoint of this folder on our own modules and writes it in the published form. Resumable.

    python checkpoints/training/train.py tiny [--minutes M] [--threads N]
    python checkpoints/training/train.py text | wide | untied | heads
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
import recipes  # noqa: E402
import small  # noqa: E402
import tiny  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=["tiny", *recipes.RECIPES])
    parser.add_argument("--minutes", type=float, default=480, help="stop after this long; run again to go on")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    trainer = tiny.Trainer() if options.name == "tiny" else small.Trainer(options.name)
    trainer.train(options.minutes)


if __name__ == "__main__":
    main()
