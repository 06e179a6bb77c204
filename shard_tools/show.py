"""Numbers and counts as people read them."""

from collections.abc import Mapping


def size(size_bytes: float) -> str:
    """Bytes in decimal units: 950 B, 1.2 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.1f} TB"


def plural(number: int, noun: str) -> str:
    """1 shard, 2 shards."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def listed(counts: Mapping[str, int]) -> str:
    """Names and counts, the most frequent first: a 3, b 1."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{name} {number}" for name, number in ordered)
