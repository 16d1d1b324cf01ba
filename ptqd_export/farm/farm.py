"""sample_shards: samples of a bundle as files, by many workers on many machines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import backends
from ..bundle import Bundle
from ..core.backend import ORT_CPU
from ..core.plan import Plan
from ..errors import RecipeError, need
from ..runtime import Prompted, Runtime, Start, check_batch, check_seed, usual_batch, versions
from .conditions import Conditions
from .folder import held_order, open_shards
from .formats import PROMPT, pyarrow
from .order import Content, Format, Order, usual_shard_size
from .pool import LOCAL, connect
from .sampler import Task


@dataclass(frozen=True)
class Sharded:
    """What `sample_shards` did.

    Attributes:
        order: what was sampled.
        num_samples: how many there are now.
        shards: files that there are now; kept: how many of them were there before.
        workers: how many were at work.
        passed_over: {better backend: why it is not used}, where no backend was named.
    """

    order: Order
    num_samples: int
    shards: int
    kept: int
    workers: int
    passed_over: Mapping[str, str]


def sample_shards(
    bundle: Bundle | Path | str,
    out: Path | str,
    num_samples: int | None = None,
    *,
    address: str = LOCAL,
    workers: int | None = None,
    labels: Sequence[int] = (),
    prompted: Prompted | None = None,
    negative_prompt: str | None = None,
    conditions: Path | None = None,
    seed: int = 0,
    plan: Plan | None = None,
    batch_size: int | None = None,
    shard_size: int | None = None,
    backend: str | None = None,
    model: Path | None = None,
    resident: bool = True,
    format: Format = "parquet",
    content: Content = "png",
    begun: Callable[[int, int], None] = lambda samples, kept: None,
    advance: Callable[[int], None] = lambda samples: None,
) -> Sharded:
    """Draw samples 0 .. num_samples - 1 of `seed` into shards in `out`, on Ray; those that are there stay.

    The samples are those of `run` with the same bundle, backend, seed and batch size, bit for bit on one kind
    of processor, whatever the number of workers and machines.

    Args:
        num_samples: None is one per row of `conditions`.
        address, workers: as for `connect`.
        labels: classes in turn; empty takes all classes in turn.
        prompted: prompts in turn, of `encode_prompts`.
        negative_prompt: beside prompts of `conditions`.
        conditions: Parquet file, or a folder of them, with a row per sample.
        batch_size: samples at a time; None is that of the shards in `out`, or as many as suit this machine's
            memory with a worker on each of its cores.
        shard_size: samples per file, a multiple of batch_size; None is that of the shards in `out`, or the
            usual one.
        model, resident: as for Runtime.
        begun: called with the number of samples that are to be there, and that are there, before any work.
        advance: called with the number of samples of each shard that is finished.
    Raises:
        PTQDError: as `run`; or Ray, a worker or the folder fails.
    """
    out = Path(out)
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    m, info = bundle.manifest, bundle.manifest.sampling.model
    check_seed(seed)
    if format == "parquet" or conditions is not None:
        pyarrow("--format parquet" if conditions is None else "--conditions")
    plan = m.plan if plan is None else plan
    m.check_plan(plan)
    need(
        conditions is None or not (labels or prompted),
        "conditions were given beside classes or prompts: leave one of them out",
    )
    if labels:
        info.conditions(list(labels), len(labels))
    data = None if conditions is None else Conditions.open(conditions, info, bool(m.pipeline.encoders))
    num_samples = _number(num_samples, data)
    if negative_prompt is not None and (data is None or PROMPT not in data.columns):
        raise RecipeError("a negative prompt was given without a prompt: give both")
    _check_sizes(shard_size, batch_size)
    passed_over: Mapping[str, str] = {}
    if backend is None:
        with Runtime(bundle, None, plan) as runtime:
            backend, passed_over = runtime.backend, dict(runtime.passed_over)
    held = held_order(out)
    if batch_size is None:
        cores = backends.threads()
        batch_size = usual_batch(bundle, backend, cores) if held is None else held.batch_size
    if shard_size is None:
        shard_size = usual_shard_size(num_samples, batch_size) if held is None else held.shard_size
    _check_sizes(shard_size, batch_size)
    if content != "latents" and m.pipeline.decoder is not None:
        backends.check(ORT_CPU)  # it runs the decoder
    check_batch(m, backend, min(batch_size, num_samples))
    order = Order(
        bundle=bundle.seal,
        model=info.name,
        seed=int(seed),
        plan=str(plan),
        backend=backend,
        batch_size=batch_size,
        shard_size=shard_size,
        format=format,
        content=content,
        shape=info.sample_shape if content == "latents" else bundle.picture_shape,
        labels=tuple(int(label) for label in labels),
        prompts=() if prompted is None else prompted.prompts,
        negative_prompt=negative_prompt if prompted is None else prompted.negative,
        conditions=None if data is None else data.sha256,
        versions=versions(bundle, backend),
    )
    start = Start(bundle.path.resolve(), bundle.seal, backend, plan, model, 0, resident, None)
    with open_shards(out, order, num_samples) as shards:
        missing, used = shards.missing, 0
        begun(num_samples, num_samples - sum(len(shard.samples) for shard in missing))
        if missing:
            task = Task(start, order, num_samples, shards.folder, prompted, data)
            with connect(address, workers, backend) as pool:
                used = min(pool.workers, len(missing))
                for done in pool.run(task, missing):
                    shards.add(done)
                    advance(done.rows)
        return Sharded(order, num_samples, len(shards.done), shards.kept, used, passed_over)


def _check_sizes(shard_size: int | None, batch_size: int | None) -> None:
    if shard_size is not None and batch_size is not None and shard_size % batch_size:
        raise RecipeError(
            f"--shard-size {shard_size} is no multiple of --batch-size {batch_size}: give one, so that "
            "batches are those of one worker"
        )


def _number(num_samples: int | None, data: Conditions | None) -> int:
    """How many samples there are to be.

    Raises:
        RecipeError: it is not said, or more than the conditions have rows.
    """
    if num_samples is None:
        if data is None:
            raise RecipeError("how many samples is not said: give --num-samples")
        num_samples = len(data)
    if num_samples < 1 or (data is not None and num_samples > len(data)):
        most = "" if data is None else f" and at most {len(data)}, the rows of the conditions"
        raise RecipeError(f"{num_samples} samples were asked for: give at least 1{most}")
    return num_samples
