"""The same rows on many machines: a Ray Data job, one editor per worker, one table of results.

    minidiffedit batch manifest.jsonl -o results --ray 2

On a cluster, with the package in its image and manifest, pictures, model and results on a file system that all nodes
share:

    ray job submit -- minidiffedit batch /mnt/m.jsonl -o /mnt/results --model /mnt/sd15 --ray 16

Each worker is an actor with a GPU of its own where the cluster has GPUs, else with a CPU. A worker that dies is started
again and its picture's rows are made again: written whole and equal bit for bit, they are the same files. Engine,
scheduling and retries are Ray's; nothing here is distributed code of its own.
"""

import json
import logging
import os
from collections.abc import Iterator
from typing import Any

from .batch import Editor, Outcome, at_once
from .manifest import Row

STORE = 200 * 2**20  # bytes of the object store where Ray is started here; only lines of text pass through it


class Worker:
    """What an actor holds: its editor, and the rows by picture."""

    def __init__(self, editor: Editor, groups: list[list[Row]]):
        self.editor, self.groups = editor, groups

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        some = [self.groups[i] for i in batch["id"].tolist()]
        made = at_once(self.editor, some, len(some)) if len(some) > 1 else self.editor(some[0])
        return {"results": [json.dumps([*made])]}


def ray_results(editor: Editor, groups: list[list[Row]], workers: int, together: int = 1) -> Iterator[Outcome]:
    """Each row's outcome as the workers finish `together` pictures. editor, groups: as in `batch`; picklable.

    Starts Ray on this machine, or joins the cluster of RAY_ADDRESS, unless Ray runs in this process already. Raises
    ValueError where Ray is not installed, RuntimeError for what prevents every row.
    """
    try:
        import ray
    except ImportError as error:
        raise ValueError("Ray is not installed: pip install 'minidiffedit[ray]'") from error
    if started := not ray.is_initialized():
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        here: dict[str, Any] = {"address": "local", "num_cpus": workers, "object_store_memory": STORE}
        quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
        ray.init(**quiet, **({} if os.environ.get("RAY_ADDRESS") else here))
    ray.data.DataContext.get_current().enable_progress_bars = False
    gpus = int(ray.cluster_resources().get("GPU", 0) > 0)
    ids = [{"id": i} for i in range(len(groups))]  # no table to read: its tasks would want a CPU besides the workers'
    crew: dict[str, Any] = {"compute": ray.data.ActorPoolStrategy(size=workers), "num_cpus": 1, "num_gpus": gpus}
    items = ray.data.from_items(ids, override_num_blocks=-(-len(groups) // together))
    pictures = items.map_batches(Worker, fn_constructor_args=(editor, groups), batch_size=together, **crew)
    try:
        for picture in pictures.iter_rows():
            yield from map(tuple, json.loads(picture["results"]))
    except ray.exceptions.RayTaskError as error:
        raise RuntimeError(f"a worker failed: {error.cause}") from error
    finally:
        if started:
            ray.shutdown()
