"""Where a program listens: `HOST[:PORT]` or a URL on the command line."""

import socket
from argparse import ArgumentTypeError
from dataclasses import dataclass
from ipaddress import ip_address

MASTER_PORT = 5557
"""Locust's own default for masters and workers."""


@dataclass(frozen=True)
class Address:
    """A host and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    def resolved(self) -> "Address":
        """Return the address with the host as numbers, which is what sockets of ZeroMQ bind to.

        Raises:
            OSError: no such host.
        """
        found = socket.getaddrinfo(self.host, self.port, socket.AF_INET, socket.SOCK_STREAM)
        return Address(str(found[0][4][0]), self.port)

    def check_free(self) -> None:
        """Raise if nothing can listen there.

        Raises:
            OSError
        """
        with socket.socket() as listener:
            # As servers do: what a connection of the last run left behind is no obstacle.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((self.host, self.port))


def parse_address(text: str) -> Address:
    """Return `HOST[:PORT]` of the command line; the port is the one that Locust uses if none is given."""
    host, colon, port = text.partition(":")
    if not host or (colon and not port.isdecimal()):
        raise ArgumentTypeError(f"{text!r} is not a host and a port like 10.0.0.5:{MASTER_PORT}")
    return Address(host, parse_port(port) if colon else MASTER_PORT)


def parse_port(text: str) -> int:
    """Return a port of the command line."""
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise ArgumentTypeError(f"{text!r} is not a port from 1 to 65535")
    return int(text)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host by that name."""
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def is_url(target: str) -> bool:
    """Whether a target names a running service and not a directory."""
    return target.startswith(("http://", "https://"))
