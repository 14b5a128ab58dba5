"""``snip why``: why rows of a finished OUT are removed or kept, and how alike their groups are.

The decision is read from OUT. The cosines of a row with all rows of its group are computed again,
from the raw features, if they are still those that were searched.
"""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from snipdedup.commands import keep_rules
from snipdedup.config import Report, Why
from snipdedup.deduplication.decisions import FILE, read_sheet
from snipdedup.deduplication.inputs import KIND, named_paths, open_searched
from snipdedup.deduplication.read_out import pick, read_also, read_keys, whole_groups
from snipdedup.deduplication.second_features import recorded_seconds
from snipdedup.errors import SnipError
from snipdedup.features.cosine import pair_cosine
from snipdedup.features.origin import origin_of
from snipdedup.features.shards import Features, parts_for, plan_blocks
from snipdedup.groups.keep import rank_by
from snipdedup.groups.members import Members
from snipdedup.inspection import display, report
from snipdedup.inspection.display import ShownRow, terminal_text
from snipdedup.inspection.embedded import Sources, read_places
from snipdedup.metadata.find_keys import find_run_rows
from snipdedup.metadata.gather import RowTexts, open_row_texts
from snipdedup.metadata.tables import ANY_KEY, stream_parquet
from snipdedup.storage.atomic import replacing
from snipdedup.storage.out_folder import as_written, read_manifest, refuse_output_file

MOST_MEMBERS, LISTED, TILES = 1000, 20, 60  # of a group: described, printed, on the page
READ_ROWS = 4096


@dataclass
class Member(ShownRow):
    """A row; ``cosine`` is that with the row asked for, None where it is not known."""

    removed: bool = False
    cosine: float | None = None
    picture: str | None = None  # where it lies
    keep: dict[str, str] = field(default_factory=dict)  # the columns of --keep

    @property
    def name(self) -> str:
        """Number and key, and what the keep rule looks at."""
        keep = [f"{name} {value}" for name, value in self.keep.items()]
        about = ", ".join(terminal_text(text) for text in ([self.key] if self.key else []) + keep)
        return f"row {self.row}" + (f" ({about})" if about else "")


@dataclass(frozen=True)
class Reason:
    """Why one row is removed or kept; ``similarity`` is as ``groups.parquet`` has it."""

    row: Member
    why: str  # a sentence
    keep: str = ""  # which row goes before it in keep order, where that decided and is known
    representative: int | None = None  # of a removed row; below 0: complement of a reference row
    similarity: float | None = None
    group: int | None = None  # its smallest row; None of a row that matches none
    group_rows: int = 1
    matches: int | None = None  # rows of the group that reach the threshold; None: not known
    members: list[Member] = field(default_factory=list)  # the others, the most alike first

    def first(self, count: int) -> list[Member]:
        """Return some members: the representative, then the most alike."""
        return sorted(self.members, key=lambda one: one.row != self.representative)[:count]

    def __str__(self) -> str:
        row = self.row
        about = {"key": row.key, "place": f"{row.shard} row {row.shard_row}"}
        about |= {"picture": row.picture, "caption": row.caption, "url": row.url}
        about |= {"why": self.why, "keep": self.keep}
        if self.group is not None:
            near = "" if self.matches is None else f", {self.matches:,} reach the threshold with it"
            about["group"] = f"{self.group}: {self.group_rows - 1:,} other rows{near}"
        lines = [f"row {row.row} is {'removed' if row.removed else 'kept'}"]
        lines += [f"  {name:<8} {terminal_text(text)}" for name, text in about.items() if text]
        for member in self.first(LISTED):
            cosine = "?" if member.cosine is None else f"{member.cosine:.6f}"
            state = "removed" if member.removed else "kept"
            mark = ", the representative" if member.row == self.representative else ""
            picture = "" if member.picture is None else f"  {terminal_text(member.picture)}"
            lines.append(f"    {cosine:>8}  {member.name}: {state}{mark}{picture}")
        more = self.group_rows - 1 - min(len(self.members), LISTED)
        return "\n".join([*lines, *([f"    and {more:,} more"] if more else [])])


