"""Two hosts on one machine: a network, a host name and folders of their own each, and a cable that can be pulled.

A host is a network namespace of Linux; its processes run in a mount and a UTS namespace besides. That takes root and
``ip`` (iproute2).
"""

import os
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

ENTER = """
hostname "$1"; mount --bind "$2/hosts" /etc/hosts; mount --bind "$2/local-$1" "$2/local"; shift 2
exec "$@"
"""
INTERFACE = "fab0"
"""Of the same name on both, for a launcher may hand on GLOO_SOCKET_IFNAME."""


def can_have_hosts() -> str:
    """Say what is missing for two hosts; empty where nothing is."""
    if os.geteuid():
        return "needs root, for network namespaces"
    missing = [name for name in ("ip", "nsenter", "unshare") if not shutil.which(name)]
    return f"needs {', '.join(missing)} (apt-get install iproute2 util-linux)" if missing else ""


class Hosts:
    """``hosta`` and ``hostb``, which see each other as 10.77.0.1 and 10.77.0.2.

    Attributes:
        folder: what both share; ``folder / "local"`` is another folder on each.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._spaces = {"hosta": f"a{os.getpid()}", "hostb": f"b{os.getpid()}"}

    def __enter__(self) -> "Hosts":
        (self.folder / "hosts").write_text("127.0.0.1 localhost\n10.77.0.1 hosta\n10.77.0.2 hostb\n")
        for name in ("local", *(f"local-{host}" for host in self._spaces)):
            (self.folder / name).mkdir()
        a, b = self._spaces.values()
        ends = f"v{os.getpid()}a", f"v{os.getpid()}b"
        ip("netns", "add", a)
        ip("netns", "add", b)
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for number, (space, end) in enumerate(zip((a, b), ends, strict=True), start=1):
            ip("link", "set", end, "netns", space, "name", INTERFACE)
            ip("-n", space, "addr", "add", f"10.77.0.{number}/24", "dev", INTERFACE)
            for each in ("lo", INTERFACE):
                ip("-n", space, "link", "set", each, "up")
        return self

    def __exit__(self, *error) -> None:
        for space in self._spaces.values():
            with suppress(subprocess.CalledProcessError):
                ip("netns", "del", space)

    def enter(self, host: str) -> tuple[str, ...]:
        """Give the words to put before a command so that it runs on a host."""
        return (
            "nsenter", f"--net=/run/netns/{self._spaces[host]}", "unshare", "--uts", "--mount", "bash", "-c", ENTER,
            "-", host, str(self.folder), "env", f"GLOO_SOCKET_IFNAME={INTERFACE}", f"TP_SOCKET_IFNAME={INTERFACE}",
        )  # fmt: skip

    def pull_the_cable(self, pulled: bool = True) -> None:
        """Cut the connection of the hosts, or mend it."""
        ip("-n", self._spaces["hosta"], "link", "set", INTERFACE, "down" if pulled else "up")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
