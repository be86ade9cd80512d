"""Serving under load: requests that arrive over time, answered by continuous batching.

`transformers` is the frozen model in transformers' own continuous batching, `off` the engine with every
request on the frozen model, `on` with a mixture of its own for each request. Tokens must be those that the
reference ops find likeliest for each request alone (`Judge`), the engine's in fp32 before anything is timed,
and in the dtype that is timed. Arrivals are a Poisson process;
at rate infinity all requests are there at once, and `tokens_per_second` is the most that the machine gives:
"load" is the share of `on`'s at which requests come.

Latencies are over all requests of all rounds, in seconds: `first_token` from the arrival on, `per_token` of
those after the first; 50% and 95%. `first_token_95_low` and `_high` are the quantiles of the rounds' own.
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

from slm_fast.routing import Routing
from suite.cases import Case, Contender, Effort, measure, quantiles
from suite.machine import dtype_name, natural_dtype

PROMPTS, ENTRIES = (16, 48), 64  # the shortest and the longest prompt in tokens; of the pool
OURS, CUDA = "on", "cuda"
CONTENDERS = ("transformers", "off", OURS)
LOADS = (0.25, 0.5, 0.9)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


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
                found[f"{name}_{share}"] = at_share(values, share)
        each = [at_share(sorted(s[1] - s[0] for s in call), 95) for call in self.calls[1:]]
        found["first_token_95_low"], _, found["first_token_95_high"] = quantiles(each)
        return found


def at_share(values: list[float], percent: int) -> float:
    """The value that so many of the sorted ones are below."""
    return values[min(len(values) - 1, percent * len(values) // 100)]


def everything(model, routing: Routing, prompts: list, new_tokens: int, rate: float) -> dict[str, Load]:
    """The loads of the engine, pool off and on, and of transformers."""
    from slm_fast.continuous import batching_config

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
    loads = Load(plain, *args), Load(routed, *args, off), Load(routed, *args, routing)
    return dict(zip(CONTENDERS, loads, strict=True))


class Judge:
    """Whether tokens continue their prompts greedily: by the reference ops in fp32, each request alone, the
    logit of each lies below the largest by at most a share `TOLERANCE` of the largest magnitude."""

    def __init__(self, model, prompts: list[list[int]], new_tokens: int) -> None:
        self.exact, self.prompts, self.new_tokens = common.exact_copy(model), prompts, new_tokens
        self.known: dict[tuple, float] = {}  # of what was judged

    @torch.inference_mode()
    def off(self, row: int, tokens: list[int], routing: Routing | None) -> float:
        """How far the worst of a request's tokens lies below, as a share of the largest magnitude."""
        if (key := (row, routing is None, *tokens)) not in self.known:
            forward = common.engine_forward(self.exact, None if routing is None else routing.rows([row]))
            ids = torch.tensor([self.prompts[row] + tokens])
            logits = forward(input_ids=ids).logits[0, len(self.prompts[row]) - 1 : -1]
            below = logits.amax(1) - logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            self.known[key] = float((below / logits.abs().amax(1)).max())
        return self.known[key]

    def check(self, routing: Routing | None, dtype: torch.dtype) -> Callable[[list[list[int]]], str | None]:
        """Says what is wrong with the tokens of all requests. routing: None for the frozen model."""

        def wrong(tokens: list[list[int]]) -> str | None:
            lengths = [len(row) for row in tokens]
            if lengths != [self.new_tokens] * len(self.prompts):
                return f"wrong result: lengths {lengths}, wanted {self.new_tokens} each"
            worst = max(self.off(row, found, routing) for row, found in enumerate(tokens))
            if worst <= TOLERANCE[dtype]:
                return None
            return f"wrong result: a token {worst:.1e} below the likeliest, allowed {TOLERANCE[dtype]:.0e}"

        return wrong


@torch.inference_mode()
def verify(model, prompts: list[list[int]], new_tokens: int = 6) -> None:
    """Raises SystemExit unless the engine in fp32 gives a batch's requests the tokens of the reference."""
    exact = copy.deepcopy(model).float()
    routing = common.make_routing(exact, len(prompts))
    together = everything(exact, routing, prompts, new_tokens, math.inf)["on"]()
    if reason := Judge(exact, prompts, new_tokens).check(routing, torch.float32)(together):
        raise SystemExit(f"{reason}; nothing is timed")


def unavailable(device: str) -> str | None:
    """Why nothing is measured there, or None."""
    if device == CUDA:
        return "measured on the CPU alone: the engine's continuous batching refuses CUDA graphs"
    try:
        import slm_fast.continuous  # noqa: F401
    except ImportError as error:  # an older transformers
        return str(error)
    return None


def records(quick: bool, device: str, effort: Effort) -> Iterator[dict]:
    """SmolLM2-135M on the CPU: all at once, then arrivals at shares of what that gave."""
    if unavailable(device) is not None:
        return
    base = common.make_base("smol", natural_dtype())
    model = common.make_engine(base, TARGETS["all"], ENTRIES)
    count, new_tokens = (4, 6) if quick else (16, 16)
    prompts = make_prompts(model.base_model.config.vocab_size, count)
    verify(model, prompts[:3])
    routing, most = common.make_routing(model, count), math.inf  # requests per second
    effort = Effort(2, 3 if quick else 5, effort.seconds)
    judge = Judge(model, prompts, new_tokens)
    right = {name: judge.check(routing if name == OURS else None, base.dtype) for name in CONTENDERS}
    for load in (None, 0.5) if quick else (None, *LOADS):
        rate = math.inf if load is None else load * most
        loads = everything(model, routing, prompts, new_tokens, rate)
        contenders = [
            Contender(name, lambda _, sent=sent: sent(), right[name]) for name, sent in loads.items()
        ]
        axes = {"requests": count, "new_tokens": new_tokens, "dtype": dtype_name(base.dtype)}
        if load is None:
            axes |= {"arrivals": "at once", "rate": None}
            name = f"{count} requests at once, {new_tokens} new tokens"
        else:
            axes |= {"arrivals": "poisson", "rate": rate, "load": load}
            name = f"{count} requests at {load:.0%} of capacity, {new_tokens} new tokens"
        record = measure(Case("serve", name, axes, contenders, OURS, dtype=axes["dtype"]), effort)
        for name, sent in loads.items():
            found = record["contenders"][name]
            if "seconds" in found:
                found |= sent.numbers() | {"tokens_per_second": count * new_tokens / found["seconds"]}
        yield record
        if load is None:
            most = record["contenders"][OURS]["tokens_per_second"] / new_tokens


def targets(records: list[dict], ceilings: dict) -> list[dict]:
    """None is set."""
    return []
