"""Which machines a download may talk to: public ones alone, judged by the address that the socket connects to.

Names are no ground to judge on: ``127.1``, ``１２７.０.０.１`` and a name whose record says 10.0.0.1 all end at a
machine on the inside, and what turns a host into an address (Python, aiohttp, the resolver) differs from release to
release. So :class:`Guard` looks at the address a connection is about to be made to, whoever found it, and at a closed
list of networks that does not change with the interpreter.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any

# IANA's special-purpose registries, and what stands for machines nearby or for nobody.
_NOT_PUBLIC_4 = [
    ip_network(network)
    for network in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/3",
    )
]
# Of IPv6 only this is given out; within it, protocol assignments (Teredo, ORCHID), examples and the old test network.
_GIVEN_OUT_6 = ip_network("2000::/3")
_NOT_PUBLIC_6 = [ip_network(network) for network in ("2001::/23", "2001:db8::/32", "3ffe::/16", "3fff::/20")]
_MAPPED, _NAT64, _6TO4 = ip_network("::ffff:0:0/96"), ip_network("64:ff9b::/96"), ip_network("2002::/16")


def is_public(address: str) -> bool:
    """Whether an IP address belongs to a machine of the public internet.

    Addresses that carry an IPv4 address (mapped, NAT64, 6to4) are as public as that one.

    Raises:
        ValueError: ``address`` is not an IP address.
    """
    ip = ip_address(address.split("%")[0])
    if isinstance(ip, IPv6Address):
        if ip in _MAPPED or ip in _NAT64:
            ip = IPv4Address(int(ip) & 0xFFFFFFFF)
        elif ip in _6TO4:
            ip = IPv4Address(int(ip) >> 80 & 0xFFFFFFFF)
        else:
            return ip in _GIVEN_OUT_6 and not any(ip in network for network in _NOT_PUBLIC_6)
    return not any(ip in network for network in _NOT_PUBLIC_4)


class PrivateAddress(OSError):
    """A connection that would reach a machine on the inside."""


class Guard:
    """What aiohttp resolves names and makes sockets with: neither leads to an address that is not public.

    Args:
        allowed: whether a (host, port) may be anywhere all the same.
    """

    def __init__(self, allowed: Callable[[str, int], bool]) -> None:
        self._allowed = allowed
        self._exempt: set[tuple[str, int]] = set()  # addresses of hosts that may be anywhere

    def exempt(self, host: str, port: int) -> bool:
        """Whether ``host`` may be anywhere; if it is an address itself, sockets to it are then made."""
        if not self._allowed(host, port):
            return False
        self._exempt.add((host, port))
        return True

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[Any]:
        """The addresses of a name, if all of them are public.

        Raises:
            PrivateAddress: one is not.
        """
        found = await asyncio.get_running_loop().getaddrinfo(
            host, port, type=socket.SOCK_STREAM, family=family, flags=socket.AI_ADDRCONFIG
        )
        addresses = [(str(entry[4][0]), entry[4][1], entry[0], entry[2]) for entry in found]
        if self._allowed(host, port):
            self._exempt.update((address, port) for address, *_ in addresses)
        elif not all(is_public(address) for address, *_ in addresses):
            raise PrivateAddress("private address")
        return [
            {
                "hostname": host,
                "host": address,
                "port": number,
                "family": kind,
                "proto": protocol,
                "flags": socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            }
            for address, number, kind, protocol in addresses
        ]

    def socket(self, info: Any) -> socket.socket:
        """A socket for ``info`` = (family, type, protocol, name, address), about to be connected to that address.

        Raises:
            PrivateAddress: the address is not public.
        """
        family, kind, protocol, _, (address, port, *_) = info
        if (address, port) not in self._exempt and not is_public(address):
            raise PrivateAddress("private address")
        return socket.socket(family, kind, protocol)

    async def close(self) -> None:
        """Nothing is held open."""
