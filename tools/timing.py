"""Things timed in turn, for the benchmarks: a slow moment of the machine hits all of them."""

import time


def interleaved(candidates, rounds, warmup=3, pause=0.0):
    """Seconds per call of each candidate, {name: [one per round]}, called in turn. pause: seconds before each call, for
    the threads of another process to fall asleep."""
    times = {name: [] for name in candidates}
    for round in range(-warmup, rounds):
        for name, call in candidates.items():
            time.sleep(pause)
            began = time.perf_counter()
            call()
            if round >= 0:
                times[name].append(time.perf_counter() - began)
    return times
