"""Word to systemd: that the service is ready, and again and again that its event loop runs."""

import asyncio
import logging
import os
import socket
from collections.abc import Callable

ADDRESS = "NOTIFY_SOCKET"
WATCHDOG = "WATCHDOG_USEC"
STEP_S = 0.5

logger = logging.getLogger(__name__)


async def tell_supervisor(is_ready: Callable[[], bool], environment: dict[str, str] | None = None) -> None:
    """Tell it until cancelled; return at once where no supervisor asks to be told.

    Args:
        environment: in place of the process's own.

    Source: sd_notify(3) and sd_watchdog_enabled(3).
    """
    variables = os.environ if environment is None else environment
    address = variables.get(ADDRESS, "")
    if not address:
        return
    if address.startswith("@"):  # a name in the kernel, not a file
        address = "\0" + address[1:]
    step_s = min(STEP_S, int(variables.get(WATCHDOG, "10000000")) / 2e6)
    told = False
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.setblocking(False)
        heard = True
        while True:
            lines = ["WATCHDOG=1"]
            if is_ready() and not told:
                lines.append("READY=1")
                told = True
            try:
                channel.sendto("\n".join(lines).encode(), address)
                heard = True
            except OSError as error:  # it reads slowly, or is being started anew; the next word will do
                told = False
                if heard:
                    logger.warning("the supervisor at %s does not listen: %s", ADDRESS, error)
                heard = False
            await asyncio.sleep(step_s)
