"""Free ports of this host, which stay free until rank 0 listens there."""

import socket

_held: list[socket.socket] = []


def reserve_port() -> int:
    """A port for the ranks of one job to meet at, reserved as long as this process lives.

    A socket that is bound to it and does not listen holds it. The system then gives the port to no process that asks
    for any free one. A socket that asks for it by number, with SO_REUSEADDR as torch's stores do, may listen there.
    """
    ipv6 = socket.has_dualstack_ipv6()
    holder = socket.socket(socket.AF_INET6 if ipv6 else socket.AF_INET)
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if ipv6:
        holder.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    holder.bind(("", 0))
    _held.append(holder)
    return holder.getsockname()[1]
