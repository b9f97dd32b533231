"""The other replicas of a service, as one of them sees them: their metrics are told with its own."""

import asyncio
import logging
import socket
from collections.abc import Iterable, Mapping, Sequence

from prometheus_client import Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

REPLY_LIMIT_S = 5.0
"""Half of what Prometheus waits; a replica that takes longer is left out of the answer."""

logger = logging.getLogger(__name__)


class Siblings:
    """Asks the other replicas, over a socket that each of them listens on."""

    def __init__(self, index: int, addresses: Sequence[bytes]) -> None:
        """Args:
        index: Of this replica among all.
        addresses: Of all replicas' sockets, in the abstract namespace.
        """
        self.index = index
        self.addresses = addresses

    async def metrics(self, own: bytes) -> bytes:
        """Return the metrics of all replicas that answer, told apart by the label `replica`."""
        others = [index for index in range(len(self.addresses)) if index != self.index]
        read = [asyncio.to_thread(_read_all, self.addresses[index]) for index in others]
        answers = await asyncio.gather(*read, return_exceptions=True)
        texts = {self.index: own}
        for index, answer in zip(others, answers, strict=True):
            if isinstance(answer, bytes):
                texts[index] = answer
            else:
                logger.warning("replica %d did not tell its metrics: %s", index, answer)
        return merge(dict(sorted(texts.items())))


def merge(texts: Mapping[int, bytes]) -> bytes:
    """Return several processes' metrics as one text, each sample with its process in the label `replica`."""
    merged: dict[str, Metric] = {}
    for index, text in texts.items():
        for family in text_string_to_metric_families(text.decode()):
            samples = [s._replace(labels={"replica": str(index), **s.labels}) for s in family.samples]
            family.samples = []
            merged.setdefault(family.name, family).samples.extend(samples)
    return generate_latest(_Collected(merged.values()))


class _Collected(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _read_all(address: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(REPLY_LIMIT_S)
        connection.connect(address)
        text = bytearray()
        while chunk := connection.recv(2**16):
            text += chunk
        return bytes(text)
