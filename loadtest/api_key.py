"""The key that services ask for, where they do: from the environment, as `serve` reads its own."""

import os
from collections.abc import Mapping

VARIABLE = "LEANREC_API_KEY"


def authorization() -> Mapping[str, str]:
    """Return the header that bears the key, the first of several; empty where none is set."""
    keys = os.environ.get(VARIABLE, "").split()
    return {"Authorization": f"Bearer {keys[0]}"} if keys else {}