@dataclass(frozen=True)
class WhyResult:
    """What ``snip why`` found: a reason for each row; ``text`` is what the command prints."""

    reasons: list[Reason]
    note: str = ""  # why cosines are not known; empty where they are
    page: Path | None = None  # the page that was written

    @property
    def text(self) -> str:
        """All of it, for reading."""
        last = [self.note, f"written to {self.page}" if self.page else ""]
        return "\n\n".join(filter(None, [*map(str, self.reasons), *last]))

    def __str__(self) -> str:
        return self.text

    def as_json(self) -> dict[str, Any]:
        """Return the reasons as JSON values."""
        return {"note": self.note, "rows": [dataclasses.asdict(reason) for reason in self.reasons]}


def run(options: Why) -> WhyResult:
    """Run ``snip why``."""
    if options.html is not None:
        display.require("jinja2", "--html")
    out = Path(options.out).expanduser()
    with as_written(out):
        manifest = read_manifest(out, KIND)
        texts = open_row_texts(out, manifest, options.metadata)
        page = None if options.html is None else Path(options.html).expanduser()
        if page is not None:
            refuse_output_file(page, [out, *texts.inputs(), *named_paths(manifest)])
        rows = find_run_rows(out, manifest, texts, options.key)
        features, note = reopen_features(out, manifest, options.features)
        finished = FinishedRun(out, manifest, texts, features)
        result = WhyResult(finished.explain(rows), note, page)
        if page is not None:
            with replacing(page) as part:
                part.write_text(make_page(finished, result.reasons, options), encoding="utf-8")
    return result


def reopen_features(
    out: Path, manifest: dict[str, Any], given: str | None
) -> tuple[Features | None, str]:
    """Open the features of a run, or those that were given; return None and why if they cannot be.

    Given ones that are others are refused.
    """
    settings = manifest["settings"]
    source = given or settings.get("features")
    if not manifest["verified"]:
        return None, "cosines are not known: the run compared codes"
    if source is None:
        return None, "cosines are not known: the run names no features; give them with --features"
    how = {name: settings.get(name) for name in ("array", "column")}
    try:
        how["parts"] = parts_for(source, settings.get("parts"))
        return open_searched(out, source, manifest, how), ""
    except SnipError as error:
        if given is not None:
            raise
        return None, f"cosines are not known: {error}; name the features with --features"


