"""One progress bar over all stages of a run: the stage, samples (model rows) done of those predicted, time left."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .job import Step
    from .plans import Plan

BAR = "{desc:<9} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} samples, {elapsed} gone, {remaining} left"


@contextlib.contextmanager
def progress(quiet: bool, rows: dict[str, int], *watchers: Any, always: bool = False) -> Iterator[Any]:
    """A watcher that shows the bar, silent where stderr is no terminal unless `always`; `watchers` look on too."""
    from huggingface_hub.utils import tqdm

    disable = True if quiet else False if always else None
    with tqdm(total=sum(rows.values()), bar_format=BAR, disable=disable, file=sys.stderr) as bar:
        before = 0

        def watch(step: "Step") -> None:
            nonlocal before
            bar.set_description_str(step.stage)
            bar.update(step.rows - before if step.rows >= before else step.rows)  # a new run begins at nothing
            before = step.rows
            for one in watchers:
                one(step)

        yield watch
        bar.total = bar.n  # less than predicted where nothing was found, or refining stopped early
        bar.refresh()


def bar(settled: "Plan", watch: Callable[["Step"], None] | None = None) -> Any:
    """The same for a plan, shown wherever stderr goes (a notebook's is no terminal)."""
    from .cost import cost

    return progress(False, cost(settled), *filter(None, [watch]), always=True)
