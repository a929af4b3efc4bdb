"""What the result files are expected to say before anything ran: steps, tickets, sizes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from ebdiff.experiment.experiment import Experiment
from ebdiff.experiment.inputs import is_given
from ebdiff.experiment.runs import Expert
from ebdiff.experiment.schema import FINAL
from ebdiff.metrics import classifier, inception
from ebdiff.plan.jobs import Job
from ebdiff.pruning.graph import mask_length, trace
from ebdiff.report.results import Results
from ebdiff.training.train import like_steps


class Expected(Results):
    """An experiment's results as far as they are known before it runs: every search goes to its horizon.

    Args:
        experiment: what is planned.
        networks: as in cost.json.
        count: images of the dataset.
    """

    def __init__(self, experiment: Experiment, networks: Mapping[str, dict[str, Any]], count: int) -> None:
        super().__init__(experiment)
        self.networks, self.count = networks, count

    def network(self, name: str) -> dict:
        """The cost of one network."""
        return self.networks[name]

    def story(self, seed: int, expert: Expert) -> dict:
        """A ticket found at the horizon."""
        step = self.experiment.dense.iterations if expert.search == FINAL else self.horizon(expert.search)
        return {"search": expert.search, "step": step, "settled": True}

    def ledger(self, seed: int, expert: Expert) -> dict:
        """The steps of an expert's milestone."""
        return {"steps": self.steps(expert.key, str(expert.iterations))}

    # --- steps -----------------------------------------------------------------------------------

    def horizon(self, search: str) -> int:
        """Steps after which a search ends at the latest."""
        rule = self.experiment.searches[search]
        return rule.horizon * (rule.interval.steps or self.experiment.epoch_steps(self.count))

    def steps(self, key: str, milestone: str) -> int:
        """The steps of a milestone; of a `like-RUN` one at most."""
        if not milestone.startswith("like-"):
            return int(milestone)
        run = self.experiment.runs[milestone.removeprefix("like-")]
        stories = [self.story(0, e) for e in run.experts if e.needs_ticket]
        return like_steps(self.experiment, self.experiment.experts()[key], run, self.networks, stories)

    def begun(self, key: str, milestone: str) -> int:
        """The step that a milestone's training goes on from."""
        steps = self.steps(key, milestone)
        if is_given(self.experiment, key, milestone):
            return steps
        expert, before = self.experiment.experts()[key], self.experiment.previous_milestone(key, milestone)
        begun = [0, before or 0]
        if expert.continues_search and not self.experiment.dense.source:
            begun.append(self.horizon(expert.search))
        return max(step for step in begun if step <= steps)

    # --- sizes -----------------------------------------------------------------------------------

    def bytes_of(self, job: Job) -> int:
        """What a job leaves on disk, at most; tables, figures and ledgers are left out."""
        where, dense = job.where, self.networks["dense"]["params"]
        match job.verb:
            case "prepare-data":
                return self.count * (self._image + 8)  # and a label
            case "reference-stats":
                width = feature_width(where["protocol"])
                return 4 * self.reference_count * width + 8 * width * (width + 1)
            case "train-dense":
                return 16 * dense + 8 * dense * self._snapshots(where["search"]) + self._masks(where, kinds=2)
            case "prune-per-epoch":
                return self._masks(where, kinds=1)
            case "hamming-matrix":
                return 4 * len(self.experiment.rates_of(where["search"])) * self._intervals(where) ** 2
            case "select-eb-epoch":
                return 4 * self.networks[str(where["rate"])]["params"]
            case "finetune-region":
                network = self.experiment.experts()[where["expert"]].network
                return self.state_bytes(network)
            case "sample":
                return self.experiment.sampling.images * self._image
        return 0

    def state_bytes(self, network: str) -> int:
        """A full training state: raw and averaged weights, and Adam's two moments, in fp32."""
        return 16 * self.networks[network]["params"]

    @property
    def reference_count(self) -> int:
        """Real images that runs are compared with."""
        return min(self.experiment.evaluation.reference or self.count, self.count)

    @property
    def _image(self) -> int:
        network = self.experiment.network
        return network.image_size**2 * network.channels

    def _snapshots(self, search: str) -> int:
        """Snapshots of a search: every interval for gradient criteria, else one a ticket at most."""
        rule = self.experiment.searches[search]
        if rule.gradient_criteria:
            return rule.horizon
        return min(rule.horizon, len(rule.rates) * len(rule.weights))

    def _intervals(self, where: Mapping[str, Any]) -> int:
        return 1 if where["search"] == FINAL else self.experiment.searches[where["search"]].horizon

    def _masks(self, where: Mapping[str, Any], kinds: int) -> int:
        """Packed masks of every interval and of the initial weights."""
        rates = len(self.experiment.rates_of(where["search"]))
        return kinds * (self._intervals(where) + 1) * rates * self._mask

    @cached_property
    def _mask(self) -> int:
        return -(-mask_length(trace(self.experiment.network)) // 8)


def feature_width(protocol: str) -> int:
    """Features per image."""
    return classifier.FEATURES if protocol == "classifier" else inception.DIMENSION