class FinishedRun:
    """A finished run, its metadata, and its features where they are known."""

    def __init__(
        self, out: Path, manifest: dict[str, Any], texts: RowTexts, features: Features | None
    ) -> None:
        self.out, self.manifest, self.texts, self.features = out, manifest, texts, features
        self.settings = manifest["settings"]
        self.threshold = float(self.settings["threshold"])
        self.is_dup = np.load(out / "is_dup.npy", mmap_mode="r")
        by_clusters = self.settings["method"] == "semdedup"
        self.rules = [] if by_clusters else keep_rules(self.settings["keep"])[0]
        told = read_sheet(out / FILE, "decisions", {"row"}) if (out / FILE).is_file() else ()
        self.told = {int(line["row"]): line["decision"] for _, line in told}
        whole = texts.metadata is not None and texts.is_dup is None
        self.by_keep_order = not by_clusters and (not self.rules or whole)

    def explain(self, rows: list[int]) -> list[Reason]:
        """Return why each row is removed or kept."""
        groups, reasons = read_groups(self.out / "groups.parquet", rows), []
        alike = {row: self.most_alike(row, group) for row, group in groups.items()}
        shown = {row for near in alike.values() for row in near[0].tolist()}
        members = self.describe(sorted({*rows, *shown}))
        for row in rows:
            if (group := groups.get(row)) is None:
                reasons.append(Reason(members[row], self.why_alone(row)))
                continue
            others = [
                dataclasses.replace(members[other], cosine=None if np.isnan(cosine) else cosine)
                for other, cosine in zip(*map(np.ndarray.tolist, alike[row][:2]), strict=True)
            ]
            reasons.append(self.reason(members[row], group, others, alike[row][2]))
        return reasons

    def most_alike(self, row: int, group: Members) -> tuple[np.ndarray, np.ndarray, int | None]:
        """Return the rows of a group most alike to one, and cosines (NaN: not known), (m,) each.

        Last: how many others of the group reach the threshold with it, None if that is not known.
        """
        others = pick(group, group.row != row)
        if self.features is None:  # what OUT has: of removed rows with their representatives
            (me,) = np.flatnonzero(group.row == row)
            cosine = np.where(others.representative == row, others.similarity, np.float32(np.nan))
            cosine[others.row == group.representative[me]] = group.similarity[me]
            count = None
        else:
            own, cosine = self.features.read(row, row + 1), np.empty(len(others.row), np.float32)
            for start, stop in plan_blocks(len(cosine), READ_ROWS):
                near = self.features.gather(others.row[start:stop])
                cosine[start:stop] = pair_cosine(np.repeat(own, len(near), 0), near)
            count = int(np.count_nonzero(cosine >= np.float32(self.threshold)))
        order = np.lexsort((others.row, -np.nan_to_num(cosine, nan=-2)))[:MOST_MEMBERS]
        return others.row[order], cosine[order], count

    def describe(self, rows: list[int]) -> dict[int, Member]:
        """Return what is known of rows, by row."""
        places, every = display.places_of(self.manifest["shards"], rows), np.array(rows, np.int64)
        found = {row: Member(row, **places[row], removed=bool(self.is_dup[row])) for row in rows}
        display.fill_texts(list(found.values()), self.texts, "url", "caption")
        keys = self.texts.read(self.texts.find(self.settings.get("key"), ANY_KEY), every)
        for row, key in (keys | read_keys(self.out / "groups.parquet", every)).items():
            found[row].key = key
        for column in dict.fromkeys(column for _, column in self.rules):
            for row, value in self.texts.read(self.texts.find(column), every).items():
                found[row].keep[column] = value
        images: list[str] = []
        with suppress(SnipError):  # damaged, or in a store that cannot be reached now
            images = getattr(origin_of(self.settings.get("features")), "images", [])
        sources = Sources(images)
        names = self.texts.find(wanted=("image_path", "filename"))
        for row, name in self.texts.read(names, every).items():
            found[row].picture = name if name != found[row].key else None
        for row, known in read_places(self.texts, every).items():
            place, *inside = known.values()
            words = [str(sources.find(place) or place), *inside]
            found[row].picture = ": ".join(words) if words != [found[row].key] else None
        return found

    def why_alone(self, row: int) -> str:
        """Return why a row that is in no group is as it is."""
        bad = self.out / "bad_rows.parquet"
        if bad.is_file() and row in stream_parquet(bad).read(["row"])["row"].to_numpy():
            return "it cannot be compared: it is NaN, infinite or zero"
        if self.is_dup[row]:
            return "groups.parquet does not say: it lists no row that this one duplicates"
        return f"no other row was found that reaches the threshold {self.threshold:g}"

    def reason(
        self, own: Member, group: Members, others: list[Member], matches: int | None
    ) -> Reason:
        """Return why a row of a group is removed or kept."""
        (me,) = np.flatnonzero(group.row == own.row)
        named, similarity = int(group.representative[me]), float(group.similarity[me])
        stands = int(np.count_nonzero(group.is_dup & (group.representative == own.row)))
        known = None if np.isnan(similarity) else similarity
        if own.removed:
            why, keep = self.why_removed(own, named, known, others)
            if named == own.row:
                why, keep = "no kept row matches it", ""
            if own.row in self.told:
                why = f"it was told to go (--decisions); {why}"
        else:
            grouping, keep = self.settings.get("grouping"), ""
            why = {
                "star": "no kept row of its group that goes before it matches it",
                "components": "it is the first of its group in keep order",
            }.get(str(grouping), "no earlier row of its cluster is near enough")
            if self.settings.get("references_only"):
                why = "no reference row matches it"
            why += " (decisions apart)" if self.told else ""
            why = "it was told to stay (--decisions)" if own.row in self.told else why
            why += f"; {stands:,} removed rows have it as representative" if stands else ""
        alone = not own.removed or named == own.row  # told to go, and like no row that stays
        return Reason(
            own, why, keep, None if alone else named, None if alone else known, int(group.group[0]),
            len(group.row), matches, others,
        )  # fmt: skip

    def why_removed(
        self, own: Member, named: int, similarity: float | None, others: list[Member]
    ) -> tuple[str, str]:
        """Return why a row is removed, and which row's place in keep order decided that."""
        cosine = "not verified" if similarity is None else f"cosine {similarity:.6f}"
        cosine += f", threshold {self.threshold:g}"
        also = read_also(self.out / "groups.parquet", np.array([own.row])).get(own.row, [])
        for second, value in zip(recorded_seconds(self.manifest), also, strict=False):
            cosine += f"; in {second['name']}: cosine {value:.6f}"
        if named < 0:
            name, number = reference_of(self.out / "groups.parquet", own.row)
            return f"it duplicates row {number} of the reference {name}: {cosine}", ""
        found = {member.row: member for member in others}
        other = found.get(named) or self.describe([named])[named]
        state = "removed, too" if self.is_dup[named] else "kept"
        why = f"it duplicates {other.name}, which is {state}: {cosine}"
        if similarity is not None and similarity < np.float32(self.threshold):
            why += "; below the threshold: other rows of the group connect the two"
        if not self.by_keep_order:
            return why, ""
        limit = np.float32(self.threshold)
        near = [m.row for m in others if not m.removed and (m.cosine or -1) >= limit]
        if self.settings["grouping"] != "star" or recorded_seconds(self.manifest) or not near:
            near = [named]
        if self.told.keys() & {own.row, *near}:
            return why, ""
        rank = rank_by(self.settings["keep"], self.settings["seed"] or 0, self.texts.metadata)
        place = rank(np.array([own.row, *near]))
        first = near[int(np.argmin(place[1:]))]
        if min(place[1:]) > place[0]:  # the metadata is another one by now
            return why, ""
        first_name = found[first].name if first in found else other.name
        return why, f"{self.settings['keep']}: {first_name} goes before {own.name}"


