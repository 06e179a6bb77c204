"""How many images a second a machine would prepare, from what one image costs.

Pure arithmetic for pipeline.profile: cores divided by CPU seconds an image, bandwidth divided by
bytes an image, and what the devices take; the least of the three is what comes out. Cores count as
those of the machine that was measured, and as many of them as are used at once.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

Bound = Literal["network", "decode", "device"]

ASSUMED_IMAGES_PER_S = 2500.0
"""What SwAV takes of ResNet-50 with 2x224 + 6x96 crops on an H200: an estimate from its limits."""

CORES = (8, 16, 32, 64, 128)
GIGABYTES_PER_S = (1.0, 2.5, 5.0, 10.0)
_LETTERS: dict[Bound, str] = {"network": "n", "decode": "d", "device": "g"}


class Costs(NamedTuple):
    """Of one image: CPU seconds of everything a loader does, and bytes read."""

    cpu_s: float
    read_bytes: float


class Rate(NamedTuple):
    """Images a second, and which part allows no more."""

    images_per_s: float
    bound: Bound


def slowest(*, network: float, decode: float, device: float = math.inf) -> Rate:
    """The least of the rates of three parts, in images a second."""
    rates: dict[Bound, float] = {"network": network, "decode": decode, "device": device}
    bound = min(rates, key=lambda part: rates[part])
    return Rate(rates[bound], bound)


def forecast(costs: Costs, *, cores: float, bytes_per_s: float, device: float = math.inf) -> Rate:
    """What a machine would do."""
    network, decode = bytes_per_s / costs.read_bytes, cores / costs.cpu_s
    return slowest(network=network, decode=decode, device=device)


def cores_needed(costs: Costs, images_per_s: float) -> float:
    """Cores that are busy throughout at this rate."""
    return costs.cpu_s * images_per_s


def forecast_table(
    costs: Costs,
    *,
    device: float = math.inf,
    cores: Sequence[int] = CORES,
    gigabytes_per_s: Sequence[float] = GIGABYTES_PER_S,
) -> list[str]:
    """Lines of text: a row for each number of cores, a column for each bandwidth."""
    head = "".join(f"{f'{each:g} GB/s':>13}" for each in gigabytes_per_s)
    lines = [f"{'cores':>7}{head}"]
    for number in cores:
        rates = [
            forecast(costs, cores=number, bytes_per_s=each * 1e9, device=device)
            for each in gigabytes_per_s
        ]
        cells = "".join(f"{rate.images_per_s:>11,.0f} {_LETTERS[rate.bound]}" for rate in rates)
        lines.append(f"{number:>7}{cells}")
    letters = [f"{letter} {part}" for part, letter in _LETTERS.items()]
    shown = letters if math.isfinite(device) else letters[:2]
    return [*lines, f"bound by {', '.join(shown)}; cores like those of this machine"]
