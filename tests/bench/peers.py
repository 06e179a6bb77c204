"""Programs to compare with, each in an environment of its own under build/peers.

Their pins collide with ours and with each other's. What an environment holds stands in
peers/NAME.txt; it is made on first use, and anew when that file has changed.
"""

import filecmp
import shutil
import subprocess
import sys
from pathlib import Path

ENVIRONMENTS = Path("build/peers")
REQUIREMENTS = Path(__file__).with_name("peers")
INSTALL_LIMIT_S = 600


class PeerError(Exception):
    """A peer cannot be installed; the message says why."""


def peer_python(name: str) -> Path:
    """The interpreter that has a peer. Raises PeerError."""
    folder = ENVIRONMENTS / name
    python, wanted, installed = folder / "bin/python", _requirements(name), folder / "installed.txt"
    if installed.exists() and filecmp.cmp(wanted, installed, shallow=False):
        return python.absolute()
    print(f"installing {name} into {folder}", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    _run(sys.executable, "-m", "venv", str(folder))
    _run(str(python), "-m", "pip", "install", "--quiet", "--no-deps", "-r", str(wanted))
    shutil.copy(wanted, installed)
    return python.absolute()


def peer_version(name: str, package: str = "") -> str:
    """The version of a peer that is asked for; `package` if that is not called like the peer."""
    pin = f"{package or name}=="
    lines = _requirements(name).read_text().splitlines()
    return next(line.removeprefix(pin) for line in lines if line.startswith(pin))


def _requirements(name: str) -> Path:
    return REQUIREMENTS / f"{name}.txt"


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=INSTALL_LIMIT_S)
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no message"])[-1]
        raise PeerError(f"{' '.join(command[1:4])}: {last}") from None
    except subprocess.TimeoutExpired:
        raise PeerError(f"{' '.join(command[1:4])}: took over {INSTALL_LIMIT_S} s") from None
