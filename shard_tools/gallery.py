"""A page to look at a snapshot: samples, sizes, origins, rejects, duplicates, shards.

One self-contained HTML file without a script, written next to the data. The same snapshot and seed
give the same bytes, so its name carries its hash and writing it again changes nothing. Whatever
comes from data passes through shard_tools.page, which makes it harmless.
"""

import base64
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import DataError, ManifestError, ObjectMissingError, UsageError
from pipeline.manifest import Snapshot, read_snapshot
from pipeline.store import Store, open_store
from shard_tools import page
from shard_tools.chart import Label, histogram_chart, powers_of_ten, powers_of_two
from shard_tools.cluster_table import Cluster, Member, read_clusters
from shard_tools.indexes import ShardRows, read_indexes
from shard_tools.origins import is_tar_member
from shard_tools.page import Html
from shard_tools.show import size
from shard_tools.stats import Collector, SourceCounts, Stats
from shard_tools.tally import Histogram
from shard_tools.thumbnails import COLUMNS, Pick, Thumbnail, thumbnails

NUM_CLUSTERS = 20
NUM_SHARDS = 100
NUM_VERSIONS = 20
_EXAMPLES = 3  # of the sources of one reject reason
_MAX_REASONS = 100
_SHOWN_ROWS = 12  # of a table that goes on behind a click
_MAX_LABELS = 200
_CLUSTERS_IN_NOTE = re.compile(r"\bclusters\b.*?\b(dedup/\w+/clusters\.parquet)")
_MEDIAN = 3  # its place among the quantiles
_ASPECTS = (1 / 8, 1 / 4, 1 / 2, 1 / 1.5, 1.0, 1.5, 2.0, 4.0, 8.0)

Numbers = npt.NDArray[np.int64]
Tick = Callable[[int, int], None]
_Place = tuple[int, int]  # shard, row of its index

_FOOTER = Html(
    "<footer>Pictures are decoded as training decodes them, EXIF orientation unapplied. This page "
    "loads nothing and runs nothing; only its links lead elsewhere.</footer>"
)


def write_gallery(
    dataset: Store,
    snapshot: Snapshot,
    *,
    output: str | None = None,
    samples: int = 200,
    seed: int = 0,
    on_tick: Tick | None = None,
) -> str:
    """Write the page of a snapshot and return its URL.

    Args:
        output: a path or URL for the page, by default galleries/ of the data set. samples: images
        to show, drawn by `seed` from the kept rows, each as likely. on_tick: called after every
        shard with the rows and rejects read so far, of `snapshot.rows.sum()`.

    Raises ShardError if an index is damaged, StoreError. A sample that cannot be shown is no error.
    """
    body = render_gallery(dataset, snapshot, samples=samples, seed=seed, on_tick=on_tick).encode()
    if output is None:
        digest = hashlib.sha256(body).hexdigest()[:16]
        store, key = dataset, f"galleries/v{snapshot.version:06d}-{digest}.html"
    else:
        target = output if "://" in output else str(Path(output).absolute())
        folder, _, key = target.rpartition("/")
        if "://" not in folder and not Path(folder or "/").is_dir():
            raise UsageError(f"there is no folder {folder} for the page: create it first")
        store = open_store(f"{folder}/")
    with store.writer(key, content_type="text/html; charset=utf-8") as writer:
        writer.write(body)
    return store.url_of(key)


