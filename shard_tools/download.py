"""How images are downloaded: what the command line sets, and shard_tools.downloader does.

A file of its own, for the HTTP client takes longer to import than many a worker works.
"""

from dataclasses import dataclass, replace
from importlib.metadata import version

from pipeline.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class DownloadSettings:
    """How images are asked for. `per_host` and `delay_s` are a whole job's, the rest a worker's.

    Raises UsageError for values that cannot be meant.
    """

    # Say who asks, and where one may complain: many sites refuse or ban who does not.
    user_agent: str = f"cropstream/{version('cropstream')} (image data set; no contact given)"
    timeout_s: float = 30.0  # for a request from its start to its body's end; a redirect is another
    connect_timeout_s: float = 10.0  # for looking up and connecting
    retries: int = 2
    per_host: int = 8  # connections
    concurrency: int = 128
    delay_s: float = 0.0  # between the starts of two requests to a host
    allow_private: bool = False  # addresses that are not on the public internet
    max_redirects: int = 5

    def __post_init__(self) -> None:
        if not self.user_agent.isascii() or not self.user_agent.isprintable():
            raise UsageError(f"user_agent: {self.user_agent!a} is not one line of plain ASCII")
        for name in ("timeout_s", "connect_timeout_s"):
            if not 0 < getattr(self, name) < 86400:
                raise UsageError(f"{name}: {getattr(self, name)} is not above 0 and below a day")
        if not 0 <= self.delay_s <= 3600:
            raise UsageError(f"delay_s: {self.delay_s} is not between 0 and 3600")
        least = {"retries": 0, "max_redirects": 0, "per_host": 1, "concurrency": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise UsageError(f"{name}: {getattr(self, name)} is less than {value}")

    def shared_by(self, workers: int) -> "DownloadSettings":
        """One worker's part, so that a host sees as much of all of them as was allowed.

        Each needs one connection; several jobs, on several machines, know nothing of each other.
        """
        delay_s = min(self.delay_s * workers, 3600)
        return replace(self, per_host=max(1, self.per_host // workers), delay_s=delay_s)
