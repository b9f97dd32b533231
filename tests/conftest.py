"""Child processes of the code under test import what tests hand them, wherever they start."""

import os
from pathlib import Path

os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