def render_gallery(
    dataset: Store, snapshot: Snapshot, *, samples: int, seed: int, on_tick: Tick | None = None
) -> str:
    """The page as text. Raises as `write_gallery` does."""
    clusters = _find_clusters(dataset, snapshot, seed)
    seen = _Seen(snapshot, _draw(snapshot.num_kept, samples, seed), clusters.places())
    for rows in read_indexes(dataset, snapshot):
        seen.add(rows)
        if on_tick is not None:
            on_tick(seen.collector.num_rows, seen.collector.num_rejected)
    shown = list(thumbnails(dataset, snapshot, seen.picks))
    members = thumbnails(dataset, snapshot, list(seen.members.values()))
    pictures = dict(zip(seen.members, members, strict=True))
    stats = seen.collector.stats()
    sections = {
        "samples": _samples(shown, snapshot.num_kept),
        "sizes": _charts(stats),
        "formats": page.pair([_formats(stats), _labels(stats)]),
        "sources": _origins(stats),
        "rejected": _rejects(stats, seen.examples),
        "duplicates": clusters.section(pictures),
        "versions": _lineage(dataset, snapshot),
        "shards": _shards(snapshot),
    }
    parts = [page.named(name, section) for name, section in sections.items() if section]
    links = page.navigation([name for name, section in sections.items() if section])
    title = f"{dataset.url} version {snapshot.version}"
    head = [_head(dataset, snapshot), links, _figures(stats)]
    return page.page(title, page.join([*head, *parts, _FOOTER]))


# Reading


class _Seen:
    """What one pass over the indexes brings: figures, the rows to show, examples of rejects."""

    def __init__(self, snapshot: Snapshot, drawn: Numbers, places: Sequence[_Place]) -> None:
        self.collector = Collector(snapshot)
        self.picks: list[Pick] = []
        self.members: dict[_Place, Pick] = {}
        self.examples: dict[str, list[str]] = {}
        self._drawn = drawn
        self._first_row = snapshot.first_row
        self._places: dict[int, list[int]] = {}
        for shard, row in places:
            self._places.setdefault(shard, []).append(row)

    def add(self, rows: ShardRows) -> None:
        self.collector.add(rows)
        begin, end = self._first_row[rows.shard : rows.shard + 2]
        drawn = self._drawn[(self._drawn >= begin) & (self._drawn < end)] - begin
        self.picks += _picks(rows, np.flatnonzero(rows.kept)[drawn])
        wanted = [r for r in self._places.get(rows.shard, ()) if r < len(rows.table)]
        wanted = [r for r in wanted if rows.is_ok[r]]
        for row, pick in zip(wanted, _picks(rows, np.array(wanted, np.int64)), strict=True):
            self.members[rows.shard, row] = pick
        self._add_examples(rows.table.filter(rows.rejected).select(["reason", "source"]))

    def _add_examples(self, rejects: pa.Table) -> None:
        for reason in pc.unique(rejects["reason"].drop_null()).to_pylist():
            found = self.examples.get(reason, [])
            if len(found) < _EXAMPLES and (found or len(self.examples) < _MAX_REASONS):
                sources = rejects["source"].filter(pc.equal(rejects["reason"], reason))
                self.examples[reason] = (found + sources[:_EXAMPLES].to_pylist())[:_EXAMPLES]


def _draw(num_kept: int, samples: int, seed: int) -> Numbers:
    """Numbers of kept rows, ascending and different, each as likely."""
    generator = np.random.default_rng(seed)
    drawn: Numbers = generator.choice(num_kept, min(samples, num_kept), replace=False)
    return np.sort(drawn)


def _picks(rows: ShardRows, numbers: Numbers) -> list[Pick]:
    names = [name for name in COLUMNS if name in rows.table.column_names]
    found = rows.table.select(names).take(numbers).to_pylist()
    return [Pick(rows.shard, row) for row in found]


# The sections


def _head(dataset: Store, snapshot: Snapshot) -> Html:
    text = page.text(snapshot.note, page.MAX_NOTE)
    note = f'<p class="note">{text}</p>' if snapshot.note else ""
    version = f'<span class="soft">version {snapshot.version}</span>'
    return Html(f"<h1>{page.text(dataset.url)} {version}</h1>\n{note}")


