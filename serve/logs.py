"""The service's log on stderr: lines for people, or one JSON object a line for machines.

A record may carry `fields`, a dictionary; what a history holds is among them only where it was asked for.
"""

import json
import logging
import os
import sys
import time
import traceback
from typing import Any, Literal

LogFormat = Literal["text", "json"]


def start_logging(process: str = "", style: LogFormat = "text") -> None:
    """Log to stderr; `process` is told in every line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(process.strip()) if style == "json" else TextLines(process))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if style == "json":
        logging.captureWarnings(True)
        os.environ.setdefault(
            "VLLM_CONFIGURE_LOGGING", "0"
        )  # its records come here too, in place of its own lines


class TextLines(logging.Formatter):
    """One record a line; fields follow the message."""

    def __init__(self, process: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)s {process}%(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line = super().formatMessage(record)
        fields: dict[str, Any] | None = getattr(record, "fields", None)
        if not fields:
            return line
        # As JSON where it may hold what breaks a line.
        told = (f"{n}={v if isinstance(v, int | float) else _plain(v)}" for n, v in fields.items())
        return f"{line} {' '.join(told)}"


class JsonLines(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, the fields, and a failure's traceback."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = {"process": process} if process else {}

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        second = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        told: dict[str, Any] = {
            "time": f"{second}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            **self._process,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            told["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(told, default=str)


def _plain(value: object) -> str:
    if isinstance(value, str) and value.isprintable() and " " not in value:
        return value
    return json.dumps(value, default=str)