def read_groups(path: Path, rows: list[int]) -> dict[int, Members]:
    """Return the members of each row's group, by row; rows in no group are left out."""
    wanted, found = np.array(rows, np.int64), {}
    for members in whole_groups(path):
        for at in np.flatnonzero(np.isin(members.row, wanted)).tolist():
            span = np.searchsorted(members.group, [members.group[at], members.group[at] + 1])
            found[int(members.row[at])] = pick(members, slice(*span))
    return found


def reference_of(path: Path, row: int) -> tuple[str, int]:
    """Return the reference, and the row in it, that a row is removed for."""
    for batch in stream_parquet(path).iter_batches(columns=["row", "reference", "representative"]):
        for at in np.flatnonzero(batch["row"].to_numpy() == row):
            return str(batch["reference"][at]), batch["representative"][at].as_py()
    raise SnipError(f"{path}: damaged: it has no reference of row {row:,}; make it anew")


def make_page(run: FinishedRun, reasons: list[Reason], options: Why) -> str:
    """Return a page of the rows and their groups, with pictures where the report has them."""
    near = {reason.row.row: reason.first(TILES) for reason in reasons}
    shown = np.unique([*near, *(member.row for members in near.values() for member in members)])
    asked = Report(out=options.out, images=options.images)
    origin = None if options.images else report.known_pictures(run.manifest)
    rows, _ = report.read_rows(
        run.out, run.manifest, run.texts, asked, origin, (shown.astype(np.int64),) * 2, run.is_dup
    )
    return display.render_page(
        "why.html.j2",
        (display.TEMPLATES / "report.js").read_text("utf-8"),
        title=run.out.resolve().name,
        reasons=[(one, rows[one.row.row]) for one in reasons],
        tiles={row: [(rows[m.row], m.cosine) for m in members] for row, members in near.items()},
    )
