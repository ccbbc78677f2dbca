"""The graphs as they are exported: `classify` with its calibration and its levels made consistent, and `map_score`."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from service.contract.annotation import LabelLevel
from training.calibration.probabilities import SMALLEST, Map, groups
from training.calibration.scores import Percentile
from training.calibration.stored import Calibration
from training.families.family import Graph


class Calibrated(nn.Module):
    """A family's classifier with a map of the logarithmic probabilities of each level, children divided among their parents."""

    def __init__(self, classify: nn.Module, levels: Sequence[LabelLevel], maps: Mapping[str, Map]) -> None:
        """Wrap a classifier.

        Args:
            classify: gives probabilities, one tensor per level of `levels` in their order, and perhaps more, which stay as they are.
            levels: of the data.
            maps: by level; those without one stay as they are within their parents.
        """
        super().__init__()
        self.classify = classify
        names = [level.name for level in levels]
        self.above = [None if level.parent is None else names.index(level.parent) for level in levels]
        self.is_mapped = [level.name in maps for level in levels]
        by_level = groups(levels)
        for i, level in enumerate(levels):
            found = maps.get(level.name, Map.identity(len(level.classes)))
            self.register_buffer(f"weight_{i}", torch.from_numpy(found.weight).float())
            self.register_buffer(f"bias_{i}", torch.from_numpy(found.bias).float())
            group = torch.from_numpy(by_level[level.name])
            # The classes group by group, and where each of them is then found.
            order = torch.argsort(group, stable=True)
            self.register_buffer(f"group_{i}", group)
            self.register_buffer(f"order_{i}", order)
            self.register_buffer(f"place_{i}", torch.argsort(order))
        self.sizes = [torch.bincount(by_level_of).tolist() for by_level_of in map(torch.from_numpy, by_level.values())]

    def forward(self, known: Tensor) -> tuple[Tensor, ...]:
        """What the classifier takes, to probabilities (n, n_classes) per level."""
        raw = self.classify(known)
        found: list[Tensor] = []
        for i, above in enumerate(self.above):
            if above is None and not self.is_mapped[i]:
                found.append(raw[i])
                continue
            logits = torch.log(raw[i].clamp(min=SMALLEST))
            if self.is_mapped[i]:
                logits = logits @ self.get_buffer(f"weight_{i}").T + self.get_buffer(f"bias_{i}")
            if above is None:
                found.append(torch.softmax(logits, dim=1))
                continue
            # By index_select, which becomes Gather; brackets become GatherND, which is not served.
            ordered = torch.index_select(logits, 1, self.get_buffer(f"order_{i}"))
            pieces = torch.split(ordered, self.sizes[i], dim=1)
            shares = torch.cat([torch.softmax(piece, dim=1) for piece in pieces], dim=1)
            shares = torch.index_select(shares, 1, self.get_buffer(f"place_{i}"))
            found.append(shares * torch.index_select(found[above], 1, self.get_buffer(f"group_{i}")))
        return (*found, *raw[len(found) :])


def complete(
    graphs: dict[str, Graph], levels: Sequence[LabelLevel], calibration: Calibration | None
) -> dict[str, Graph]:
    """A family's graphs as they are exported; the very same where nothing was calibrated and no level divides another."""
    found = dict(graphs)
    maps = calibration.maps if calibration else {}
    if "classify" in found and (maps or any(level.parent for level in levels)):
        classify = found["classify"]
        found["classify"] = Graph(Calibrated(classify.module, levels, maps).eval(), classify.inputs, classify.outputs)
    if calibration is not None and calibration.score is not None:
        score = calibration.score.build(graphs)
        found["map_score"] = Graph(
            Percentile(score, calibration.score.quantiles).eval(), score.inputs, ("mapping_score",)
        )
    return found
