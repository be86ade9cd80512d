"""Serving under load: requests that arrive over time, answered by continuous batching.

`transformers` is the frozen model in transformers' own continuous batching, `off` the engine with every
request on the frozen model, `on` with a mixture of its own for each request. Before anything is timed, the
engine in fp32 must give a batch's requests the tokens that each gets alone. Arrivals are a Poisson process;
at rate infinity all requests are there at once, and `tokens_per_second` is the most that the machine gives.

Latencies are over all requests of all rounds, in seconds: `first_token` from the arrival on, `per_token` of
those after the first; 50% and 95%.
"""

import copy
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import contenders as common
import torch
from contenders import TARGETS
from transformers import GenerationConfig

from slm_fast.continuous import batching_config
from slm_fast.routing import Routing
from suite.cases import Case, Contender, Effort, measure
from suite.machine import dtype_name, natural_dtype

PROMPTS, ENTRIES = (16, 48), 64  # the shortest and the longest prompt in tokens; of the pool
OURS = "on"


def make_prompts(vocab: int, count: int) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(vocab) for _ in range(draw.randint(*PROMPTS))] for _ in range(count)]


class Load:
    """Requests at their times; a call sends them all, waits for the last and keeps the latencies."""

    def __init__(
        self, opened: Callable, prompts: list[list[int]], new_tokens: int, rate: float, rows=None
    ) -> None:
        self.opened, self.prompts, self.new_tokens, self.rows = opened, prompts, new_tokens, rows
        draw, now, self.arrivals = random.Random(1), 0.0, []
        for _ in prompts:
            self.arrivals.append(now)
            now += draw.expovariate(rate) if math.isfinite(rate) else 0.0
        self.calls: list[list[list[float]]] = []  # of every call the requests' timestamps, arrival first

    def __call__(self) -> list[list[int]]:
        with self.opened() as manager:
            begin, outputs, ids = time.perf_counter(), {}, []
            for row, (prompt, arrival) in enumerate(zip(self.prompts, self.arrivals, strict=True)):
                time.sleep(max(0.0, begin + arrival - time.perf_counter()))
                options = {} if self.rows is None else {"routing": self.rows.rows([row])}
                ids.append(
                    manager.add_request(
                        prompt, max_new_tokens=self.new_tokens, record_timestamps=True, **options
                    )
                )
            while len(outputs) < len(ids):
                output = manager.get_result(timeout=1)
                if output is not None and output.is_finished():
                    outputs[output.request_id] = output
        done = [outputs[name] for name in ids]
        self.calls.append([[output.created_time, *output.timestamps] for output in done])
        return [list(output.generated_tokens) for output in done]

    def numbers(self) -> dict:
        """Latencies of all calls but the first, which is slower and is none of the rounds."""
        found, requests = {}, [stamps for call in self.calls[1:] for stamps in call]
        first_token = [stamps[1] - stamps[0] for stamps in requests]
        per_token = [(stamps[-1] - stamps[1]) / (len(stamps) - 2) for stamps in requests]
        for name, values in (("first_token", first_token), ("per_token", per_token)):
            values = sorted(values)
            for share in (50, 95):
                found[f"{name}_{share}"] = values[min(len(values) - 1, share * len(values) // 100)]
        return found


def everything(model, routing: Routing, prompts: list, new_tokens: int, rate: float) -> dict[str, Load]:
    """The loads of the engine, pool off and on, and of transformers."""
    frozen = copy.deepcopy(model).unload()
    config = GenerationConfig(do_sample=False, max_new_tokens=new_tokens, eos_token_id=-1)
    sizes = batching_config(model, None, [(len(prompt), new_tokens) for prompt in prompts])

    def routed():
        return model.continuous_batching_context_manager(config, copy.copy(sizes))

    @contextmanager
    def plain() -> Iterator:
        # There is nothing to warm up but the cache, which the engine too makes at its first step.
        options = dict(generation_config=config, continuous_batching_config=copy.copy(sizes), warmup=False)
        with frozen.continuous_batching_context_manager(**options) as manager:
            yield manager

    off = model.pool.fixed_routing(["__base__"] * len(prompts))
    args = (prompts, new_tokens, rate)
    return {
        "transformers": Load(plain, *args),
        "off": Load(routed, *args, off),
        "on": Load(routed, *args, routing),
    }


@torch.inference_mode()
def verify(model, prompts: list[list[int]], new_tokens: int = 6) -> None:
    """Raises SystemExit unless, in fp32, requests in one batch get the tokens that each gets alone."""
    exact = copy.deepcopy(model).float()
    routing = common.make_routing(exact, len(prompts))
    together = everything(exact, routing, prompts, new_tokens, math.inf)["on"]()
    for row, prompt in enumerate(prompts):
        ids, options = torch.tensor([prompt]), dict(max_new_tokens=new_tokens, do_sample=False)
        options |= dict(attention_mask=torch.ones_like(ids), eos_token_id=-1, pad_token_id=0)
        alone = exact.generate(input_ids=ids, routing=routing.rows([row]), **options)
        if (alone := alone[0, len(prompt) :].tolist()) != together[row]:
            raise SystemExit(f"request {row}: {together[row]} in a batch, {alone} alone; nothing is timed")


def records(quick: bool, device: str, effort: Effort) -> Iterator[dict]:
    """SmolLM2-135M on the CPU: all at once, then arrivals at half of what that gave."""
    if device != "cpu":
        return
    base = common.make_base("smol", natural_dtype())
    model = common.make_engine(base, TARGETS["all"], ENTRIES)
    count, new_tokens = (4, 6) if quick else (16, 16)
    prompts = make_prompts(model.base_model.config.vocab_size, count)
    verify(model, prompts[:3])
    routing, rate = common.make_routing(model, count), math.inf
    effort = Effort(2, 3 if quick else 5, effort.seconds)
    for arrivals in ("at once", "poisson"):
        loads = everything(model, routing, prompts, new_tokens, rate)

        def right(tokens):
            lengths = [len(row) for row in tokens]
            return None if lengths == [new_tokens] * count else f"lengths {lengths}, wanted {new_tokens} each"

        contenders = [Contender(name, lambda _, load=load: load(), right) for name, load in loads.items()]
        axes = {"requests": count, "new_tokens": new_tokens, "arrivals": arrivals}
        axes["dtype"] = dtype_name(base.dtype)
        axes["rate"] = rate if math.isfinite(rate) else None
        name = f"{count} requests {arrivals}, {new_tokens} new tokens"
        record = measure(Case("serve", name, axes, contenders, OURS), effort)
        for name, load in loads.items():
            found = record["contenders"][name]
            if "seconds" in found:
                found |= load.numbers() | {"tokens_per_second": count * new_tokens / found["seconds"]}
        yield record
        rate = 0.5 * record["contenders"]["on"]["tokens_per_second"] / new_tokens


def targets(records: list[dict], ceilings: dict) -> list[dict]:
    """None is set."""
    return []
