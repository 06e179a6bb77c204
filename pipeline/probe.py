"""Would this image kill its decoder? Asked in a process of its own, which may die of the answer.

`python -m pipeline.probe` decodes the image on its standard input, whole and at its smallest scale
(two ways through libjpeg), and ends. A worker that takes the place of a dead one asks so about
every sample that was in the dead one's hands (pipeline.worker); what kills or hangs the probe, too,
is a bad sample. Whether it decodes to anything is not asked: an orderly refusal harms nobody.
"""

import os
import subprocess
import sys

from pipeline.decode import decode_rgbx, guard_header
from pipeline.errors import SampleError

DIED, HUNG = "decoder died", "decoder hung"
READY = b"+"


def probe(data: bytes, *, max_pixels: int, limit_s: float) -> str | None:
    """Decode an image in a child process. Returns why not to decode it here, or None."""
    return run_probe([sys.executable, "-P", "-m", __name__, str(max_pixels)], data, limit_s)


def run_probe(command: list[str], data: bytes, limit_s: float) -> str | None:
    """What a command shows of `data` by how it ends: DIED or HUNG and how, or None.

    The command writes a byte when it is ready to read: the limit is for what follows.
    """
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as child:
        assert child.stdout is not None
        child.stdout.read(1)
        try:
            child.communicate(data, limit_s)
        except subprocess.TimeoutExpired:
            child.kill()
            return f"{HUNG}: no end within {limit_s:g} s"
    if child.returncode < 0:
        return f"{DIED}: signal {-child.returncode}"
    return f"{DIED}: exit code {child.returncode}" if child.returncode else None


def main() -> None:
    """Decode standard input; `sys.argv[1]` is the cap of pixels."""
    os.write(sys.stdout.fileno(), READY)
    data = sys.stdin.buffer.read()
    try:
        header = guard_header(data, max_pixels=int(sys.argv[1]))
        decode_rgbx(data, header)
        decode_rgbx(data, header, min_width_px=1, min_height_px=1)
    except SampleError:
        pass


if __name__ == "__main__":
    main()
