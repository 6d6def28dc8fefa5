"""What keeps a run alive: flags, processes, checkpoints, logs. Not here: what is trained (the chapters at the root)."""

from pathlib import Path

ROOT = Path(__file__).parent.parent  # of the project