def _figures(stats: Stats) -> Html:
    num_rejected = sum(stats.rejected.values())
    tried = stats.images + num_rejected
    figures = [
        ("Images", f"{stats.kept:,}"),
        ("Bytes", size(stats.image_bytes)),
        ("Mean size", size(stats.image_bytes / stats.kept) if stats.kept else "–"),
        ("Masked", f"{stats.masked:,}{_percent(stats.masked, stats.images)}"),
        ("Rejected", f"{num_rejected:,}{_percent(num_rejected, tried)}"),
        ("Labels", f"{stats.num_labels:,}"),
        ("Shards", f"{stats.shards:,}"),
    ]
    cells = "\n".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in figures)
    return Html(f'<dl class="figures">\n{cells}\n</dl>')


def _samples(shown: Sequence[Thumbnail], num_kept: int) -> Html:
    if not shown:
        return page.card("Samples", Html('<p class="note">No image is kept.</p>'))
    figures = page.join([_figure(each) for each in shown])
    title = f"{len(shown):,} of {num_kept:,} images, drawn at random"
    title = title if len(shown) < num_kept else f"All {num_kept:,} images"
    return page.card(title, Html(f'<div class="samples">\n{figures}\n</div>'))


def _figure(thumbnail: Thumbnail, *, kind: str = "", remark: str = "") -> Html:
    row = thumbnail.pick.row
    lines = [
        f'<span class="name" title={page.hint(row["label"])}>{page.text(row["label"])}</span>'
        if row.get("label")
        else "",
        f"<span>{page.text(remark)}</span>" if remark else "",
        f'<span class="soft">{_dimensions(row)}</span>',
        f"<span title={page.hint(row['source'])}>{_source(row['source'])}</span>",
        f'<span class="soft code" title={page.hint(row["key"])}>{page.text(row["key"])}</span>',
    ]
    caption = "\n".join(line for line in lines if line)
    return Html(
        f'<figure class="{kind}"><div class="frame">{_picture(thumbnail)}</div>\n'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _picture(thumbnail: Thumbnail) -> Html:
    if thumbnail.problem:
        return Html(f'<div class="broken">{page.text(thumbnail.problem)}</div>')
    data = base64.b64encode(thumbnail.jpeg).decode()
    return Html(
        f'<img width="{thumbnail.width_px}" height="{thumbnail.height_px}" '
        f"alt={page.hint(thumbnail.pick.row['key'])} "
        f'src="data:image/jpeg;base64,{data}">'
    )


def _charts(stats: Stats) -> Html:
    charts = [
        ("Width, pixels", "width", _pixels, powers_of_two),
        ("Height, pixels", "height", _pixels, powers_of_two),
        ("Width : height", "aspect", _ratio, _aspect_ticks),
        ("Bytes", "length", _bytes, powers_of_ten),
    ]
    cards = [_chart(stats, *chart) for chart in charts]
    return page.pair(cards)


def _chart(
    stats: Stats,
    title: str,
    name: str,
    label: Label,
    ticks: Callable[[Histogram], list[float]],
) -> Html:
    histogram = stats.histograms.get(name, Histogram())
    quantiles = stats.quantiles.get(name)
    middle = quantiles[_MEDIAN] if quantiles else None
    drawing = histogram_chart(
        histogram, name=f"Images by {title}", label=label, ticks=ticks(histogram), middle=middle
    )
    return page.card(title, drawing)


def _counts_table(title: str, column: str, counts: dict[str, int], whole: int) -> Html:
    if not counts:
        return Html("")
    rows = [
        [page.text(name, 80), page.number(count), page.share_bar(count, whole)]
        for name, count in counts.items()
    ]
    return page.card(title, _long_table([column, "#images", "share"], rows))


def _formats(stats: Stats) -> Html:
    return _counts_table("Formats", "format", stats.formats, stats.kept)


def _labels(stats: Stats) -> Html:
    shown = dict(list(stats.labels.items())[:_MAX_LABELS])
    title = f"Labels: the {len(shown)} most frequent" if stats.num_labels > len(shown) else "Labels"
    return _counts_table(title, "label", shown, stats.kept)


def _origins(stats: Stats) -> Html:
    counts = dict(stats.sources)
    if stats.other_sources != SourceCounts(0, 0, 0):
        counts["others"] = stats.other_sources
    rows = [
        [
            page.text(name, 80),
            *map(page.number, (each.kept, each.masked, each.rejected)),
            page.share_bar(each.kept, stats.kept),
        ]
        for name, each in counts.items()
    ]
    columns = ["host, folder or tars", "#images", "#masked", "#rejected", "share"]
    return page.card("Where it comes from", _long_table(columns, rows)) if rows else Html("")


def _rejects(stats: Stats, examples: dict[str, list[str]]) -> Html:
    if not stats.rejected:
        return Html("")
    whole = sum(stats.rejected.values())
    rows = [
        [
            page.text(reason, 80),
            page.number(count),
            page.share_bar(count, whole),
            _list([_source(each) for each in examples.get(reason, ())]),
        ]
        for reason, count in stats.rejected.items()
    ]
    note = f"{stats.superseded:,} more were tried again." if stats.superseded else ""
    table = _long_table(["reason", "#rows", "share", "for example"], rows)
    return page.card("Rejected", table, note=note)


def _lineage(dataset: Store, snapshot: Snapshot) -> Html:
    rows = [_version_row(dataset, version) for version in _versions(snapshot)]
    columns = ["version", "#images", "#shards", "how it came about"]
    return page.card("Versions up to this one", _long_table(columns, rows))


def _version_row(dataset: Store, version: int) -> list[Html]:
    try:
        snapshot = read_snapshot(dataset, version)
    except ManifestError:
        unknown = Html("–")
        return [page.number(version), unknown, unknown, Html("can no longer be read")]
    note = snapshot.note or f"{len(snapshot.plans)} packed"
    counts = (snapshot.num_kept, len(snapshot))
    return [page.number(version), *map(page.number, counts), page.text(note)]


def _versions(snapshot: Snapshot) -> range:
    """The newest versions that a snapshot descends from, itself first."""
    return range(snapshot.version, max(snapshot.version - NUM_VERSIONS, 0), -1)


def _shards(snapshot: Snapshot) -> Html:
    shown = min(len(snapshot), NUM_SHARDS)
    num_adopted = int(pc.sum(pc.match_substring(snapshot.table["tar"], "://")).as_py() or 0)
    rows = [_shard_row(snapshot, shard) for shard in range(shown)]
    note = (
        f"{len(snapshot):,} shards of {size(float(snapshot.tar_bytes.sum()))}: "
        f"{len(snapshot) - num_adopted:,} packed here, {num_adopted:,} adopted where they lie; "
        f"{snapshot.num_kept:,} of {int(snapshot.rows.sum()):,} rows are kept."
    )
    title = "Shards" if shown == len(snapshot) else f"The first {shown} shards"
    columns = ["#", "tar", "#rows", "#kept", "#bytes", "", "mask"]
    return page.card(title, _long_table(["#no.", *columns[1:]], rows), note=note)


def _shard_row(snapshot: Snapshot, shard: int) -> list[Html]:
    tar = snapshot.tar[shard]
    return [
        page.number(shard),
        Html(f'<span class="code">{page.text(tar)}</span>'),
        page.number(int(snapshot.rows[shard])),
        page.number(int(snapshot.kept[shard])),
        Html(size(float(snapshot.tar_bytes[shard]))),
        Html("adopted" if "://" in tar else "own"),
        Html("yes" if snapshot.mask[shard] is not None else ""),
    ]


# Duplicates


@dataclass(frozen=True)
class _Clusters:
    """Clusters to show, or why there are none though the snapshot's lineage names some."""

    key: str = ""
    found: list[Cluster] = field(default_factory=list)
    problem: str = ""

    def places(self) -> list[_Place]:
        return [(each.shard, each.row) for cluster in self.found for each in cluster.members]

    def section(self, pictures: dict[_Place, Thumbnail]) -> Html:
        if not self.key:
            return Html("")
        if self.problem:
            return page.card("Duplicates", Html(""), note=self.problem)
        rows = page.join([_cluster(cluster, pictures) for cluster in self.found])
        note = f"The largest clusters and random ones of {self.key}; one image of each stays."
        return page.card("Duplicates", rows, note=note)


def _find_clusters(dataset: Store, snapshot: Snapshot, seed: int) -> _Clusters:
    """The clusters of the last deduplication that a snapshot descends from."""
    key = _clusters_key(dataset, snapshot)
    if key is None:
        return _Clusters()
    try:
        return _Clusters(key, read_clusters(dataset, key, num_clusters=NUM_CLUSTERS, seed=seed))
    except (DataError, ObjectMissingError) as error:
        return _Clusters(key, problem=str(error))


def _clusters_key(dataset: Store, snapshot: Snapshot) -> str | None:
    for version in _versions(snapshot):
        try:
            note = read_snapshot(dataset, version).note
        except ManifestError:
            continue
        if match := _CLUSTERS_IN_NOTE.search(note):
            return match[1]
    return None


def _cluster(cluster: Cluster, pictures: dict[_Place, Thumbnail]) -> Html:
    hidden = cluster.size - len(cluster.members)
    title = f"{cluster.size:,} images" + (f", {hidden:,} of them not shown" if hidden > 0 else "")
    figures = page.join([_member(each, pictures) for each in cluster.members])
    return Html(f'<h3>{title}</h3>\n<div class="row">\n{figures}\n</div>')


def _member(member: Member, pictures: dict[_Place, Thumbnail]) -> Html:
    picture = pictures.get((member.shard, member.row))
    if picture is None or picture.pick.row["key"] != member.key:
        row = {"key": member.key, "source": "", "label": None}
        picture = Thumbnail(Pick(member.shard, row), problem="not in this version")
    if member.kept:
        return _figure(picture, kind="chosen", remark="kept")
    if not member.distance:
        return _figure(picture, remark="same hash")
    bits = "1 bit" if member.distance == 1 else f"{member.distance} bits"
    return _figure(picture, remark=f"{bits} away")


# Small parts


def _source(source: str) -> Html:
    """A link to an image; a member of a tar is none, a click should not load the whole tar."""
    return page.text(source) if is_tar_member(source) else page.link(source)


def _short_source(source: str) -> Html:
    """As `_source`, but of a path only the last two names: a caption has room for these."""
    if page.is_plain_web_url(source) and not is_tar_member(source):
        return page.link(source)
    return page.text("/".join(source.split("/")[-2:]))


def _dimensions(row: dict[str, object]) -> Html:
    sides = f"{row['width']}×{row['height']}" if row.get("width") and row.get("height") else ""
    length = row.get("length")
    weight = size(length) if isinstance(length, int) else ""
    return page.text(" · ".join(part for part in (sides, weight) if part))


def _list(items: Sequence[Html]) -> Html:
    return Html(f'<span class="list">{page.join(items)}</span>')


def _long_table(columns: Sequence[str], rows: Sequence[Sequence[Html]]) -> Html:
    """A table whose end opens on a click."""
    if len(rows) <= _SHOWN_ROWS + 3:
        return page.table(columns, rows)
    rest = page.folded(f"{len(rows) - _SHOWN_ROWS} more", page.table(columns, rows[_SHOWN_ROWS:]))
    return page.join([page.table(columns, rows[:_SHOWN_ROWS]), rest])


def _percent(part: int, whole: int) -> str:
    return f" <small>{100 * part / whole:.1f} %</small>" if part else ""


def _pixels(value: float) -> str:
    return f"{value:.0f}"


def _bytes(value: float) -> str:
    return size(value).replace(".0 ", " ")


def _ratio(value: float) -> str:
    """2:1, 1:1.5."""
    return f"{value:.3g}:1" if value >= 1 else f"1:{1 / value:.3g}"


def _aspect_ticks(histogram: Histogram) -> list[float]:
    if not histogram.edges:
        return []
    return [a for a in _ASPECTS if histogram.edges[0] <= a <= histogram.edges[-1]]
