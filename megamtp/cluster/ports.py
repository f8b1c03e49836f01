"""Reserves ports of this host until rank 0 listens on them."""

import socket

_reservations: list[socket.socket] = []


def reserve_port() -> int:
    """Returns a port for the rendezvous of one job's ranks, reserved for the lifetime of this process.

    A socket that is bound to the port but does not listen reserves it. The system then assigns the port to no process
    that asks for any free port. A socket that asks for this port number with SO_REUSEADDR, as torch's stores do, may
    listen on it.
    """
    ipv6 = socket.has_dualstack_ipv6()
    reservation = socket.socket(socket.AF_INET6 if ipv6 else socket.AF_INET)
    reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if ipv6:
        reservation.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    reservation.bind(("", 0))
    _reservations.append(reservation)
    return reservation.getsockname()[1]
