"""Ranks of one machine meet on its loopback interface alone.

``torchrun --standalone`` opens its store on every interface, without a password, and unpickles what lies in it at
every heartbeat: a neighbour on the network could run code in a run of one machine. Here the store listens on 127.0.0.1,
and so do the connections that ranks make among themselves.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import MutableMapping
from typing import Any

ADDRESS = "127.0.0.1"
BACKEND = "interloom-loopback"
AGENT = "INTERLOOM_AGENT"  # process id of the agent, in the environment of its ranks
_WAIT_SECONDS = 600
# After the agent is gone: a rank saves and stops as on SIGTERM, but is not waited for longer than this.
_FAREWELL_SECONDS = 20


def listen_on_loopback(environment: MutableMapping[str, str]) -> None:
    """Make gloo and NCCL of the processes that inherit ``environment`` use the loopback interface."""
    interfaces = {name for _, name in socket.if_nameindex()}
    name = next((name for name in ("lo", "lo0") if name in interfaces), None)
    if name is not None:
        environment.setdefault("GLOO_SOCKET_IFNAME", name)
        environment.setdefault("NCCL_SOCKET_IFNAME", name)


def register_rendezvous() -> None:
    """Let torchrun's agent know :data:`BACKEND`, a store for one agent and its ranks on loopback."""
    from torch.distributed import PrefixStore, TCPStore
    from torch.distributed.elastic.rendezvous import (
        RendezvousInfo,
        RendezvousStoreInfo,
        rendezvous_handler_registry,
    )
    from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

    class Loopback(StaticTCPRendezvous):
        """Rendezvous of a single agent, which listens on a socket that was bound here."""

        def get_backend(self) -> str:
            return BACKEND

        def next_rendezvous(self) -> RendezvousInfo:
            if self._store is None:
                listener = socket.create_server((ADDRESS, 0))
                self.master_port = listener.getsockname()[1]
                # The store closes the descriptor.
                self._store = TCPStore(
                    ADDRESS,
                    self.master_port,
                    is_master=True,
                    timeout=self.timeout,
                    wait_for_workers=False,
                    master_listen_fd=listener.detach(),
                )
            place = RendezvousStoreInfo(ADDRESS, self.master_port)
            return RendezvousInfo(PrefixStore(self.run_id, self._store), 0, 1, place)

    def create(parameters: Any) -> Loopback:
        return Loopback(ADDRESS, 0, 0, 1, parameters.run_id, _WAIT_SECONDS)

    rendezvous_handler_registry.register(BACKEND, create)


def end_with_agent() -> None:
    """End this rank when its agent is gone, however that ended: as SIGTERM asks for, and soon.

    For ranks of torchrun and of :mod:`.launch`; elsewhere nothing is done.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or "LOCAL_RANK" not in os.environ:
        return
    agent = int(os.environ.get(AGENT) or os.getppid())
    name = f"follow-{agent}"
    if any(thread.name == name for thread in threading.enumerate()):
        return
    if os.getppid() != agent and _is_alive(agent):  # a rank's own child, which ends with the rank
        return
    threading.Thread(target=_follow, args=(agent, os.getpid()), name=name, daemon=True).start()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _follow(agent: int, own: int) -> None:
    while os.getppid() == agent:
        time.sleep(0.5)
    os.kill(own, signal.SIGTERM)
    time.sleep(_FAREWELL_SECONDS)
    os.kill(own, signal.SIGKILL)
