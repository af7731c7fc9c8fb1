"""A discrete-event simulation of many runs that share workers, GPUs, an LLM account, a server and a store.

A run takes a worker, prepares photos at the rate of the LLM account, holds its GPUs from class images to samples, waits
for its batch job without a worker, and publishes. All runs are queued at the start; every queue is first in, first out.
"""

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

from flows.capacity.workload import Installation, Workload
from tasks.errors import ConfigError

HOUR = 3600.0
IDLE = 0.5
"""Below this share of use of every resource, the runs are limited by the duration of one of them."""
LATENCY = "duration of one run"
ADVICE = {
    "GPUs": "more GPUs (`gpus`), a cheaper method (training/method=lora), or fewer steps",
    "workers": "more workers, or `likeness up --max-runs`: runs wait for a worker while GPUs idle",
    "LLM requests": "a higher tier, a second profile as fallback, or subject.batch_threshold=3: captions by batch job",
    "batch queue": "a higher tier, or scoring.executor=sync for a part of the runs",
    "Prefect server": "PostgreSQL (`likeness up --postgres`), several server replicas, a worker per group of runs",
    "store requests": "prefixes per team (store.prefix), so that S3 scales each",
    LATENCY: "nothing is short; fewer steps, or a smaller evaluation, shorten a run",
}


@dataclass
class Rate:
    """What is used up at a steady rate, such as requests per second."""

    per_second: float
    free_at: float = 0.0
    used: float = 0.0

    def take(self, now: float, amount: float) -> float:
        """Return when an amount has passed that is asked for now, behind all earlier ones."""
        self.used += amount
        self.free_at = max(self.free_at, now) + amount / self.per_second
        return self.free_at


@dataclass
class Pool:
    """Tokens that are held, such as GPUs."""

    size: int
    taken: int = 0
    held_seconds: float = 0.0
    waiting: deque[tuple[int, Callable[[], None]]] = field(default_factory=deque)

    def take(self, amount: int, then: Callable[[], None], *, is_first: bool = False) -> None:
        """Call back when an amount is free; one that is larger than the pool takes all of it."""
        (self.waiting.appendleft if is_first else self.waiting.append)((min(amount, self.size), then))
        self.serve()

    def free(self, amount: int, held: float) -> None:
        """Give an amount back that was used for some seconds; waits for another resource are no use."""
        amount = min(amount, self.size)
        self.taken -= amount
        self.held_seconds += amount * held
        self.serve()

    def serve(self) -> None:
        """Call back who waits, as far as there is enough."""
        while self.waiting and self.taken + self.waiting[0][0] <= self.size:
            amount, then = self.waiting.popleft()
            self.taken += amount
            then()


@dataclass(frozen=True)
class Outcome:
    """What a number of subjects takes."""

    subjects: int
    seconds: float
    use: dict[str, float]
    """Share of each resource that was used until the last run had ended, 0 to 1."""
    gpu_hours: float
    usd: float
    llm_requests: int
    rows: int
    objects: int
    stored_bytes: int

    @property
    def bottleneck(self) -> str:
        """The resource that is used most; the duration of one run where none is short."""
        name = max(self.use, key=lambda key: self.use[key])
        return name if self.use[name] >= IDLE else LATENCY


class Simulation:
    """Runs of one workload on one installation.

    Raises:
        ConfigError: a run holds more GPUs at a time than there are.

    """

    def __init__(self, work: Workload, offer: Installation) -> None:
        if work.gpus > offer.gpus:
            raise ConfigError(
                f"{work.name} holds {work.gpus} GPUs at a time, and gpus={offer.gpus}; set gpus={work.gpus} or more, "
                "or name a run on fewer devices"
            )
        self.work, self.offer = work, offer
        self.now, self.events, self.order = 0.0, list[tuple[float, int, Callable[[], None]]](), count()
        self.workers, self.gpus = Pool(offer.workers), Pool(offer.gpus)
        self.batch = Pool(offer.batch_requests_queued)
        self.llm = Rate(offer.llm_requests_per_minute / 60)
        self.server, self.store = Rate(offer.server_requests_per_second), Rate(offer.store_requests_per_second)
        self.on_gpu = work.on_gpu / offer.gpu_speedup

    def at(self, when: float, then: Callable[[], None]) -> None:
        """Call back at a time."""
        heapq.heappush(self.events, (when, next(self.order), then))

    def run(self, subjects: int) -> Outcome:
        """Simulate until all runs have ended."""
        for _ in range(subjects):
            self.workers.take(1, self.prepare)
        while self.events:
            self.now, _, then = heapq.heappop(self.events)
            then()
        return self.describe(subjects)

    def prepare(self) -> None:
        """Start-up and photos; a worker is held from here on."""
        ready = max(
            self.now + self.work.before_gpu,
            self.llm.take(self.now, self.work.llm_calls),
            self.server.take(self.now, self.offer.server_requests_per_run),
        )
        self.at(ready, lambda: self.gpus.take(self.work.gpus, self.compute))

    def compute(self) -> None:
        """Class images, training and samples."""

        def finish() -> None:
            self.gpus.free(self.work.gpus, self.on_gpu)
            used = self.work.before_gpu + self.on_gpu
            if not self.work.batch_requests:
                self.publish(used)
                return
            self.workers.free(1, used)
            self.batch.take(self.work.batch_requests, self.judge)

        self.at(self.now + self.on_gpu, finish)

    def judge(self) -> None:
        """Wait for the batch job, without a worker; runs that were begun come before new ones."""
        seconds = self.offer.batch_hours * HOUR

        def finish() -> None:
            self.batch.free(self.work.batch_requests, seconds)
            self.workers.take(1, lambda: self.publish(0.0), is_first=True)

        self.at(self.now + seconds, finish)

    def publish(self, used: float) -> None:
        """Report, registry and upload; a worker was used for some seconds before."""
        done = max(self.now + self.work.after_gpu, self.store.take(self.now, self.work.objects))
        self.at(done, lambda: self.workers.free(1, used + self.work.after_gpu))

    def describe(self, subjects: int) -> Outcome:
        """Return totals and shares of use."""
        work, offer, seconds = self.work, self.offer, max(self.now, 1e-9)
        gpu_hours = subjects * work.gpus * self.on_gpu / HOUR
        pools = {"GPUs": self.gpus, "workers": self.workers, "batch queue": self.batch}
        rates = {"LLM requests": self.llm, "Prefect server": self.server, "store requests": self.store}
        use = {name: pool.held_seconds / (pool.size * seconds) for name, pool in pools.items()}
        use |= {name: rate.used / (rate.per_second * seconds) for name, rate in rates.items()}
        return Outcome(
            subjects=subjects,
            seconds=seconds,
            use=use,
            gpu_hours=gpu_hours,
            usd=gpu_hours * offer.gpu_usd_per_hour + subjects * work.llm_usd,
            llm_requests=subjects * (work.llm_calls + work.batch_requests),
            rows=subjects * offer.database_rows_per_run,
            objects=subjects * work.objects,
            stored_bytes=subjects * work.stored_bytes,
        )
