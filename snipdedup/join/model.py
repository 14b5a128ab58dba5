"""What all tasks of a join share: how rows become codes, and which lists they visit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from snipdedup.errors import DamagedError, InputError
from snipdedup.features.formats import load_npz
from snipdedup.join.hubs import Hubs
from snipdedup.join.learned import LEARNED, Learned
from snipdedup.join.lists import Lists
from snipdedup.join.projection import ARITHMETIC, Projection
from snipdedup.storage import atomic


@dataclass(frozen=True)
class Model:
    """What all tasks of a join share: how rows become codes, and which lists they visit."""

    projection: Projection
    lists: Lists
    hubs: Hubs
    threshold: float
    calibration_pairs: int

    @property
    def limit(self) -> float:
        """Product of two codes from which their rows may be a pair."""
        return self.projection.limit(self.threshold)

    def save(self, path: Path) -> None:
        """Write the model as one ``.npz``."""
        atomic.save_npz(
            path,
            lasting=True,  # all that is encoded hangs on it
            **self.projection.arrays(),
            centroids=self.lists.centroids,
            hub_row=self.hubs.row,
            hub_raw=self.hubs.raw,
            hub_codes=self.hubs.codes,
            numbers=np.array(
                [self.lists.tau, self.lists.alone, self.threshold, self.calibration_pairs]
            ),
        )

    @classmethod
    def load(cls, path: Path) -> Model:
        """Read a model."""
        try:
            file = load_npz(path)
            check_arithmetic(str(file["arithmetic"]), "encoder" in file)
            parts = file["matrix"], file["residual"], float(file["scale"]), float(file["unit"])
            projection = Projection(*parts)
            if "encoder" in file:
                from snipdedup.encoder.network import Encoder

                place = Path(str(file["encoder"]))
                lowest = float(file["lowest"])
                projection = Learned(*parts, Encoder.load(place, "cpu"), place, lowest)
            tau, alone, threshold, pairs = (float(number) for number in file["numbers"])
            hubs = Hubs(file["hub_row"], file["hub_raw"], file["hub_codes"], threshold, projection)
            lists = Lists(file["centroids"], tau, alone)
        except (InputError, LookupError, TypeError, ValueError) as error:
            # not fitted anew: codes that are there may be those of an earlier run's model
            raise DamagedError(f"{path}: damaged ({error}); run again, it begins anew") from error
        return cls(projection, lists, hubs, threshold, int(pairs))


def check_arithmetic(name: str, learned: bool) -> None:
    """Refuse a model whose codes this version does not make: its rows would have others."""
    ours = LEARNED if learned else ARITHMETIC
    if name != ours:
        raise ValueError(f"its codes are made by '{name}', this version makes them by '{ours}'")


def is_readable(path: Path) -> bool:
    """Tell whether a file holds a model."""
    try:
        Model.load(path)
    except DamagedError:
        return False
    return True
