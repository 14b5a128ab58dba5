"""Image and text: of the pairs of images, those whose captions match as well.

Pairs of images lie in one group of images, and so do those that also match in text. Each group is
compared once more, exact copies of an image included, since their captions may differ.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from snipdedup.deduplication.found import Found
from snipdedup.features.scan import Scan
from snipdedup.features.shards import Features
from snipdedup.groups.pairs import pairs_within
from snipdedup.groups.star import Also
from snipdedup.join.forest import ForestBuilder, components


def with_captions(found: Found, features: Features, seen: Scan, also: Also, threads: int) -> Found:
    """Return what was found among images, cut down to pairs whose captions match.

    Parameters
    ----------
    found : Found
        Pairs of images.
    features : Features
        Of the images.
    seen : Scan
        Of the captions' features: bad rows match nothing, copies must be copies here too.
    also : Also
        What captions must match in.
    threads : int
    """
    bad = np.union1d(found.bad, seen.bad)
    copies, firsts = common_copies(found, seen)
    row, group = components(found.whole_forest)
    use = ~np.isin(row, bad) & ~np.isin(row, copies)
    row, group = row[use], group[use]
    order = np.lexsort((row, group))
    builder = ForestBuilder()
    for edges in pairs_within(features, row[order], group[order], found.threshold, threads, also):
        builder.add(edges)
    return dataclasses.replace(
        found, forest=builder.forest(), copies=copies, firsts=firsts, bad=bad, also=also
    )


def common_copies(found: Found, seen: Scan) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows that are copies in image and caption, ascending, and the first of each."""
    row = np.union1d(found.copies, found.firsts)
    image = found.first_of(row)
    text = row.copy()
    at = np.flatnonzero(np.isin(row, seen.copies))
    text[at] = seen.firsts[np.searchsorted(seen.copies, row[at])]
    order = np.lexsort((row, text, image))
    row, image, text = row[order], image[order], text[order]
    new = np.ones(len(row), bool)
    new[1:] = (image[1:] != image[:-1]) | (text[1:] != text[:-1])
    first = row[new][np.cumsum(new) - 1] if len(row) else row
    order = np.argsort(row[~new])
    return row[~new][order], first[~new][order]
